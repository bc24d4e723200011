"""Taps: one product an output of a layer, and not one a weight."""
