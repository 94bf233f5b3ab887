"""How fast the relay is, beside what its parts can do at most; run with `python -m benchmarks`."""
