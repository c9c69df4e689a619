"""Forward and backward of an optimizer step's micro-batches, on one process or on several."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from dpofast.evaluation.metrics import MetricSums
from dpofast.losses.functional import PreferenceOutput
from dpofast.losses.pairs import StepTotals
from dpofast.packing.pack import PackedBatch
from dpofast.training.out_of_memory import StepOutOfMemory, is_out_of_memory
from dpofast.training.preference_step import PreferenceStep


class OptimizerStep:
    """Runs micro-batches through the wrapped model, and gradients through accelerate.

    Args:
        forward: from micro-batches to losses.
        accelerator: of the trainer; it knows how the model is wrapped.
    """

    def __init__(self, forward: PreferenceStep, accelerator: Any) -> None:
        """Remember both."""
        self.forward, self.accelerator = forward, accelerator
        self.ranks = forward.ranks

    @property
    def is_sharded(self) -> bool:
        """A forward is a collective: FSDP, DeepSpeed."""
        plugins = ("fsdp_plugin", "deepspeed_plugin")
        return any(getattr(self.accelerator.state, name, None) is not None for name in plugins)

    def with_idle(self, batches: Sequence[PackedBatch]) -> list[PackedBatch | None]:
        """None for every micro-batch that this rank has fewer than others, where all must call the model as often."""
        count = int(self.ranks.all_reduce_max(len(batches))) if self.is_sharded else max(len(batches), 1)
        return [*batches, *[None] * (count - len(batches))]

    def run(
        self, model: nn.Module, batches: Sequence[PackedBatch], totals: StepTotals
    ) -> tuple[list[Tensor], list[Tensor], MetricSums]:
        """Losses (P,) and rewards (P, 2) of each micro-batch, and the metrics; gradients are added up on the way.

        Ranks synchronize their gradients in the last backward only, and agree before it that all of them came so far.

        Raises:
            StepOutOfMemory: on all ranks, where one of them had no room and nothing was synchronized yet.
        """
        sums = MetricSums()
        parts = self.with_idle(batches)
        outputs = self.forward.outputs(model, parts, totals, sums)
        done: list[PreferenceOutput] = []
        # Elsewhere the other ranks would wait in the middle of a forward.
        recoverable = self.ranks.size == 1 or not (self.is_sharded or self.forward.loss.coupled)
        failed = False
        try:
            with self._without_sync(model):
                for _ in parts[:-1]:
                    done.append(self._backward(next(outputs)))
            last = next(outputs)
        except (RuntimeError, MemoryError) as error:
            if not (recoverable and is_out_of_memory(error)):
                raise
            failed = True
        if self.ranks.all_reduce_max(failed):
            if self.ranks.size > 1:
                # DDP waits for the backward of a forward that it saw, and would take the next one's gradients for it.
                self._backward(self.forward.idle(model))
            raise StepOutOfMemory
        try:
            done.append(self._backward(last))
        except (RuntimeError, MemoryError) as error:
            if self.ranks.size > 1 or not is_out_of_memory(error):
                raise
            raise StepOutOfMemory from None
        pairs = zip(done, batches, strict=False)  # idle ones stand last
        rewards = [output.of_pairs("rewards", batch.pairs) for output, batch in pairs]
        return [output.losses for output in done], rewards, sums

    @contextlib.contextmanager
    def _without_sync(self, model: nn.Module) -> Iterator[None]:
        """Backwards inside add up gradients of this rank alone, and do not step DeepSpeed's engine.

        Under FSDP2 these are whole; accelerate's option sync_each_batch keeps a shard, and exchanges each time.
        """
        state = self.accelerator.gradient_state
        state._set_sync_gradients(False)
        each = self.is_sharded and state.plugin_kwargs.get("sync_each_batch", False)
        try:
            with contextlib.nullcontext() if each else self.accelerator.no_sync(model):
                yield
        finally:
            state._set_sync_gradients(True)

    def _backward(self, output: PreferenceOutput) -> PreferenceOutput:
        """Returns the output without its graph. Gradients are averaged over ranks, and the step's loss is a sum."""
        self.accelerator.backward(output.loss * self.ranks.size if self.ranks.size > 1 else output.loss)
        return replace(output, loss=output.loss.detach())
