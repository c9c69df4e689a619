"""Benchmarks and checks that need a GPU; `python -m bench.gpu` runs them all, `--dry` runs the same code on the CPU."""
