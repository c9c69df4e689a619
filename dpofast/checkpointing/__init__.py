"""Atomic checkpoints and exact resume, for any transformers.Trainer."""
