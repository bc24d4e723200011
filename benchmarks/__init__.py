"""hesse beside its peers: `python -m benchmarks.run`, then `python -m benchmarks.table`."""
