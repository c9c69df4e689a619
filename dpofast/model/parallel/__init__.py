"""A model that runs on several ranks at once, each with its share of the rows or of the heads."""
