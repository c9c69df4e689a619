"""Micro-batches whose rows are divided among the ranks of a group."""
