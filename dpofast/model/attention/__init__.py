"""Packed attention: each response sees its prompt and itself."""
