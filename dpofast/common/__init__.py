"""What every package may use.

- backend: which implementation does the row work of a call (Triton, torch or the reference)
- autograd: backward passes that refuse second derivatives; autograd inside operators
- ranks: Ranks, collectives on plain numbers, on the CPU
- atomic_files: writing a file so that it is there whole or not at all
- memory: peak memory of this process
- constants: IGNORE_INDEX
"""
