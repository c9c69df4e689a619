"""Packed attention: each row sees the rows of its path, which may be shared by several sequences.

interface  registers it with transformers, and chooses one of the three backends
indexer    layers that select keys, which packed rows have up to index_topk
methods    families that attend without the interface
layout     their arguments: PackedLayout, AttentionOptions
chunks     the runs of rows of chunked attention
varlen     FlashAttention over all runs of rows at once, 16-bit on CUDA
gather     its K/V rows, copied for each run that reads them, and the sums of their gradients
flash      FlashAttention 3 and 4 in place of torch's FlashAttention 2
flex       FlexAttention, for softcap, sinks and other head sizes on CUDA
sdpa       run by run, everywhere
"""
