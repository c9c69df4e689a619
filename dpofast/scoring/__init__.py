"""Forward-only passes: scores, reference log-probs and their cache."""
