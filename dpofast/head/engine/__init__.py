"""The LM-head engines: rows of logits, softmax statistics and gradient accumulation inside a byte budget."""
