"""Benchmarks: each gates on correctness, interleaves what it compares and appends one JSON line to bench/results."""
