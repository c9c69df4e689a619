"""The slow truth: every arrow of the data flow in plain, materializing PyTorch, in any dtype, float64 included.

Nothing here is fast and nothing here is clever. Kernels, packing and trainer are tested against these functions, and a
reader who wants to know what a number means finds its formula here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE_INDEX = -100


def scaled_logits(
    logits: Tensor, *, logit_scale: float = 1.0, softcap: float | None = None, temperature: float = 1.0
) -> Tensor:
    """z = softcap·tanh(logit_scale·x/softcap)/temperature for raw logits x (..., V); same dtype."""
    z = logits * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def logprobs(logits: Tensor, targets: Tensor, *, temperature: float = 1.0, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """log softmax(logits/temperature)[target], nats: logits (..., V), targets (...) int64 -> (...); 0 where ignored."""
    ignored = targets == ignore_index
    logp = torch.log_softmax(logits / temperature, dim=-1)
    picked = logp.gather(-1, targets.masked_fill(ignored, 0).unsqueeze(-1)).squeeze(-1)
    return torch.where(ignored, torch.zeros_like(picked), picked)


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """The same from hidden (N, D), weight (V, D), bias (V,): the (N, V) logits are built. Returns (N,)."""
    logits = F.linear(hidden, weight, bias)
    z = scaled_logits(logits, logit_scale=logit_scale, softcap=softcap, temperature=temperature)
    return logprobs(z, targets, ignore_index=ignore_index)


def token_statistics(z: Tensor, targets: Tensor, *, ignore_index: int = IGNORE_INDEX) -> dict[str, Tensor]:
    """Statistics of scaled logits z (N, V): entropy and log Σp² in nats, mean logit, is_top1; 0 where ignored."""
    ignored = targets == ignore_index
    logp = torch.log_softmax(z, dim=-1)
    # 0·(−inf) for a masked-out vocabulary entry is 0 here: the limit of p·log p
    plogp = torch.where(logp == float("-inf"), torch.zeros_like(logp), logp.exp() * logp)
    values = {
        "entropy": -plogp.sum(-1),
        "mean_logits": z.mean(-1),
        "is_top1": z.argmax(-1) == targets,
        "log_sum_sq_probs": torch.logsumexp(2 * logp, dim=-1),
    }
    return {name: torch.where(ignored, torch.zeros_like(value), value) for name, value in values.items()}


def sequence_logprobs(logps: Tensor, cu_targets: Tensor) -> Tensor:
    """Sums of logps (N,) over the sequences [cu[s], cu[s+1]) of cu_targets (S+1,): (S,), nats, summed over tokens."""
    bounds = cu_targets.tolist()
    sums = [logps[start:stop].sum() for start, stop in zip(bounds[:-1], bounds[1:], strict=True)]
    return torch.stack(sums) if sums else logps.new_zeros(0)


def sigmoid_loss(
    logps: Tensor,
    pairs: Tensor,
    ref_logps: Tensor | None = None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """DPO (arXiv 2305.18290, eq. 7) with cDPO's label smoothing; a mean over pairs.

    logps and ref_logps (S,) are summed sequence log-probs, pairs (P, 2) names chosen and rejected sequence.
    Returns (losses (P,), rewards (S,)): reward = beta·(logp − ref_logp), detached.
    """
    logratios = logps if ref_logps is None else logps - ref_logps
    chosen, rejected = pairs.long().to(logps.device).unbind(1)
    margin = beta * (logratios[chosen] - logratios[rejected])
    losses = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    return losses, (beta * logratios).detach()


def padded_rows(rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int = 0) -> dict[str, Tensor]:
    """Right-padded rows of (prompt_ids, response_ids): input_ids and its two masks by name, each (B, L) int64."""
    length = max(len(prompt) + len(response) for prompt, response in rows)
    masks = ("attention_mask", "completion_mask")
    padded = {name: torch.zeros(len(rows), length, dtype=torch.int64) for name in masks}
    padded["input_ids"] = torch.full((len(rows), length), pad_id, dtype=torch.int64)
    for b, (prompt, response) in enumerate(rows):
        stop = len(prompt) + len(response)
        padded["input_ids"][b, :stop] = torch.as_tensor([*map(int, prompt), *map(int, response)])
        padded["attention_mask"][b, :stop] = 1
        padded["completion_mask"][b, len(prompt) : stop] = 1
    return padded


def padded_logprobs(
    model: Any, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor, **model_options: Any
) -> Tensor:
    """Log-probs of the completion tokens of right-padded rows (B, L) by the model's own forward and full logits.

    Returns (N,) in row order, the order of a packed batch's targets. model_options go to the model (use_cache, ...).
    """
    logits = model(input_ids=input_ids, attention_mask=attention_mask, **model_options).logits
    targets = input_ids[:, 1:].masked_fill(completion_mask[:, 1:] == 0, IGNORE_INDEX)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return logprobs(wide[:, :-1], targets)[targets != IGNORE_INDEX]
