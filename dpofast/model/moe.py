"""The load-balancing loss of mixtures of experts over packed rows (Switch Transformer, arXiv 2101.03961, eq. 4-6).

What sequences share has one row here, and one for each of them in a padded batch. So that sharing does not change the
loss, each row is weighted by how often a padded batch of the same pairs would contain it. (A response's last token has
no position of its own here, and does not count.)

The loss of an optimizer step is that of all its rows, however they are split into micro-batches and over ranks. Shares
of choices have no gradient and probabilities add up over rows, so with the counts of the whole step each micro-batch
computes its addend, and the gradients add up too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpofast.model.attention.layout import on_device
from dpofast.packing.batch import PackedBatch


def balancing_coefficient(model_config: Any, coefficient: float | None) -> float:
    """The weight of the balancing loss: `coefficient`, or where it is None the model's own; 0 without experts.

    Raises:
        ValueError: a weight for a model that returns no router logits, or without the number of experts of a token.
    """
    routes = hasattr(model_config, "output_router_logits")
    if coefficient and not routes:
        raise ValueError(
            f"router_aux_loss_coef: expected a mixture-of-experts model that returns its router logits, got "
            f"{model_config.model_type}: leave it out"
        )
    own = getattr(model_config, "router_aux_loss_coef", None) or 0.0
    chosen = (own if coefficient is None else coefficient) if routes else 0.0
    if chosen and not hasattr(model_config, "num_experts_per_tok"):
        raise ValueError(
            f"router_aux_loss_coef: expected a model whose config says how many experts a token goes to "
            f"(num_experts_per_tok), and that of {model_config.model_type} does not: set it to 0"
        )
    return chosen


@dataclass(frozen=True)
class RoutingCounts:
    """How often each expert is chosen, over rows and layers, without gradients.

    Attributes:
        chosen: (num_experts,) float32, choices of each expert; a row counts as often as row_weights says.
        total: scalar float32, rows times layers with experts.
    """

    chosen: Tensor
    total: Tensor


def balancing_loss(
    router_logits: tuple[Tensor, ...], top_k: int, weights: Tensor, step: RoutingCounts | None = None
) -> Tensor:
    """num_experts · Σ_e f_e·P_e, where f_e is the share of choices and P_e the mean probability of expert e.

    Args:
        router_logits: (T, num_experts) of every layer with experts.
        top_k: experts that a token is sent to.
        weights: (T,) float32, how often each row counts (row_weights).
        step: counts over the rows that the loss is of, where these are only some of them; None where they are all.

    Returns:
        A scalar, float32: top_k where the experts are balanced; with step the addend of these rows.

    Raises:
        ValueError: no layer has experts.
    """
    own, probability = _routed(router_logits, top_k, weights)
    counts = own if step is None else step
    return len(probability) * (counts.chosen / counts.total * (probability / counts.total)).sum()


def routing_counts(router_logits: tuple[Tensor, ...], top_k: int, weights: Tensor) -> RoutingCounts:
    """The counts of these rows; arguments as in balancing_loss.

    Raises:
        ValueError: no layer has experts.
    """
    return _routed(router_logits, top_k, weights)[0]


def _routed(router_logits: tuple[Tensor, ...], top_k: int, weights: Tensor) -> tuple[RoutingCounts, Tensor]:
    """Counts, and the sums (num_experts,) of the probabilities, differentiable."""
    if not router_logits:
        raise ValueError("router_aux_loss_coef: expected a model with experts in some layer, got none: set it to 0")
    experts = router_logits[0].shape[-1]
    chosen = weights.new_zeros(experts)
    probability = weights.new_zeros(experts)
    for logits in router_logits:
        routing = logits.to(weights.device).float().softmax(dim=-1)
        _, selected = routing.topk(top_k, dim=-1)
        chosen = chosen.index_add(0, selected.flatten(), weights.repeat_interleave(top_k))
        probability = probability + weights @ routing
    return RoutingCounts(chosen, weights.sum() * len(router_logits)), probability


def row_weights(batch: PackedBatch) -> Tensor:
    """(T,) float32 on the batch's device: rows of a padded batch of the same responses that contain each position."""
    device = batch.logit_rows.device
    uses = on_device(torch.bincount(batch.members, minlength=batch.num_sequences).float(), device)
    last = batch.logit_rows[on_device(batch.cu_targets[1:].long() - 1, device)]
    ending = torch.zeros(batch.num_tokens + 1, device=device).index_add(0, last + 1, uses)
    # the sequences through a row are those that end between it and the end of all that follows its segment
    before = ending.cumsum(0)
    segments = batch.segments
    return before[on_device(segments.by_row(segments.ends), device)] - before[:-1]
