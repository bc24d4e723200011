"""Matrices of curvature as linear operators: products, and exact diagonals, blocks and traces."""
