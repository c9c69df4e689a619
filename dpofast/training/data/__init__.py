"""The datasets of a run.

tokens  PreferenceData: token-level datasets and their reports
stream  steps from training data that is streamed
"""
