"""Which model gives the reference log-probs of a run."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

ADAPTER = "reference"
MOVING_OPTIONS = ("ref_model_mixup_alpha", "ref_model_sync_steps")


class ReferenceModel:
    """The reference of a run: one of these, fixed when the trainer is built.

    A model of its own; the trained model without its adapter, where a peft_config was given; a frozen copy of the
    adapter that a PEFT model came with, named "reference", beside the trained one; a frozen copy of the whole model;
    or, where all log-probs are computed before training, the trained model itself as long as it is untouched.

    Args:
        policy: the model that will train.
        ref_model: a model of its own, or None.
        new_adapter: the policy's adapter is new, so that its base model is the reference.
        live: it is asked while the policy trains.
    """

    def __init__(self, policy: Any, ref_model: Any, *, new_adapter: bool, live: bool) -> None:
        """Copy what must be kept from training."""
        self.model = ref_model
        self.adapter = self.released = False
        self.without_adapter = ref_model is None and new_adapter
        if ref_model is None and live and not new_adapter:
            if is_peft(policy):
                _copy_adapter(policy)
                self.adapter = True
            else:
                self.model = copy.deepcopy(policy)
        if self.model is not None:
            self.model.requires_grad_(False).eval()

    @property
    def is_policy(self) -> bool:
        """The trained model itself stands in, which holds until its first step."""
        return self.model is None and not (self.without_adapter or self.adapter or self.released)

    def release(self) -> None:
        """Drop a model of its own: every log-prob is known."""
        self.released = self.model is not None
        self.model = None

    @contextlib.contextmanager
    def of(self, policy: Any) -> Iterator[Any]:
        """Yield the model to call; inside, the policy may be without its adapter, or with the reference's."""
        if self.model is not None:
            yield self.model
        elif self.without_adapter:
            with unwrapped(policy).disable_adapter():
                yield policy
        elif self.adapter:
            trained = unwrapped(policy).active_adapter
            unwrapped(policy).set_adapter(ADAPTER, inference_mode=True)
            try:
                yield policy
            finally:
                unwrapped(policy).set_adapter(trained)
        else:
            yield policy


class MovingReference(TrainerCallback):
    """TR-DPO's soft update (arXiv 2404.09656, eq. 3): reference ← α·policy + (1 − α)·reference, every few steps."""

    def __init__(self, ref_model: nn.Module, alpha: float, steps: int) -> None:
        """ref_model is changed in place."""
        self.ref_model, self.alpha, self.steps = ref_model, alpha, steps

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Move the reference towards the policy."""
        if state.global_step % self.steps == 0:
            policy = unwrapped(model)
            for ours, theirs in zip(self.ref_model.parameters(), policy.parameters(), strict=True):
                ours.lerp_(theirs.to(ours.dtype), self.alpha)


@contextlib.contextmanager
def on_device(model: Any, device: torch.device) -> Iterator[None]:
    """Inside, the model is there, whole: FSDP and DeepSpeed take one that still waits on the CPU.

    Raises:
        ValueError: a model that DeepSpeed's ZeRO-3 has partitioned already.
    """
    parameters = list(model.parameters())
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        raise ValueError(
            "precompute_ref_log_probs: the model is partitioned by ZeRO-3 already, and nothing gathers it before "
            "training: load it before the DPOConfig that names the DeepSpeed file is made, or bring the columns "
            "ref_chosen_logps and ref_rejected_logps in the data"
        )
    home = parameters[0].device
    model.to(device)
    try:
        yield
    finally:
        model.to(home)


def is_peft(model: Any) -> bool:
    """A model with a PEFT adapter."""
    return hasattr(unwrapped(model), "disable_adapter")


def unwrapped(model: Any) -> Any:
    """The model inside DistributedDataParallel, or the model itself."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def _copy_adapter(model: Any) -> None:
    """Add a frozen copy of the active adapter."""
    trained = model.active_adapter
    model.add_adapter(ADAPTER, model.peft_config[trained])
    weights = dict(model.named_parameters())
    for name, parameter in weights.items():
        if f".{trained}." in name:
            copied = weights[name.replace(f".{trained}.", f".{ADAPTER}.")]
            copied.data.copy_(parameter.data)
            copied.requires_grad_(False)
    model.set_adapter(trained)
