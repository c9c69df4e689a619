"""The packed forward inside models of transformers."""
