"""Utilities that every package may import.

- backend: which implementation does the row work of a call (Triton, torch or the reference)
- autograd: backward passes that refuse second derivatives; autograd inside operators
- ranks: Ranks, collectives on plain numbers, on the CPU
- atomic_files: atomic, durable file writes
- locks: WriteLock, held by the one process that writes
- output: printing that outlives a full disk or a closed terminal
- printable: text with its control characters escaped
- names, hub: did-you-mean; a mistyped path told from a name on the hub
- eval_mode: a model in eval mode for a while
- memory: peak memory of this process
- constants: IGNORE_INDEX
"""
