"""Preference data: files, folders and hub datasets -> token-level datasets."""
