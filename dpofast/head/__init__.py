"""Hidden states and the LM head -> log-probs and gradients, without logits in memory."""
