"""Leaves that stay alive on a sweep's way: those that enter more than once, or not linearly."""
