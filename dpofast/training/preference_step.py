"""The forward half of a step: micro-batches in, their shares of the step's loss out; training and evaluation alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dpofast.common.ranks import Ranks
from dpofast.data.formats import REF_COLUMNS
from dpofast.evaluation.metrics import TOKEN_STATISTICS, MetricSums
from dpofast.losses.config import PreferenceLoss
from dpofast.losses.functional import PreferenceOutput, token_preference_loss
from dpofast.losses.pairs import StepTotals
from dpofast.losses.sequences import Tokens
from dpofast.model.attach import PackedPreference
from dpofast.packing.pack import PackedBatch, pack
from dpofast.scoring.ref_cache import reference_logps
from dpofast.training.coupled import gathered, step_outputs
from dpofast.training.ref_model import ReferenceModel, unwrapped

# What a rank without pairs runs, where the others wait for its part of a sharded forward or of the gradients.
_IDLE_EXAMPLE = {"prompt_ids": [0], "chosen_ids": [0], "rejected_ids": [0, 0]}


@dataclass(frozen=True)
class PreferenceStep:
    """What the losses of a run need besides a model and its batches.

    Attributes:
        loss: the preference loss.
        reference: the model to ask for reference log-probs that a batch does not bring; None where every batch does.
        ranks: the processes that share a step.
        device: where batches go.
        autocast: the context that the policy's forward runs in; accelerate puts only the prepared policy under it, and
            the reference must take the same path.
        max_logits_bytes: the head's budget.
        token_statistics: per-token statistics too, which cost a path that keeps more.
        balancing: weight of a mixture of experts' load-balancing loss.
    """

    loss: PreferenceLoss
    reference: ReferenceModel | None
    ranks: Ranks
    device: torch.device
    autocast: Callable[[], AbstractContextManager[Any]]
    max_logits_bytes: int | None = None
    token_statistics: bool = False
    balancing: float = 0.0

    def outputs(
        self, model: nn.Module, batches: Sequence[PackedBatch | None], totals: StepTotals, sums: MetricSums
    ) -> Iterator[PreferenceOutput]:
        """The output of each micro-batch; that of None is a zero that took part in everything the others wait for."""
        joined = self.loss.coupled and (len(batches) > 1 or self.ranks.size > 1)
        plan = self._coupled if joined else self._separable
        for batch, output in zip(batches, plan(model, batches, totals, sums), strict=True):
            if batch is not None:
                if (aux_loss := output.aux_loss) is not None:
                    count = len(output.losses)
                    output = replace(output, loss=output.loss + self.balancing * count / totals.num_pairs * aux_loss)
                    sums.add("aux_loss", aux_loss.detach() * count, count)
                with_reference = batch.ref_logps is not None or self.loss.needs_reference
                sums.add_pairs(output, batch, self.loss.beta, with_reference=with_reference)
            yield output

    def reference_logps(self, model: nn.Module, batch: PackedBatch) -> Tensor | None:
        """(S,), with ld_alpha (P, 2), or None where the loss has no reference and the data brought none."""
        if batch.ref_logps is not None or not self.loss.needs_reference:
            return batch.ref_logps
        if self.reference is None:
            raise ValueError(
                f"expected the columns {REF_COLUMNS} that the reference log-probs were written to, and the "
                "batch has none: pass the dataset to DPOTrainer's constructor"
            )
        with self.reference.of(unwrapped(model)) as asked:
            training = asked.training
            asked.eval()
            try:
                return reference_logps(asked, batch, self.max_logits_bytes, self.loss.ld_alpha)
            finally:
                asked.train(training)

    def _tokens(self, model: nn.Module, batch: PackedBatch, sums: MetricSums) -> tuple[Tokens, Tensor | None]:
        """Log-probs and statistics per token, and the balancing loss."""
        stats: tuple[str, ...] = TOKEN_STATISTICS if self.token_statistics else ()
        stats += ("log_sum_sq_probs",) if self.loss.use_weighting else ()
        output = model(packed=batch, stats=stats, **self._options)
        if self.token_statistics:
            sums.add_tokens(output, batch)
        return Tokens(output.logps, batch.cu_targets, None, output.log_sum_sq_probs), output.aux_loss

    @property
    def _options(self) -> dict[str, Any]:
        return {"balance": self.balancing != 0, "max_logits_bytes": self.max_logits_bytes}

    def _separable(
        self, model: nn.Module, batches: Sequence[PackedBatch | None], totals: StepTotals, sums: MetricSums
    ) -> Iterator[PreferenceOutput]:
        step = {name: getattr(totals, name) for name in ("num_pairs", "num_chosen_tokens", "earlier_rewards")}
        for batch in batches:
            if batch is None:
                yield self.idle(model)
                continue
            with self.autocast():
                ref_logps = self.reference_logps(model, batch)
                if self.token_statistics:
                    tokens, aux_loss = self._tokens(model, batch, sums)
                    output = token_preference_loss(
                        tokens.logps,
                        batch.cu_targets,
                        batch.pairs,
                        ref_logps,
                        loss=self.loss,
                        log_sum_sq_probs=tokens.log_sum_sq,
                        **step,
                    )
                    output = replace(output, aux_loss=aux_loss)
                else:
                    preference = PackedPreference(ref_logps, self.loss, **step)
                    output = model(packed=batch, preference=preference, **self._options)
            yield output

    def _coupled(
        self, model: nn.Module, batches: Sequence[PackedBatch | None], totals: StepTotals, sums: MetricSums
    ) -> Iterator[PreferenceOutput]:
        """A loss that couples several micro-batches: all their log-probs first, then each one's gradient."""
        devices = [self.device] if self.device.type == "cuda" else []
        own = [batch for batch in batches if batch is not None]
        # Both passes over a micro-batch draw the same dropout.
        with torch.random.fork_rng(devices), torch.no_grad(), self.autocast():
            tokens = [self._tokens(model, batch, sums)[0] for batch in own]
            references = [self.reference_logps(model, batch) for batch in own]
            for _ in range(len(batches) - len(own)):
                self.idle(model)
        everyone, first = gathered(self.ranks, tokens, [batch.pairs for batch in own], references, self.device)
        results = iter(step_outputs(*everyone, self.loss, totals)[first : first + len(own)])
        trains = torch.is_grad_enabled()
        for batch in batches:
            if batch is None:
                # as many forwards as a micro-batch takes here: one of the policy, or in evaluation none
                none = torch.zeros((), device=self.device)
                yield self.idle(model, with_reference=False) if trains else _nothing(none)
                continue
            output, coefficients = next(results)
            if trains:
                with self.autocast():
                    scored = model(packed=batch, **self._options)
                output = replace(output, loss=(scored.logps * coefficients).sum(), aux_loss=scored.aux_loss)
            yield output

    def idle(self, model: nn.Module, *, with_reference: bool = True) -> PreferenceOutput:
        """Zero, differentiable, from forwards like the others'."""
        batch = pack([_IDLE_EXAMPLE], share_prompts=True)[0].to(self.device)
        with self.autocast():
            if with_reference and self.reference is not None:
                self.reference_logps(model, batch)
            return _nothing(model(packed=batch, max_logits_bytes=self.max_logits_bytes).logps.sum() * 0.0)


def _nothing(zero: Tensor) -> PreferenceOutput:
    empty = zero.detach().new_empty(0)
    return PreferenceOutput(zero, empty, empty, empty)
