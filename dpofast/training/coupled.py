"""Losses that couple all pairs of an optimizer step, when the step has several micro-batches.

The log-probs of all micro-batches are computed first, without gradients. They determine the loss and the coefficient
d(loss)/d(log-prob) of every token. Then each micro-batch runs again, and the gradient of Σ coefficient · log-prob is
exactly its share of the step's gradient. This costs one more forward than a separable loss, and no more memory.
"""

from __future__ import annotations

from dataclasses import fields
from itertools import accumulate, chain
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from dpofast.common.backend import choose_backend
from dpofast.common.ranks import Ranks
from dpofast.losses.coefficients import pair_terms
from dpofast.losses.columns import PreferenceColumns
from dpofast.losses.config import PreferenceLoss
from dpofast.losses.functional import PreferenceOutput
from dpofast.losses.pairs import StepTotals
from dpofast.losses.sequences import Tokens

Rows = tuple[Tensor, PreferenceColumns]
"""A micro-batch's pairs (P, 2), numbers of its own sequences, and their columns."""


class CoupledShare(NamedTuple):
    """A micro-batch's part of a coupled loss.

    Attributes:
        output: its losses, log-probs and rewards within the whole step, without gradients.
        coefficients: (N,) d(the step's loss)/d(token log-prob).
    """

    output: PreferenceOutput
    coefficients: Tensor


def coupled_shares(
    tokens: list[Tokens],
    rows: list[Rows],
    ref_logps: list[Tensor | None],
    loss: PreferenceLoss,
    totals: StepTotals,
) -> list[CoupledShare]:
    """The shares of all micro-batches of a step, in their order.

    Args:
        tokens: log-probs (N,) of each micro-batch, nats, and their weights, of which its columns are not asked.
        rows: of each.
        ref_logps: (S,) of each, with ld_alpha (P, 2); None where the loss has no reference.
        loss: the preference loss.
        totals: counts over the whole step.

    Raises:
        ValueError: a column that only some micro-batches have.
    """
    pairs, columns = zip(*rows, strict=True)
    sizes = [len(part.logps) for part in tokens]
    sequences = [len(part.cu_targets) - 1 for part in tokens]
    targets_before, sequences_before = ([0, *accumulate(counts)][:-1] for counts in (sizes, sequences))
    ends = [part.cu_targets[1:] + before for part, before in zip(tokens, targets_before, strict=True)]
    references = [ref for ref in ref_logps if ref is not None]
    statistics = [part.log_sum_sq for part in tokens if part.log_sum_sq is not None]
    joined = Tokens(
        torch.cat([part.logps for part in tokens]),
        torch.cat([tokens[0].cu_targets[:1], *ends]),
        None,
        torch.cat(statistics) if statistics else None,
        _joined_weights(tokens),
    )
    joined_pairs = torch.cat([part + before for part, before in zip(pairs, sequences_before, strict=True)])
    ref = torch.cat(references) if references else None
    joined_columns = PreferenceColumns.joined([part._replace(token_weights=None) for part in columns], sequences_before)
    backend = choose_backend("auto", joined.logps.device)
    terms = pair_terms(joined, joined_pairs, ref, loss, totals, backend, joined_columns)
    counts = [len(part) for part in pairs]
    parts = zip(
        terms.losses.split(counts),
        terms.logps.split(counts if loss.ld_alpha is not None else sequences),
        terms.rewards.split(counts if terms.rewards.dim() == 2 else sequences),
        (terms.coefficients / totals.num_pairs).split(sizes),
        strict=True,
    )
    return [
        CoupledShare(PreferenceOutput(losses.sum() / totals.num_pairs, losses, logps, rewards), coefficients)
        for losses, logps, rewards, coefficients in parts
    ]


def _joined_weights(tokens: list[Tokens]) -> Tensor | None:
    """Token weights of all micro-batches; 1 in those without, whose responses have none."""
    if all(part.weights is None for part in tokens):
        return None
    return torch.cat([torch.ones_like(part.logps) if part.weights is None else part.weights for part in tokens])


def gathered(
    ranks: Ranks,
    tokens: list[Tokens],
    rows: list[Rows],
    ref_logps: list[Tensor | None],
    device: torch.device,
) -> tuple[tuple[list[Tokens], list[Rows], list[Tensor | None]], int]:
    """Gather the micro-batches of all ranks. A collective.

    Returns:
        coupled_shares' first three arguments, and the number of the first micro-batch of this rank among them.
    """
    if ranks.size == 1:
        return (tokens, rows, ref_logps), 0
    own = (
        [_moved_tokens(part, "cpu") for part in tokens],
        [(pairs, columns.moved(Tensor.cpu)) for pairs, columns in rows],
        [_moved(ref, "cpu") for ref in ref_logps],
    )
    everyone = ranks.all_gather(own)
    first = sum(len(theirs[0]) for theirs in everyone[: ranks.rank])
    all_tokens, all_rows, references = (list(chain.from_iterable(parts)) for parts in zip(*everyone, strict=True))
    return (
        [_moved_tokens(part, device) for part in all_tokens],
        [(pairs, columns.moved(lambda column: column.to(device))) for pairs, columns in all_rows],
        [_moved(ref, device) for ref in references],
    ), first


def _moved_tokens(tokens: Tokens, device: torch.device | str) -> Tokens:
    """The tokens on a device, but for cu_targets, which stay on the CPU."""
    moved = {field.name: _moved(getattr(tokens, field.name), device) for field in fields(tokens)}
    return Tokens(**{**moved, "cu_targets": tokens.cu_targets})


def _moved(value: Any, device: torch.device | str) -> Any:
    return None if value is None else value.to(device)


class RunningRewards(TrainerCallback, ExportableState):
    """Sum and number of all rewards of a run, for bco_delta="running_mean".

    A callback, so that Trainer writes them into its checkpoints.

    Args:
        ranks: what the pairs of a step are divided among; processes that share their pairs have equal rewards.
    """

    def __init__(self, ranks: Ranks) -> None:
        """Start with a sum and a number of 0."""
        self.sums: Tensor | list[float] = [0.0, 0.0]
        self._sharing = ranks.processes // ranks.size

    def tensor(self, device: torch.device) -> Tensor:
        """Returns sum and number: (2,) float64."""
        return torch.as_tensor(self.sums, dtype=torch.float64, device=device)

    def add(self, rewards: Tensor) -> None:
        """Add a step's rewards, of any shape, of all ranks. A collective."""
        count = rewards.new_full((), rewards.numel(), dtype=torch.float64)
        added = torch.stack([rewards.double().sum(), count])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(added)  # on the device, over all processes
        self.sums = self.tensor(rewards.device) + added / self._sharing

    def state(self) -> dict[str, dict[str, list[float]]]:
        """Returns what a checkpoint stores, in the form of transformers' ExportableState."""
        sums = self.sums.tolist() if isinstance(self.sums, Tensor) else self.sums
        return {"args": {}, "attributes": {"sums": sums}}
