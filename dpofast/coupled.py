"""Losses that couple all pairs of an optimizer step, when the step takes several micro-batches.

The log-probs of the whole step come first, without gradients. They give the loss, and every token's coefficient; then
each micro-batch runs again, and the gradient of coefficient · log-prob is its exact share. One forward more than a
separable loss, and as little memory.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from dpofast.pair_terms import StepTotals, Tokens, pair_terms
from dpofast.preference import PreferenceLoss, PreferenceOutput
from dpofast.rows import choose_backend


def step_outputs(
    tokens: list[Tokens],
    pairs: list[Tensor],
    ref_logps: list[Tensor | None],
    loss: PreferenceLoss,
    totals: StepTotals,
) -> list[tuple[PreferenceOutput, Tensor]]:
    """Each micro-batch's output within the whole step, and its coefficients (N,): d(step's loss)/d(token log-prob)."""
    sizes = [len(part.logps) for part in tokens]
    sequences = [len(part.cu_targets) - 1 for part in tokens]
    rows_before, sequences_before = ([0, *accumulate(counts)][:-1] for counts in (sizes, sequences))
    ends = [part.cu_targets[1:] + before for part, before in zip(tokens, rows_before, strict=True)]
    references = [ref for ref in ref_logps if ref is not None]
    statistics = [part.log_sum_sq for part in tokens if part.log_sum_sq is not None]
    joined = Tokens(
        torch.cat([part.logps for part in tokens]),
        torch.cat([tokens[0].cu_targets[:1], *ends]),
        None,
        torch.cat(statistics) if statistics else None,
    )
    joined_pairs = torch.cat([part + before for part, before in zip(pairs, sequences_before, strict=True)])
    ref = torch.cat(references) if references else None
    terms = pair_terms(joined, joined_pairs, ref, loss, totals, choose_backend("auto", joined.logps.device))
    counts = [len(part) for part in pairs]
    per_response = counts if loss.ld_alpha is not None else sequences
    parts = zip(
        terms.losses.split(counts),
        terms.logps.split(per_response),
        terms.rewards.split(per_response),
        (terms.coefficients / totals.num_pairs).split(sizes),
        strict=True,
    )
    return [
        (PreferenceOutput(losses.sum() / totals.num_pairs, losses, logps, rewards), coefficients)
        for losses, logps, rewards, coefficients in parts
    ]


class RunningRewards(TrainerCallback, ExportableState):
    """Sum and number of all rewards of a run: a callback, so that Trainer writes them into its checkpoints."""

    def __init__(self) -> None:
        """Start at none."""
        self.sums: Tensor | list[float] = [0.0, 0.0]

    def tensor(self, device: torch.device) -> Tensor:
        """(2,) float64."""
        return torch.as_tensor(self.sums, dtype=torch.float64, device=device)

    def add(self, rewards: Tensor) -> None:
        """Add rewards of any shape."""
        count = rewards.new_full((), rewards.numel(), dtype=torch.float64)
        self.sums = self.tensor(rewards.device) + torch.stack([rewards.double().sum(), count])

    def state(self) -> dict[str, dict[str, list[float]]]:
        """What a checkpoint keeps."""
        sums = self.sums.tolist() if isinstance(self.sums, Tensor) else self.sums
        return {"args": {}, "attributes": {"sums": sums}}
