"""q, k, v and the layout of one attention layer over a packed batch of shared prompts, for benchmarks and tests."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpofast.model.attention.layout import PackedLayout
from dpofast.packing.batch import PackedBatch
from dpofast.packing.pack import pack


@dataclass(frozen=True)
class AttentionCase:
    """Arguments of varlen_attention, flex_attention_packed and sdpa_attention, beside AttentionOptions.

    Attributes:
        query: (1, H, T, Dh), with the strides that a layer's projections give: T outermost.
        key, value: (1, H_kv, T, Dh), likewise.
        layout: of the T rows.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    layout: PackedLayout


def shared_prompt_batch(pairs: int, prompt: int, responses: Sequence[int]) -> PackedBatch:
    """`pairs` prompts of `prompt` tokens in one row, each with one branch for every length in `responses`."""
    example = {
        "branches": [[branch] * length for branch, length in enumerate(responses)],
        "pairs": [(0, branch) for branch in range(1, len(responses))],
    }
    # Equal prompts would be one.
    (batch,) = pack([{**example, "prompt_ids": [index] * prompt} for index in range(pairs)])
    return batch


def attention_case(
    *,
    pairs: int,
    prompt: int,
    responses: Sequence[int],
    heads: int = 32,
    kv_heads: int = 8,
    head_dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
) -> AttentionCase:
    """Normal q, k and v of `pairs` prompts of `prompt` tokens, each with one branch for every length in `responses`.

    The defaults are Llama-3.1-8B's. T = pairs · (prompt + Σ (response − 1)).
    """
    batch = shared_prompt_batch(pairs, prompt, responses)
    shapes = (heads, kv_heads, kv_heads)
    tensors = (torch.randn(1, batch.num_tokens, count, head_dim, dtype=dtype, device=device) for count in shapes)
    query, key, value = (tensor.transpose(1, 2) for tensor in tensors)
    return AttentionCase(query, key, value, PackedLayout(batch.segments))
