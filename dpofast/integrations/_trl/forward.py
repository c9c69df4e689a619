"""A model's forward with fused_lm_head=True, as trl 1.15 and newer call it, on dpofast's engine.

Packed: the batch is unpadded, prompts are shared, only positions that predict a label reach the LM head, and the values
are put back where trl reads them. Padded (level "kernel"): the backbone runs as trl's does, and only its labelled
positions reach the LM head. The forward belongs to a class made for the model, so deepcopy and pickle keep it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpofast.common.constants import IGNORE_INDEX
from dpofast.common.eval_mode import eval_mode
from dpofast.integrations._trl.rows import ROWS_KEY, PaddedRows
from dpofast.integrations._trl.scores import FusedOptions, is_reference_pass, score_labels
from dpofast.model.attach import PackedForward, attach_logprob_head, detach_logprob_head, packed_class
from dpofast.model.checks.parity import PARITY_TOLERANCE
from dpofast.model.lm_head import logprob_head, restore_head
from dpofast.model.parts import text_token_ids
from dpofast.model.wrappers import exchange_class, input_device, take_off_autocast
from dpofast.reference import padded_logprobs

LEVELS = ("forward", "kernel")
_PARITY_TOKENS = 8


@dataclass(frozen=True)
class Scoring:
    """What trl's trainer before 1.15 knows and its models need, while it calls them for their logits.

    Attributes:
        labelled: makes the (rows, width) mask of labelled tokens from input_ids and attention_mask.
        policy: the model of which statistics are read; of others only the log-probs are.
        rows: as the collator read them, where it did.
        always: statistics that are read of every model.
    """

    labelled: Callable[[Tensor, Tensor | None], Tensor]
    policy: Any
    rows: PaddedRows | None = None
    always: tuple[str, ...] = ()


# Set while such a trainer computes its loss: every fused model that is called then returns ScoredLogits as its logits.
SCORING: ContextVar[Scoring | None] = ContextVar("dpofast_scoring", default=None)


def fuse(model: Any, options: FusedOptions) -> str | None:
    """Give the model a forward that takes fused_lm_head=True. Returns why it runs padded, or None where it runs packed.

    Raises:
        ValueError: a model that cannot run packed (level "forward", on_unpackable "raise"), one without a plain head,
            or one whose plain logits the padded path does not reproduce, by name and with the reason.
    """
    take_off_autocast(model)  # of an earlier training: trl's trainer puts on its own
    name = type(model).__name__
    unfuse(model)
    detach_logprob_head(model)  # one that was attached by hand may run padded
    reason = None if options.level == "forward" else 'level "kernel" was asked for'
    if reason is None:
        try:
            attach_logprob_head(model)
        except ValueError as error:
            reason = str(error).partition(". ")[0]  # what follows is advice for other callers
            reason = reason.removeprefix(name).removeprefix(" cannot run packed").removeprefix(": ")
    logprob_head(model)  # before anything wraps or shards it
    plain_class: Any = type(model)
    exchange_class(model, _fused_class(plain_class))
    if reason is not None:
        try:
            _check_padded_parity(model)
            if options.level == "forward":
                options.run_padded(name, reason)
        except ValueError:
            unfuse(model)
            raise
    model._dpofast_fused = options
    return reason


def unfuse(model: Any) -> None:
    """Undo fuse: restore the model's own class and attention."""
    if not isinstance(model, FusedForward):
        return
    exchange_class(model, type(model)._fused_over)
    model.__dict__.pop("_dpofast_fused", None)  # not there where fuse failed
    detach_logprob_head(model)
    restore_head(model)  # which padded models have as well


class FusedForward:
    """Base of the classes that _fused_class makes: models whose forward takes fused_lm_head=True."""

    _fused_over: type
    _dpofast_fused: FusedOptions

    def __reduce_ex__(self, protocol: Any) -> Any:
        """The class is made at run time, so pickle and deepcopy are told how to make it again."""
        if isinstance(self, PackedForward):
            return _rebuilt, (self._unpacked_class, True), self.__dict__
        return _rebuilt, (self._fused_over, False), self.__dict__


def _rebuilt(plain: Any, packed: bool) -> Any:
    cls: Any = _fused_class(packed_class(plain, False) if packed else plain)
    return cls.__new__(cls)


@functools.cache
def _fused_class(cls: Any) -> type:
    """A subclass of the model's class, of the same name, whose forward takes fused_lm_head=True."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        rows = kwargs.pop(ROWS_KEY, None)
        if kwargs.pop("fused_lm_head", False):
            return _fused_output(self, rows, args, kwargs)
        scoring = SCORING.get()
        if scoring is not None:
            return _scored_output(self, rows, args, kwargs, scoring)
        return cls.forward(self, *args, **kwargs)

    # generate() and Trainer read the parameters of forward; functools.wraps would also leave a link to the class's own
    # forward, which accelerate follows when it unwraps a model
    forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]
    forward.__doc__ = cls.forward.__doc__
    members = {
        "forward": forward,
        "_fused_over": cls,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
    }
    return type(cls.__name__, (FusedForward, cls), members)


def _fused_output(model: Any, rows: PaddedRows | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """trl's FusedCausalLMOutput for labels (rows, width)."""
    from trl.trainer.utils import FusedCausalLMOutput

    labels = kwargs.pop("labels", None)
    num_items = kwargs.pop("num_items_in_batch", None)
    if kwargs.pop("shift_labels", None) is not None or labels is None:
        raise ValueError(
            f"{type(model).__name__}(fused_lm_head=True): expected labels, got none or shift_labels: context and "
            "sequence parallelism are not supported under patch_trl()"
        )
    stats = () if is_reference_pass(model) else model._dpofast_fused.stats
    grids, aux_loss = score_labels(model, args, kwargs, labels, rows, stats)
    log_probs = grids["log_probs"]
    mask = (labels[:, 1:] != IGNORE_INDEX).to(log_probs.device)
    loss = -log_probs.sum() / (mask.sum().clamp(min=1) if num_items is None else num_items)
    if aux_loss is not None:
        loss = loss + getattr(model.config.get_text_config(), "router_aux_loss_coef", 0.0) * aux_loss
    return FusedCausalLMOutput(loss=loss, label_mask=mask, aux_loss=aux_loss, **grids)


def _scored_output(
    model: Any, rows: PaddedRows | None, args: tuple[Any, ...], kwargs: dict[str, Any], scoring: Scoring
) -> Any:
    """A ScoredOutput for the labels of scoring: what trl before 1.15 reads from logits."""
    from dpofast.integrations._trl.logits import scored_output

    input_ids = args[0] if args else kwargs["input_ids"]
    labels = input_ids.masked_fill(~scoring.labelled(input_ids, kwargs.get("attention_mask")), IGNORE_INDEX)
    stats = () if model is not scoring.policy or is_reference_pass(model) else model._dpofast_fused.stats
    rows = scoring.rows if rows is None else rows
    grids, aux_loss = score_labels(model, args, kwargs, labels, rows, scoring.always + stats)
    vocab = model.get_output_embeddings().weight.shape[0]
    return scored_output(grids, labels, aux_loss, vocab, kwargs.get("logits_to_keep"))


@torch.no_grad()
def _check_padded_parity(model: Any) -> None:
    """Compare the padded path's log-probs with those of the model's own logits, on a few random ids.

    Raises:
        ValueError: log-probs that differ: the model scales its logits in an unknown way.
    """
    generator, text = torch.Generator().manual_seed(0), text_token_ids(model)
    draws = torch.randint(0, len(text), (1, _PARITY_TOKENS), generator=generator)
    ids = text[draws].to(input_device(model))
    ones = torch.ones_like(ids)
    completion = ones.clone()
    completion[:, 0] = 0
    model._dpofast_fused = FusedOptions("kernel", "raise")  # whose temperature is 1
    with eval_mode(model):
        scores = score_labels(model, (), {"input_ids": ids, "attention_mask": ones}, ids, None, ())
        theirs = padded_logprobs(model, ids, ones, completion, use_cache=False)
    difference = float((scores.grids["log_probs"][0].double() - theirs.double()).abs().max())
    if not difference <= PARITY_TOLERANCE[model.dtype]:
        raise ValueError(
            f"{type(model).__name__}: log-probs from its hidden states and from its logits differ by {difference:.2g} "
            "nats: it scales its logits in a way that dpofast does not know: call unpatch_trl() for this model"
        )
