"""Benchmark of the LM head alone: hidden states to log-probs to gradients; `python -m bench.head`."""
