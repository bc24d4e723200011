"""The sweep: one reverse walk over the tape that carries curvature, without products."""
