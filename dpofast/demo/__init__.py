"""The built-in example: a small world, a small model, and a preference for kind answers."""
