"""hesse on models of other people's: first `python -m benchmarks.models.run`, then `...page`."""
