"""Counts what each way of dividing a model over ranks leaves on one of them (python -m bench.scale)."""
