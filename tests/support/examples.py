"""Examples of token ids that several tests pack."""

# The example of the packed layout's documentation.
DESIGN = {"prompt_ids": [10, 11, 12], "chosen_ids": [20, 21], "rejected_ids": [30, 31, 32]}


def example(prompt, chosen, rejected, **extra):
    """A row of two responses."""
    return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, **extra}


def group(prompt, branches, pairs, **extra):
    """A row of several responses and the pairs (chosen, rejected) of their indices."""
    return {"prompt_ids": prompt, "branches": branches, "pairs": pairs, **extra}
