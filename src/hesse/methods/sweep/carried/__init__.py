"""Leaves that stay alive on a sweep's route: those that enter more than once, or not linearly."""
