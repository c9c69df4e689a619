"""Preference data -> token-level datasets.

- load: load_preferences, from files, folders and the Hugging Face hub
- formats: what a row must hold, and the errors BadRow and DataError
- tokenize_pairs: tokenize_preferences and its DataReport
- arrow: reading a memory-mapped dataset in chunks of rows
"""
