"""The dense method: one product a coordinate, batched."""
