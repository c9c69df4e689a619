"""One optimizer step: forward and backward of its micro-batches, on one process or on several.

Training and evaluation run the same forward. The loss of each micro-batch is its share of the whole step's loss (a sum
over pairs divided by the pairs of all ranks), so the sum of the micro-batches' gradients is the gradient of the step.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn

from dpofast.checkpointing.folder import where_to_go_on
from dpofast.common.eval_mode import eval_mode
from dpofast.common.ranks import Ranks
from dpofast.data.formats import REF_COLUMNS
from dpofast.data.load import DataReport
from dpofast.evaluation.metrics import TOKEN_STATISTICS, MetricSums
from dpofast.losses.config import PreferenceLoss
from dpofast.losses.functional import PreferenceOutput, token_preference_loss
from dpofast.losses.pairs import StepTotals
from dpofast.losses.sequences import Tokens
from dpofast.model.attach import PackedPreference
from dpofast.model.checks.images import images_refused
from dpofast.model.moe import RoutingCounts, balancing_coefficient
from dpofast.model.vision.idle import idle_image, with_idle_image
from dpofast.packing.batch import PackedBatch
from dpofast.packing.media import BatchMedia
from dpofast.packing.pack import pack
from dpofast.scoring.lockstep import IDLE_EXAMPLE
from dpofast.scoring.ref_cache import reference_logps
from dpofast.training.checks.launch import find_unused_vision_weights
from dpofast.training.config import DPOConfig
from dpofast.training.coupled import CoupledShare, coupled_shares, gathered
from dpofast.training.layers.compiled import explained_compile_errors
from dpofast.training.memory.out_of_memory import unless_out_of_memory
from dpofast.training.parallel.fsdp import is_sharded, without_sync
from dpofast.training.ref_model import ReferenceModel, unwrapped


@dataclass(frozen=True)
class StepSettings:
    """What all steps of a run share.

    Attributes:
        loss: the preference loss.
        reference: the model that computes reference log-probs in the step; None where every batch brings them.
        ranks: what the pairs of a step are divided among.
        group: the process group that computes each micro-batch together (sequence parallelism), or None.
        accelerator: accelerate's, which wrapped the model. Its autocast is entered explicitly: accelerate applies it to
            the wrapped policy only, and the reference must round in the same way.
        device: where batches are.
        averaged_over: how many processes gradients are averaged over.
        max_logits_bytes: the LM head's memory limit, or None for the default.
        token_statistics: also compute entropy, mean logits and accuracy per token, at the cost of more memory.
        balancing: weight of a mixture of experts' load-balancing loss, 0 for none.
        idle_image: what micro-batches without images carry in steps with images, as calls of the vision tower are
            collectives; None where they are not, or where the model takes no images.
    """

    loss: PreferenceLoss
    reference: ReferenceModel | None
    ranks: Ranks
    accelerator: Any
    device: torch.device
    averaged_over: int = 1
    max_logits_bytes: int | None = None
    token_statistics: bool = False
    balancing: float = 0.0
    idle_image: BatchMedia | None = None
    group: Any = None

    @property
    def forwards_are_collective(self) -> bool:
        """Whether other ranks wait inside a forward for this one: of a sharded model, or of rows that are divided."""
        return self.group is not None or is_sharded(self.accelerator)


def step_settings(
    model: Any,
    args: DPOConfig,
    loss: PreferenceLoss,
    reference: ReferenceModel | None,
    ranks: Ranks,
    accelerator: Any,
    group: Any = None,
) -> StepSettings:
    """Returns the settings of a run.

    Raises:
        ValueError: a load-balancing loss for padded rows, or for a model without one; ddp_find_unused_parameters=False
            where vision weights train.
    """
    text_config = model.config.get_text_config()
    balancing = balancing_coefficient(text_config, args.router_aux_loss_coef)
    if balancing and args.padded:
        raise ValueError("router_aux_loss_coef: padded rows give no load-balancing loss; set it to 0")
    find_unused_vision_weights(model, args, accelerator)
    sees = is_sharded(accelerator) and images_refused(model) is None
    return StepSettings(
        loss=loss,
        reference=reference,
        ranks=ranks,
        accelerator=accelerator,
        device=args.device,
        averaged_over=ranks.processes // args.tensor_parallel_size,
        max_logits_bytes=args.max_logits_bytes,
        token_statistics=args.token_statistics,
        balancing=balancing,
        idle_image=idle_image(model).moved(lambda tensor: tensor.to(args.device)) if sees else None,
        group=group,
    )


@dataclass(frozen=True)
class StepResult:
    """losses (P,) and rewards (P, 2) of each micro-batch of this rank, in the order they ran, and the metrics.

    balancing: this rank's addend of the step's weighted load-balancing loss, a scalar; None without.
    """

    losses: list[Tensor]
    rewards: list[Tensor]
    sums: MetricSums
    balancing: Tensor | None


class OptimizerStep:
    """The micro-batches of one optimizer step on this rank; the whole step with run(), or by forward() and backward().

    Args:
        settings: what all steps of the run share.
        model: the policy, as accelerate wrapped it.
        batches: this rank's micro-batches. They are padded with None so that every rank runs the same number of
            forwards (FSDP and DeepSpeed need it), and at least one (DDP needs it). Ranks that share rows have the same
            ones, each split over their group.
        totals: counts over all micro-batches of all ranks.
        sums: the metrics that forward() adds to; default: new ones.
    """

    def __init__(
        self,
        settings: StepSettings,
        model: nn.Module,
        batches: Sequence[PackedBatch],
        totals: StepTotals,
        sums: MetricSums | None = None,
    ) -> None:
        """Pad the micro-batches; a collective where the model is sharded."""
        self.settings, self.model, self.totals = settings, model, totals
        self.sums = MetricSums() if sums is None else sums
        ranks = settings.ranks
        is_sharded_model = is_sharded(settings.accelerator)  # ranks that share rows have as many micro-batches anyway
        count = int(ranks.all_reduce_max(len(batches))) if is_sharded_model else max(len(batches), 1)
        self._num_batches = len(batches)
        self._balancing: Tensor | None = None
        self._idle_image = settings.idle_image
        if self._idle_image is not None:
            with_images = any(batch.media is not None for batch in batches)
            if not ranks.all_reduce_max(with_images):
                self._idle_image = None  # no rank calls the vision tower
        self.batches: list[PackedBatch | None] = [*map(self._as_others, batches), *[None] * (count - len(batches))]
        self._is_split = count > 1 or ranks.size > 1
        self._is_joint = settings.loss.coupled and self._is_split
        self._options: dict[str, Any] = {
            "balance": settings.balancing != 0,
            "max_logits_bytes": settings.max_logits_bytes,
        }

    def run(self) -> StepResult | None:
        """Forward and backward of all micro-batches; gradients are accumulated in the parameters.

        Ranks synchronize gradients in the last backward only, and agree before it that none of them ran out of memory.

        Returns:
            None on all ranks where one of them ran out of memory before gradients were synchronized. The model then
            has partial gradients, and no graph of the attempt is alive any more.

        Raises:
            RuntimeError: out of memory where other ranks wait, inside a forward (of a sharded model, or of rows that
                ranks share) or for gradients.
        """
        ranks, done = self.settings.ranks, list[PreferenceOutput]()
        # Elsewhere the other ranks would wait in the middle of a forward.
        collective = ranks.processes > 1 and self.settings.forwards_are_collective
        recoverable = ranks.processes == 1 or not (collective or self.settings.loss.coupled)
        if not self.count_routing(recoverable=not collective):
            return None
        last = unless_out_of_memory(lambda: self._all_but_the_last_backward(done), recoverable=recoverable)
        if ranks.all_reduce_max(last is None) or last is None:
            last = None  # frees the graph of a rank that had memory
            if ranks.processes > 1:
                # DDP waits for the backward of a forward that it saw, and would take the next one's gradients for it.
                self.backward(self._idle())
            return None
        # The other ranks wait inside this backward for the gradients of this one.
        ended = unless_out_of_memory(partial(self.backward, last), recoverable=ranks.processes == 1)
        if ended is None:
            return None
        done.append(ended)
        pairs = zip(done[: self._num_batches], self.batches, strict=False)  # those of None stand last
        rewards = [
            output.of_pairs("rewards", batch.pairs, batch.columns.lists) for output, batch in pairs if batch is not None
        ]
        return StepResult([output.losses for output in done], rewards, self.sums, self._balancing)

    def _all_but_the_last_backward(self, done: list[PreferenceOutput]) -> PreferenceOutput:
        """The loop over micro-batches; returns the output whose backward synchronizes gradients."""
        with without_sync(self.settings.accelerator, self.model):
            *others, last = zip(self.batches, self.shares(), strict=True)
            for batch, share in others:
                done.append(self.backward(self.forward(batch, share)))
        return self.forward(*last)

    def forward(self, batch: PackedBatch | None, share: CoupledShare | None = None) -> PreferenceOutput:
        """Loss and metrics of a micro-batch; None gives a zero loss from forwards like those of the other ranks.

        Args:
            batch: one of self.batches.
            share: the entry of shares() that belongs to it.
        """
        if batch is None:
            if not self._is_joint:
                return self._idle()
            # As many forwards as a micro-batch takes here: one of the policy, or in evaluation none.
            zero = torch.zeros((), device=self.settings.device)
            return self._idle(with_reference=False) if torch.is_grad_enabled() else _empty_output(zero)
        output = self._separable(batch) if share is None else self._coupled(batch, share)
        loss, count = self.settings.loss, len(output.losses)
        if (aux_loss := output.aux_loss) is not None:
            balancing = self.settings.balancing * aux_loss  # of a split step an addend of its loss
            output = replace(output, loss=output.loss + balancing)
            own = balancing.detach()
            self._balancing = own if self._balancing is None else self._balancing + own
            self.sums.add("aux_loss", aux_loss.detach() * self.totals.num_pairs, count)
        with_reference = batch.ref_logps is not None or loss.needs_reference
        self.sums.add_pairs(output, batch, loss.beta, with_reference=with_reference)
        return output

    def backward(self, output: PreferenceOutput) -> PreferenceOutput:
        """Accumulate the gradients of output.loss; returns the output without its graph.

        DDP, FSDP and DeepSpeed average gradients over ranks, and the loss of a step is a sum over them: hence the
        factor. Ranks that share a step's rows have each a part of the gradient; tensor-parallel ones have all of it.
        """
        averaged, accelerator = self.settings.averaged_over, self.settings.accelerator
        # DeepSpeed's engine would divide by gradient_accumulation_steps, and the losses of micro-batches add up already
        as_it_is = {"scale_wrt_gas": False} if accelerator.distributed_type == DistributedType.DEEPSPEED else {}
        with explained_compile_errors():  # layers that are compiled may compile their backward when it first runs
            accelerator.backward(output.loss * averaged if averaged > 1 else output.loss, **as_it_is)
        return replace(output, loss=output.loss.detach(), aux_loss=None)

    def count_routing(self, *, recoverable: bool = False) -> bool:
        """Count how the tokens of a split step choose experts: what the load-balancing loss needs before its forwards.

        A pass of the backbone without gradients over all micro-batches, and a collective. Nothing without that loss.

        Args:
            recoverable: whether to return, and not raise, where memory runs out.

        Returns:
            False on all ranks where one of them ran out of memory.
        """
        settings = self.settings
        if not (settings.balancing and self._is_split):
            return True
        own = unless_out_of_memory(self._own_routing, recoverable=recoverable)
        if settings.ranks.all_reduce_max(own is None) or own is None:
            return False
        if settings.ranks.size > 1:
            summed = own.chosen.new_tensor(settings.ranks.all_reduce_sum([*own.chosen.tolist(), own.total.item()]))
            own = RoutingCounts(summed[:-1], summed[-1])
        self._options["balance"] = own
        return True

    def _own_routing(self) -> RoutingCounts:
        """The counts over this rank's micro-batches."""
        with self._beforehand():
            idle = self._idle_batch()
            packed = [idle if batch is None else batch for batch in self.batches]
            counts = [self.model(packed=batch, count_routing=True) for batch in packed]
        own = slice(self._num_batches)  # those of None stand last
        chosen, total = torch.stack([c.chosen for c in counts]), torch.stack([c.total for c in counts])
        return RoutingCounts(chosen[own].sum(0), total[own].sum())

    @contextlib.contextmanager
    def _beforehand(self) -> Iterator[None]:
        """Inside, a pass over the micro-batches without gradients; forward() will draw the same dropout again."""
        devices = [self.settings.device] if self.settings.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad(), self.settings.accelerator.autocast():
            yield

    def shares(self) -> Sequence[CoupledShare | None]:
        """What forward() needs of the whole step for each micro-batch: None each, unless the loss couples them.

        A loss that couples the pairs of several micro-batches needs the log-probs of all of them, on all ranks, before
        the first gradient: a pass without gradients, and one more pass in forward().
        """
        if not self._is_joint:
            return [None] * len(self.batches)
        settings = self.settings
        own = [batch for batch in self.batches if batch is not None]
        references, scored = list[Tensor | None](), list[tuple[Tokens, Tensor | None]]()
        with self._beforehand():
            for batch in self.batches:  # in the order of _idle: other ranks may be in that one
                if batch is None:
                    self._idle()
                else:
                    references.append(self.reference_logps(batch))
                    scored.append(self._tokens(batch))
        tokens, aux_losses = [tokens for tokens, _ in scored], [aux_loss for _, aux_loss in scored]
        rows = [(batch.pairs, batch.columns) for batch in own]
        everyone, first = gathered(settings.ranks, tokens, rows, references, settings.device)
        shares = coupled_shares(*everyone, settings.loss, self.totals)[first : first + len(own)]
        shares = [
            share._replace(output=replace(share.output, aux_loss=aux_loss))
            for share, aux_loss in zip(shares, aux_losses, strict=True)
        ]
        return [*shares, *[None] * (len(self.batches) - len(own))]

    def _separable(self, batch: PackedBatch) -> PreferenceOutput:
        """One forward: the loss needs nothing of the other micro-batches but their counts."""
        settings, totals = self.settings, self.totals
        step = {name: getattr(totals, name) for name in ("num_pairs", "num_chosen_tokens", "earlier_rewards")}
        with settings.accelerator.autocast():
            ref_logps = self.reference_logps(batch)
            if not settings.token_statistics:
                preference = PackedPreference(ref_logps, settings.loss, **step)
                return self.model(packed=batch, preference=preference, **self._options)
            tokens, aux_loss = self._tokens(batch)
            output = token_preference_loss(
                tokens.logps,
                batch.cu_targets,
                batch.pairs,
                ref_logps,
                loss=settings.loss,
                log_sum_sq_probs=tokens.log_sum_sq,
                columns=batch.columns,
                **step,
            )
            return replace(output, aux_loss=aux_loss)

    def _coupled(self, batch: PackedBatch, share: CoupledShare) -> PreferenceOutput:
        """The second forward: its gradient is that of the step's loss, whose value is known from shares()."""
        if not torch.is_grad_enabled():
            return share.output
        with self.settings.accelerator.autocast():
            scored = self.model(packed=batch, **self._options)
        return replace(share.output, loss=(scored.logps * share.coefficients).sum(), aux_loss=scored.aux_loss)

    def _tokens(self, batch: PackedBatch) -> tuple[Tokens, Tensor | None]:
        """Log-probs and statistics per token, and the load-balancing loss."""
        stats: tuple[str, ...] = TOKEN_STATISTICS if self.settings.token_statistics else ()
        stats += ("log_sum_sq_probs",) if self.settings.loss.use_weighting else ()
        output = self.model(packed=batch, stats=stats, **self._options)
        if self.settings.token_statistics:
            self.sums.add_tokens(output, batch)
        weights = batch.columns.token_weights
        return Tokens(output.logps, batch.cu_targets, None, output.log_sum_sq_probs, weights), output.aux_loss

    def reference_logps(self, batch: PackedBatch) -> Tensor | None:
        """(S,), with ld_alpha (P, 2), nats; None where the loss has no reference and the data brought none.

        Raises:
            ValueError: the batch brings none, and there is no reference model in the step.
        """
        settings = self.settings
        if batch.ref_logps is not None or not settings.loss.needs_reference:
            return batch.ref_logps
        if settings.reference is None:
            raise ValueError(
                f"expected the columns {REF_COLUMNS} that the reference log-probs were written to, and the "
                "batch has none: pass the dataset to DPOTrainer's constructor"
            )
        with settings.reference.of(unwrapped(self.model)) as asked, eval_mode(asked):
            return reference_logps(asked, batch, settings.max_logits_bytes, settings.loss.ld_alpha)

    def _idle(self, *, with_reference: bool = True) -> PreferenceOutput:
        """A differentiable zero from the forwards of a micro-batch: what a rank runs while others have pairs."""
        settings = self.settings
        batch = self._idle_batch()
        with settings.accelerator.autocast():
            if with_reference and settings.reference is not None:
                self.reference_logps(batch)
            return _empty_output(self.model(packed=batch, max_logits_bytes=settings.max_logits_bytes).logps.sum() * 0.0)

    def _idle_batch(self) -> PackedBatch:
        batch = pack([IDLE_EXAMPLE], share="none")[0]  # NEFTune's noise takes no shared positions
        if self.settings.group is not None:
            batch = batch.split_over(self.settings.group)
        return self._as_others(batch.to(self.settings.device))

    def _as_others(self, batch: PackedBatch) -> PackedBatch:
        """The batch; where other ranks call the vision tower and it has no images, with an idle one."""
        return batch if self._idle_image is None else with_idle_image(batch, self._idle_image)


def rows_not_finite(
    examples: Sequence[Any], batches: Sequence[PackedBatch], losses: Sequence[Tensor], ranks: Ranks
) -> list[int]:
    """The dataset rows of all ranks' pairs whose loss is not finite; losses (P,) of each micro-batch. A collective."""
    own = [
        int(examples[int(example)]["row"])
        for batch, pair_losses in zip(batches, losses[: len(batches)], strict=True)
        for example, value in zip(batch.pair_examples, pair_losses.tolist(), strict=True)
        if not math.isfinite(value)
    ]
    return sorted(row for theirs in ranks.all_gather(own) for row in theirs)


def not_finite(rows: list[int], report: DataReport, step: int, output_dir: str) -> FloatingPointError:
    """The error of a step whose loss is not finite, with the rows of its pairs."""
    return FloatingPointError(
        f"{report.source}: the loss of the pairs in {report.unit}s {rows} is not finite at step {step}, which was not "
        f"taken; {where_to_go_on(output_dir)}. Look at these pairs, and at a learning rate that is too high"
    )


def _empty_output(zero: Tensor) -> PreferenceOutput:
    empty = zero.detach().new_empty(0)
    return PreferenceOutput(zero, empty, empty, empty)
