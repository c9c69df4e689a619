"""FSDP2 and ZeRO-3 from the constructor on: policy and reference are sharded before their first forward on the device.

accelerate shards a model when training begins, so the reference pass would need the whole model on one device. Here
accelerate's own function shards it when the trainer is built, layer by layer, and passes over it when training begins.
deepspeed.py does the same for ZeRO-3.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from accelerate.utils.fsdp_utils import fsdp2_apply_ac, fsdp2_prepare_model
from torch import nn
from torch.distributed.fsdp import FSDPModule

from dpofast.checkpointing.fsdp import first_shard
from dpofast.checkpointing.trainer import CheckpointedTrainer
from dpofast.checkpointing.zero import is_partitioned
from dpofast.model.checks.quantized import check_shardable
from dpofast.model.parallel.mapped import widened
from dpofast.model.parallel.zero import stop_gathering
from dpofast.training.parallel.deepspeed import is_zero3, partition_early
from dpofast.training.parallel.fsdp import forward_dtype, shard_layers_that_are_there


class ShardedEarly(CheckpointedTrainer):
    """A CheckpointedTrainer whose model may be sharded before train()."""

    _groups: list[list[nn.Parameter]] | None = None

    @property
    def shards_early(self) -> bool:
        """Whether shard() shards something."""
        return self.is_fsdp_enabled or is_zero3(self.accelerator)

    def shard(self, ref_model: nn.Module | None) -> None:
        """Shard the model, and a separate reference, where accelerate trains with FSDP2 or ZeRO-3; else do nothing.

        Units are each decoder layer, the embedding, and the last norm with the head; with tied weights norm, embedding
        and head are one.
        """
        if is_zero3(self.accelerator):
            for model in filter(None, (self.model, ref_model)):
                partition_early(self.accelerator, model)
            self.sharded_early = True
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is None:
            return
        # accelerate launch sets it unless told otherwise, and every process has read the weights: nothing to broadcast
        plugin.cpu_ram_efficient_loading = False
        for model in filter(None, (self.model, ref_model)):
            check_shardable(model, forward_dtype(self.accelerator))
        told = plugin.transformer_cls_names_to_wrap
        shard_layers_that_are_there(self.accelerator, self.model)
        if plugin.activation_checkpointing:
            plugin.set_auto_wrap_policy(self.model)
            fsdp2_apply_ac(self.accelerator, self.model)
            plugin.activation_checkpointing = False  # accelerate would wrap the layers once more
        with widened(self.model):
            fsdp2_prepare_model(self.accelerator, self.model)
        if ref_model is not None:
            of_policy, plugin.transformer_cls_names_to_wrap = plugin.transformer_cls_names_to_wrap, told
            shard_layers_that_are_there(self.accelerator, ref_model)
            is_cast = forward_dtype(self.accelerator) is not None  # cast_parameters gave it the dtype it is gathered in
            with contextlib.nullcontext() if is_cast else widened(ref_model):
                fsdp2_prepare_model(self.accelerator, ref_model)
            plugin.transformer_cls_names_to_wrap = of_policy
        self.sharded_early = True

    def run_identity(self) -> dict[str, Any]:
        """CheckpointedTrainer's, of the shards: FSDP2 cannot free whole weights whose memory a fingerprint has read."""
        if self.sharded_early:
            reshard(self.model)
        return super().run_identity()

    def _prepare_for_training(self, *args: Any) -> tuple[nn.Module, Any]:
        stop_gathering(self.model)  # DeepSpeed's engine does
        if self.sharded_early and self.is_fsdp_enabled:
            reshard(self.model)  # an evaluation before leaves whole weights of the head, which no optimizer may get
            self._groups, self.sharded_early = [], False
        return super()._prepare_for_training(*args)

    def create_optimizer(self, *args: Any) -> Any:
        """Trainer's."""
        optimizer = super().create_optimizer(*args)
        if self._groups is not None:
            self._groups = [list(group["params"]) for group in self.optimizer.param_groups]
        return optimizer

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, after accelerate has prepared the optimizer.

        accelerate finds weights again by the addresses of their shards, and all empty shards, of weights with fewer
        rows than there are processes, have the address 0.
        """
        for group, weights in zip(self.optimizer.param_groups, self._groups or (), strict=False):
            group["params"] = weights
        return super().create_scheduler(*args, **kwargs)


def reshard(model: nn.Module) -> None:
    """Free the whole weights that forwards without gradients leave: of the head, and of what is in no other unit."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextlib.contextmanager
def on_shards(model: nn.Module) -> Iterator[bool]:
    """Inside and afterwards all weights are shards, until a forward inside gathers some. Yields whether there are any.

    What is gathered inside is freed at the end.
    """
    if first_shard(model) is None:
        yield is_partitioned(model)  # by ZeRO-3, and each layer is freed when it returns
        return
    reshard(model)
    try:
        yield True
    finally:
        reshard(model)
