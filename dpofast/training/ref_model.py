"""The reference model of a run: which model it is, its log-probs before training, and its updates in training."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import TrainerCallback

from dpofast.checkpointing.zero import is_partitioned
from dpofast.common.ranks import Ranks
from dpofast.data.token_rows import has_reference
from dpofast.model.adapters import Wrapped, few, is_peft, probe_logps, same_weights, trained_outside
from dpofast.model.parallel.tensor import deep_copy, tensor_parallel_size
from dpofast.model.parts import base_causal_lm
from dpofast.model.wrappers import is_dispatched
from dpofast.scoring.lockstep import Lockstep
from dpofast.scoring.ref_cache import CACHE_FOLDER, add_reference_columns
from dpofast.scoring.score import Forward
from dpofast.training.config import DPOConfig
from dpofast.training.parallel.early import on_shards
from dpofast.training.parallel.fsdp import cast_parameters

ADAPTER = "dpofast_reference"  # nobody else's: a trainer replaces the copy that an earlier one left in the model
MOVING_OPTIONS = ("ref_model_mixup_alpha", "ref_model_sync_steps")


class ReferenceModel:
    """The model that gives the reference log-probs of a run, chosen once when the trainer is built.

    It is, in this order: the ref_model that was passed; the policy without its adapter, where the trainer added one
    (peft_config) that left the base weights as they were; in a live reference a frozen copy, of the adapter that a PEFT
    model came with (named "dpofast_reference", beside the trained one) or else of the whole policy; otherwise the
    policy itself, before its first step.

    Args:
        policy: the model that will train.
        ref_model: a separate reference, or None.
        wrapped: what a new adapter did to the policy; None for a policy that came as it is.
        live: reference log-probs are computed in the training step, and not all of them before training.

    Raises:
        ValueError: a live reference for a policy of which more than the adapter is trained, that has not one active
            adapter, or whose adapter cannot be copied; a live one of a model that its new adapter has changed.
    """

    def __init__(self, policy: Any, ref_model: Any, *, wrapped: Wrapped | None, live: bool) -> None:
        """Copy and freeze what training would change."""
        self.model = ref_model
        self.adapter = self.released = False
        self.without_adapter = ref_model is None and wrapped is not None and wrapped.base
        self._is_lost = ref_model is None and wrapped is not None and not (wrapped.base or wrapped.whole)
        self._outside = trained_outside(policy) if ref_model is None and is_peft(policy) else []
        if ref_model is None and live:
            self._prepare_live(policy)
        if self.model is not None:
            self.model.requires_grad_(False).eval()

    def _prepare_live(self, policy: Any) -> None:
        self._check_known()
        if self._outside:
            raise ValueError(
                f"precompute_ref_log_probs: expected True, as {few(self._outside)} would train outside of the "
                "adapter, and the reference in the step, which is the same model, would train along; or freeze them, "
                "or give a ref_model"
            )
        if self.without_adapter:
            return
        if is_peft(policy):
            _copy_adapter(policy)
            self.adapter = True
            with self.of(policy) as reference:
                copied = probe_logps(reference)
            if not same_weights(copied, probe_logps(policy)):
                raise ValueError(
                    f"precompute_ref_log_probs: expected True, as the adapter ({_kind(policy)}) cannot be copied for a "
                    "reference in the step: its copy gives other log-probs; or give a ref_model"
                )
        elif is_partitioned(policy):
            raise ValueError(
                "precompute_ref_log_probs: expected True, as ZeRO-3 partitioned the model when it was loaded, and it "
                "cannot be copied for a reference in the step; or give it once more as ref_model"
            )
        else:
            self.model = deep_copy(policy)

    def _check_known(self) -> None:
        if self._is_lost:
            raise ValueError(
                "peft_config: the new adapter rewrote the base weights, so the model before training is neither the "
                "model with the adapter nor the one without: give that model as ref_model (load it once more), or "
                "bring the columns ref_chosen_logps and ref_rejected_logps in the data"
            )

    @property
    def is_policy(self) -> bool:
        """Whether the reference ends with the policy's first step: it is the policy, or shares weights that train."""
        apart = (self.without_adapter or self.adapter) and not self._outside
        return self.model is None and not (apart or self.released)

    def release(self) -> None:
        """Free a separate reference model after all log-probs were computed."""
        self.released = self.model is not None
        self.model = None

    @contextlib.contextmanager
    def of(self, policy: Any) -> Iterator[Any]:
        """Yields the model to call; inside, the policy's adapter may be disabled or replaced by the reference's.

        Raises:
            ValueError: a new adapter has changed the model, and nothing gives its former log-probs.
        """
        self._check_known()
        if self.model is not None:
            yield self.model
        elif self.without_adapter:
            with unwrapped(policy).disable_adapter():
                yield policy
        elif self.adapter:
            with _kept_adapters(unwrapped(policy)) as model:
                model.base_model.set_adapter(ADAPTER, inference_mode=True)
                yield policy
        else:
            yield policy


def make_reference(
    policy: Any,
    ref_model: Any,
    args: DPOConfig,
    dtype: torch.dtype | None,
    *,
    wrapped: Wrapped | None,
    sharded: bool = False,
) -> ReferenceModel:
    """Returns the reference of a run, on its device.

    Args:
        policy: the model that will train.
        ref_model: a separate reference, or None.
        args: the trainer's.
        dtype: of forward_dtype(): a separate reference gets parameters like a sharded policy's.
        wrapped: as ReferenceModel's.
        sharded: FSDP2 or ZeRO-3 will shard a separate reference, which stays where it is until then.

    Raises:
        ValueError: sync_ref_model for a reference that is the base model under the adapter, or has other parameters
            than the policy; what ReferenceModel refuses.
    """
    live = args.preference_loss().needs_reference and not args.precompute_ref_log_probs
    reference = ReferenceModel(policy, ref_model, wrapped=wrapped, live=live)
    if reference.model is not None:
        divided = sharded or tensor_parallel_size(reference.model) > 1
        if not (divided or is_dispatched(base_causal_lm(reference.model))):
            reference.model.to(args.device)
        if args.sync_ref_model:
            _check_same_parameters(policy, reference.model)
        cast_parameters(reference.model, dtype)
    elif args.sync_ref_model:
        raise ValueError(
            "sync_ref_model: the reference is the base model under the adapter, which does not move; train all "
            "weights, or give a ref_model"
        )
    return reference


def with_reference_columns(
    dataset: Dataset,
    name: str,
    reference: ReferenceModel,
    policy: Any,
    args: DPOConfig,
    *,
    forward: Forward,
    dtype: torch.dtype | None,
    ranks: Ranks,
) -> Dataset:
    """Returns a tokenized dataset with reference log-probs (nats), read from the cache where they are in it.

    Args:
        dataset: tokens; returned as it is where it has the columns already.
        name: of the dataset, for messages.
        reference: the reference of the run.
        policy: the model that will train.
        args: the trainer's.
        forward: how the forwards run.
        dtype: of forward_dtype(), in which a sharded reference's weights are gathered.
        ranks: the processes that share the pass.
    """
    if has_reference(dataset.column_names):
        return dataset
    shown = not args.disable_tqdm and ranks.process == 0
    with reference.of(policy) as model, on_shards(model) as sharded, contextlib.ExitStack() as stack:
        if sharded:
            forward = replace(forward, lockstep=Lockstep(ranks), gathered_dtype=dtype)
        else:
            stack.enter_context(on_device(model, args.device))
        return add_reference_columns(
            dataset,
            model,
            forward,
            cache_dir=args.ref_cache_dir or os.path.join(args.output_dir, CACHE_FOLDER),
            ld_alpha=args.ld_alpha,
            description=f"reference log-probs, {name}" if shown else None,
            ranks=ranks,
        )


def reference_is_gone(name: str) -> ValueError:
    """The refusal of a dataset that comes when nothing gives its reference log-probs any more."""
    return ValueError(
        f"Cannot compute reference log-probs for a dataset passed to evaluate() or predict() now ({name}): they need "
        "the reference model, which is gone with precompute_ref_log_probs=True: a ref_model since the constructor has "
        "the log-probs of its datasets, the policy as it was once training has begun: pass the dataset to the "
        "constructor, or set it to False"
    )


class MovingReference(TrainerCallback):
    """TR-DPO's soft update (arXiv 2404.09656, eq. 3): reference ← α·policy + (1 − α)·reference, every few steps.

    Args:
        ref_model: changed in place.
        alpha: the policy's share, in (0, 1].
        steps: optimizer steps between two updates.
    """

    def __init__(self, ref_model: nn.Module, alpha: float, steps: int) -> None:
        """Keep the three."""
        self.ref_model, self.alpha, self.steps = ref_model, alpha, steps

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Move the reference towards the policy."""
        if state.global_step % self.steps == 0:
            policy = unwrapped(model)
            for ours, theirs in zip(self.ref_model.parameters(), policy.parameters(), strict=True):
                ours.lerp_(theirs.to(ours.dtype), self.alpha)


def _check_same_parameters(policy: nn.Module, ref_model: nn.Module) -> None:
    named = [[(name, tuple(p.shape)) for name, p in each.named_parameters()] for each in (policy, ref_model)]
    differing = next((pair for pair in zip_longest(*named) if pair[0] != pair[1]), None)
    if differing is not None:
        ours, theirs = ("no further parameter" if each is None else f"{each[0]} {each[1]}" for each in differing)
        raise ValueError(
            "sync_ref_model: expected a ref_model with the policy's parameters, to be moved towards them, got "
            f"{theirs} where the policy has {ours}: give a model of the same structure (with an adapter, the same "
            "adapter), or leave sync_ref_model off"
        )


@contextlib.contextmanager
def on_device(model: Any, device: torch.device) -> Iterator[None]:
    """Inside, the whole model is on the device, or where accelerate dispatched it.

    DeepSpeed's ZeRO-1 and ZeRO-2 otherwise leave it on the CPU until training begins.
    """
    if is_dispatched(base_causal_lm(model)) or tensor_parallel_size(model) > 1:
        yield
        return
    home = next(model.parameters()).device
    model.to(device)
    try:
        yield
    finally:
        model.to(home)


def unwrapped(model: Any) -> Any:
    """Returns the model inside DistributedDataParallel, or the model itself."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


@contextlib.contextmanager
def _kept_adapters(model: Any) -> Iterator[Any]:
    """Inside, adapters may be added, deleted and activated; afterwards the same are active, the same weights train.

    The tuner (base_model) is asked and told: PeftModel's own active_adapter knows nothing of what was set there.
    """
    active = list(model.active_adapters)
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    try:
        yield model
    finally:
        model.base_model.set_adapter(active)
        for parameter in model.parameters():
            if parameter.requires_grad != (id(parameter) in trained):
                parameter.requires_grad_(id(parameter) in trained)


def _copy_adapter(model: Any) -> None:
    """Add a frozen copy of the active adapter, in the place of an earlier trainer's.

    Raises:
        ValueError: several adapters are active, or none, or an earlier trainer's copy.
    """
    active = list(model.active_adapters)
    if len(active) != 1 or active == [ADAPTER]:
        raise ValueError(
            f"precompute_ref_log_probs: expected True, or one active adapter of your own to copy for a reference in "
            f"the step, got {active}: activate one (model.set_adapter), or give a ref_model"
        )
    (trained,) = active
    config = copy.deepcopy(model.peft_config[trained])
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True  # PiSSA and its like would rewrite the base weights once more
    with _kept_adapters(model):
        if ADAPTER in model.peft_config:
            model.base_model.delete_adapter(ADAPTER)
        model.add_adapter(ADAPTER, config)
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for name, tensor in tensors.items():
            path = name.split(".")
            if trained in path:
                copied = tensors[".".join(ADAPTER if part == trained else part for part in path)]
                copied.data.copy_(tensor.data)


def _kind(model: Any) -> str:
    return type(model.peft_config[model.active_adapters[0]]).__name__
