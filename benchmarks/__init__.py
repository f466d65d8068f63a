"""How fast it is, measured: `python -m benchmarks`. What each figure means: docs/performance.md."""
