"""A loss over data: what a batch is, how many samples it has, and one function of them all."""
