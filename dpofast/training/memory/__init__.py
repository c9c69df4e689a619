"""Steps that fit into memory.

out_of_memory  recognizes errors of it, halves max_tokens, measures what fits
fit            a step done again until it fits; max_tokens="auto"
"""
