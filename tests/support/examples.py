"""Examples of token ids that several tests pack."""

# The example of the packed layout's documentation.
DESIGN = {"prompt_ids": [10, 11, 12], "chosen_ids": [20, 21], "rejected_ids": [30, 31, 32]}
