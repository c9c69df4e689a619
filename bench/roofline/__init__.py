"""Predict time and memory of a DPO step on a GPU from counted products and bytes; compare with what was measured."""
