"""The function at its point: one evaluation, what a first look finds, its gradient, and what work costs."""
