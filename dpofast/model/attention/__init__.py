"""Packed attention: each response sees its prompt and itself.

interface  registers it with transformers, and chooses one of the three backends
layout     their arguments: PackedLayout, AttentionOptions
varlen     FlashAttention over all segments at once, 16-bit on CUDA
flex       FlexAttention, for softcap, sinks and other head sizes on CUDA
sdpa       segment by segment, everywhere
"""
