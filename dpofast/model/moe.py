"""The load-balancing loss of mixtures of experts over packed rows (Switch Transformer, arXiv 2101.03961, eq. 4-6).

A shared prompt is one run of rows here, and one for each of its responses in a padded batch. So that sharing does not
change the loss, each row is weighted by how often a padded batch of the same pairs would contain it. (A response's last
token has no position here, and does not count.) The loss is computed per micro-batch and is not linear in the tokens,
so it depends on how a step is split into micro-batches, as in every trainer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dpofast.packing.batch import PackedBatch


def balancing_coefficient(model_config: Any, coefficient: float | None) -> float:
    """The weight of the balancing loss: `coefficient`, or where it is None the model's own; 0 without experts.

    Raises:
        ValueError: a weight for a model that returns no router logits.
    """
    routes = hasattr(model_config, "output_router_logits")
    if coefficient and not routes:
        raise ValueError(
            f"router_aux_loss_coef: expected a mixture-of-experts model that returns its router logits, got "
            f"{model_config.model_type}: leave it out"
        )
    own = getattr(model_config, "router_aux_loss_coef", None) or 0.0
    return (own if coefficient is None else coefficient) if routes else 0.0


def balancing_loss(router_logits: tuple[Tensor, ...], top_k: int, weights: Tensor) -> Tensor:
    """num_experts · Σ_e f_e·P_e, where f_e is the share of choices and P_e the mean probability of expert e.

    Args:
        router_logits: (T, num_experts) of every layer with experts.
        top_k: experts that a token is sent to.
        weights: (T,) float32, how often each row counts (row_weights).

    Returns:
        A scalar, float32; top_k where the experts are balanced.
    """
    experts = router_logits[0].shape[-1]
    chosen = weights.new_zeros(experts)
    probability = weights.new_zeros(experts)
    for logits in router_logits:
        routing = logits.to(weights.device).float().softmax(dim=-1)
        _, selected = routing.topk(top_k, dim=-1)
        chosen = chosen.index_add(0, selected.flatten(), weights.repeat_interleave(top_k))
        probability = probability + weights @ routing
    total = weights.sum() * len(router_logits)
    return experts * (chosen / total * (probability / total)).sum()


def row_weights(batch: PackedBatch) -> Tensor:
    """(T,) float32 on the batch's device: how many rows of a padded batch of the same pairs contain each position."""
    device = batch.logit_rows.device
    uses = torch.bincount(batch.pairs.flatten().long(), minlength=batch.num_sequences).float()
    of_target = uses.repeat_interleave(batch.cu_targets.diff().long()).to(device, non_blocking=True)
    # Each row of a response predicts one target; a prompt's last row predicts one for each of its responses.
    weights = torch.zeros(batch.num_tokens, device=device).index_add(0, batch.logit_rows, of_target)
    # The prompt's other rows predict none: they take the weight of the next row that does.
    rows = torch.arange(batch.num_tokens, device=device)
    following = torch.where(weights > 0, rows, batch.num_tokens).flip(0).cummin(0).values.flip(0)
    return weights[following]
