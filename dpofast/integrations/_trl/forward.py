"""A model's forward with fused_lm_head=True, as trl 1.15 and newer call it, on dpofast's engine.

Packed: the batch is unpadded, prompts are shared, only positions that predict a label reach the LM head, and the values
are put back where trl reads them. Padded (level "kernel"): the backbone runs as trl's does, and only its labelled
positions reach the LM head. The forward belongs to a class made for the model, so deepcopy and pickle keep it.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dpofast.common.constants import IGNORE_INDEX
from dpofast.head.linear_logprobs import linear_logprobs
from dpofast.head.options import LogprobOutput
from dpofast.integrations._trl.rows import ROWS_KEY, PackedRows, PaddedRows
from dpofast.model.attach import attach_logprob_head, detach_logprob_head, packed_class
from dpofast.model.forward import backbone_of, packed_backbone
from dpofast.model.lm_head import logit_options
from dpofast.model.support import PARITY_TOLERANCE
from dpofast.reference import padded_logprobs

LEVELS = ("forward", "kernel")
# What a model may be given beside its tokens without changing what is computed.
_NEUTRAL = {"use_cache", "return_dict", "logits_to_keep", "output_hidden_states"}
_PARITY_TOKENS = 8


@dataclass(frozen=True)
class FusedOptions:
    """How a patched model computes: level, what happens where it cannot pack, and what trl asked for.

    Attributes:
        level: "forward" (packed) or "kernel" (padded backbone).
        on_unpackable: "raise", or "kernel": rows that cannot be packed go through the padded backbone.
        temperature: divides the logits.
        stats: per-token statistics beside the log-probs.
        max_logits_bytes: room for logits, None for the engine's default.
        calls: how many forwards went which way, shared with report().
    """

    level: str
    on_unpackable: str
    temperature: float = 1.0
    stats: tuple[str, ...] = ()
    max_logits_bytes: int | None = None
    calls: Counter[str] = field(default_factory=Counter, compare=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedOptions:
        """Immutable but for the shared counter, so a copied model keeps the same object."""
        return self


@dataclass(frozen=True)
class Scoring:
    """What trl's trainer before 1.15 knows while it calls models for their logits, and a model does not.

    Attributes:
        labelled: from input_ids and attention_mask (rows, width), the mask of labelled tokens.
        policy: the model whose statistics are read; of others only the log-probs are.
        rows: the collator's, where it made them.
        always: statistics that are read of every model.
    """

    labelled: Callable[[Tensor, Tensor | None], Tensor]
    policy: Any
    rows: PaddedRows | None = None
    always: tuple[str, ...] = ()


# Set while such a trainer computes its loss: every fused model that is called then answers with ScoredLogits.
SCORING: ContextVar[Scoring | None] = ContextVar("dpofast_scoring", default=None)


def fuse(model: Any, options: FusedOptions) -> str | None:
    """Give the model the fused forward of options; returns why it runs padded, or None where it runs packed.

    Raises:
        ValueError: a model that cannot run packed (level "forward", on_unpackable "raise"), or whose plain logits the
            padded path does not reproduce, by name and with the reason.
    """
    unfuse(model)
    detach_logprob_head(model)  # one that was attached by hand may run padded
    reason = None if options.level == "forward" else 'level "kernel" was asked for'
    if reason is None:
        try:
            attach_logprob_head(model)
        except ValueError as error:
            reason = str(error).partition(". ")[0]  # what follows is advice for other callers
            if options.on_unpackable != "kernel":
                raise ValueError(
                    f"{reason}. Keep trl's padded forward with dpofast's head instead: "
                    'patch_trl(on_unpackable="kernel") or patch_trl(level="kernel")'
                ) from error
    plain_class: Any = type(model)
    model.__class__ = _fused_class(plain_class)
    if reason is not None:
        try:
            _check_padded_parity(model)
        except ValueError:
            unfuse(model)
            raise
    model._dpofast_fused = options
    return reason


def unfuse(model: Any) -> None:
    """Undo fuse: the model's own class and attention again."""
    if not isinstance(model, FusedForward):
        return
    model.__class__ = type(model)._fused_over
    model.__dict__.pop("_dpofast_fused", None)  # not there where fuse failed
    detach_logprob_head(model)


class FusedForward:
    """Marks a model class whose forward answers fused_lm_head=True."""

    _fused_over: type
    _dpofast_fused: FusedOptions

    def __reduce_ex__(self, protocol: Any) -> Any:
        """The class is made at run time, so pickle and deepcopy must be told how to get it again."""
        packed = getattr(self, "_unpacked_class", None)
        plain = type(self)._fused_over if packed is None else packed
        return _rebuilt, (plain, packed is not None), self.__dict__


def _rebuilt(plain: Any, packed: bool) -> Any:
    cls: Any = _fused_class(packed_class(plain, False) if packed else plain)
    return cls.__new__(cls)


@functools.cache
def _fused_class(cls: Any) -> type:
    """A subclass of the model's class, of the same name, whose forward is looked up through the type."""

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
    stats = () if _is_reference_pass(model) else model._dpofast_fused.stats
    grids, aux_loss = _scores(model, rows, args, kwargs, labels, stats)
    log_probs = grids["log_probs"]
    mask = (labels[:, 1:] != IGNORE_INDEX).to(log_probs.device)
    loss = -log_probs.sum() / (mask.sum().clamp(min=1) if num_items is None else num_items)
    if aux_loss is not None:
        loss = loss + getattr(model.config.get_text_config(), "router_aux_loss_coef", 0.0) * aux_loss
    return FusedCausalLMOutput(loss=loss, label_mask=mask, aux_loss=aux_loss, **grids)


def _scored_output(
    model: Any, rows: PaddedRows | None, args: tuple[Any, ...], kwargs: dict[str, Any], scoring: Scoring
) -> Any:
    """What trl before 1.15 reads of logits, for the labels that its trainer told."""
    from dpofast.integrations._trl.logits import scored_output

    input_ids = args[0] if args else kwargs["input_ids"]
    labels = input_ids.masked_fill(~scoring.labelled(input_ids, kwargs.get("attention_mask")), IGNORE_INDEX)
    stats = () if model is not scoring.policy or _is_reference_pass(model) else model._dpofast_fused.stats
    rows = scoring.rows if rows is None else rows
    grids, aux_loss = _scores(model, rows, args, kwargs, labels, scoring.always + stats)
    vocab = model.get_output_embeddings().weight.shape[0]
    return scored_output(grids, labels, aux_loss, vocab, kwargs.get("logits_to_keep"))


def _scores(
    model: Any,
    rows: PaddedRows | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    labels: Tensor,
    stats: tuple[str, ...],
) -> tuple[dict[str, Tensor], Tensor | None]:
    """(rows, width - 1) grids of log-probs and statistics by trl's names, and the balancing loss where asked for."""
    options: FusedOptions = model._dpofast_fused
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    default = getattr(model.config.get_text_config(), "output_router_logits", False)
    router = bool(kwargs.pop("output_router_logits", default))
    reason = _unpackable(model, args, kwargs, labels)
    if reason is None:
        input_ids = args[0] if args else kwargs["input_ids"]
        if rows is None or rows.shape != tuple(input_ids.shape):
            rows = PaddedRows.of(input_ids, kwargs.get("attention_mask"), labels != IGNORE_INDEX)
        packed = rows.packed(input_ids.device, every_token=router)
        if packed is not None:
            scores, aux_loss = _score_packed(model, packed, stats, options, router)
            _count(options, rows)
            return {
                name: _grid(value.index_select(0, packed.source.to(value.device)), packed.cells, rows.shape)
                for name, value in _per_token(scores)
            }, aux_loss
        reason = "no row has a label"
    options.calls[f"padded: {reason}"] += 1
    return _score_padded(model, rows, args, kwargs, labels, stats, options, router)


def _count(options: FusedOptions, rows: PaddedRows) -> None:
    options.calls["packed"] += 1
    unshared = rows.unshared_pairs()
    empty = sum(not len(labels) for labels in rows.labels)
    if unshared:
        options.calls["pairs packed without sharing, because their prompts differ"] += unshared
    if empty:
        options.calls["rows without labels, left out"] += empty


def _unpackable(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], labels: Tensor) -> str | None:
    """Why this call goes through the padded backbone, or None where it is packed."""
    options: FusedOptions = model._dpofast_fused
    if not hasattr(model, "_unpacked_class"):
        return 'level "kernel" was asked for' if options.level == "kernel" else "the model cannot be packed"
    given = kwargs.keys() - _NEUTRAL - {"input_ids", "attention_mask"}
    tokens = args[0] if args else kwargs.get("input_ids")
    if not given and len(args) <= 1 and tokens is not None and tokens.shape == labels.shape:
        return None
    what = ", ".join(sorted(given)) or "inputs of another shape than the labels"
    reason = f"it was given {what}"
    if options.on_unpackable != "kernel":
        raise ValueError(
            f"{type(model).__name__}: cannot run packed, {reason} (images, prompt-learning adapters): use "
            'patch_trl(on_unpackable="kernel") or patch_trl(level="kernel")'
        )
    return reason


def _is_reference_pass(model: Any) -> bool:
    """Whether this is trl's reference pass through a policy's adapters, of which only the log-probs are read.

    trl gives a reference model of its own no statistics to compute; a PEFT policy is its own reference with its adapter
    off, or with the adapter named "ref".
    """
    if torch.is_grad_enabled() or "peft" not in sys.modules:
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    layer = next((module for module in model.modules() if isinstance(module, BaseTunerLayer)), None)
    return layer is not None and (layer.disable_adapters or "ref" in layer.active_adapters)


def _score_packed(
    model: Any, packed: PackedRows, stats: tuple[str, ...], options: FusedOptions, router: bool
) -> tuple[LogprobOutput, Tensor | None]:
    """Log-probs and statistics of packed.targets (N,), and the balancing loss over every padded row's tokens."""
    output = packed_backbone(model, packed.batch, **({"output_router_logits": True} if router else {}))
    hidden = output.last_hidden_state[0].index_select(0, packed.logit_rows)
    aux_loss = None
    if router:
        logits = tuple(layer.index_select(0, packed.attended) for layer in output.router_logits)
        aux_loss = _balancing_loss(model, logits, None)
    return _head_scores(model, hidden, packed.targets, stats, options), aux_loss


def _score_padded(
    model: Any,
    rows: PaddedRows | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    labels: Tensor,
    stats: tuple[str, ...],
    options: FusedOptions,
    router: bool,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """(rows, width - 1) grids: the backbone on padded rows, the LM head on labelled positions alone."""
    kwargs = {name: value for name, value in kwargs.items() if name not in _NEUTRAL}
    output = backbone_of(model)(*args, **kwargs, use_cache=False, **({"output_router_logits": True} if router else {}))
    height, width = labels.shape
    if rows is None or rows.shape != (height, width):
        # waits for the device, as trl's own boolean indexing does
        at = (labels[:, 1:] != IGNORE_INDEX).flatten().nonzero().squeeze(1)
    else:
        at = torch.from_numpy(rows.cells()).to(labels.device)
    row, column = at // (width - 1), at % (width - 1)
    hidden = output.last_hidden_state[row, column]
    scores = _head_scores(model, hidden, labels[row, column + 1], stats, options)
    grids = {name: _grid(value, at, (height, width)) for name, value in _per_token(scores)}
    aux_loss = _balancing_loss(model, output.router_logits, kwargs.get("attention_mask")) if router else None
    return grids, aux_loss


def _head_scores(
    model: Any, hidden: Tensor, targets: Tensor, stats: tuple[str, ...], options: FusedOptions
) -> LogprobOutput:
    from trl.trainer import utils

    head = model.get_output_embeddings()
    weight, bias = head.weight, head.bias
    if isinstance(weight, DTensor):  # FSDP2: each rank has its own rows, so it needs the whole head
        weight, bias = weight.full_tensor(), None if bias is None else bias.full_tensor()
    # ZeRO-3 shards a head that is not called as a module; trl knows how to gather it.
    gathered = getattr(utils, "maybe_gather_lm_head_ctx", None)
    with gathered(weight, bias) if gathered else nullcontext():
        return linear_logprobs(
            hidden.to(weight.device),
            weight,
            targets.to(weight.device),
            bias=bias,
            temperature=options.temperature,
            stats=stats,
            max_logits_bytes=options.max_logits_bytes,
            **logit_options(model.config.get_text_config()),
        )


def _per_token(scores: LogprobOutput) -> list[tuple[str, Tensor]]:
    named = {
        "log_probs": scores.logps,
        "entropy": scores.entropy,
        "mean_logits": scores.mean_logits,
        "is_top1": scores.is_top1,
        "log_sum_sq_probs": scores.log_sum_sq_probs,
    }
    return [(name, value) for name, value in named.items() if value is not None]


def _grid(values: Tensor, cells: Tensor, shape: tuple[int, int]) -> Tensor:
    """(M,) values -> (rows, width - 1), zero where there is no label."""
    rows, width = shape[0], shape[1] - 1
    return values.new_zeros(rows * width).index_copy(0, cells.to(values.device), values).view(rows, width)


def _balancing_loss(model: Any, router_logits: tuple[Tensor, ...], attention_mask: Tensor | None) -> Tensor:
    """The family's own load-balancing loss over the router logits of every layer."""
    functions = sys.modules[type(model).__module__]
    config = model.config.get_text_config()
    experts = getattr(model, "num_experts", None) or getattr(config, "num_experts", None)
    chosen = getattr(model, "num_experts_per_tok", None) or getattr(config, "num_experts_per_tok", None)
    balance = getattr(functions, "load_balancing_loss_func", None)
    if balance is None or experts is None or chosen is None:
        raise ValueError(
            f"{type(model).__name__}: expected a mixture of experts with num_experts, num_experts_per_tok and a "
            "load_balancing_loss_func in its file, as output_router_logits asks for its balancing loss"
        )
    return balance(router_logits, experts, chosen, attention_mask)


@torch.no_grad()
def _check_padded_parity(model: Any) -> None:
    """The padded path against the model's own logits on random ids: an unknown scaling of the logits shows here."""
    name = type(model).__name__
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if type(head) is not torch.nn.Linear:
        raise ValueError(f"{name}: expected a plain nn.Linear head, got {type(head).__name__}")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, head.weight.shape[0], (1, _PARITY_TOKENS), generator=generator).to(head.weight.device)
    ones = torch.ones_like(ids)
    completion = ones.clone()
    completion[:, 0] = 0
    training = model.training
    model.eval()
    model._dpofast_fused = FusedOptions("kernel", "raise")
    try:
        ours = _scores(model, None, (), {"input_ids": ids, "attention_mask": ones}, ids, ())[0]["log_probs"][0]
        theirs = padded_logprobs(model, ids, ones, completion, use_cache=False)
    finally:
        model.train(training)
    difference = float((ours.double() - theirs.double()).abs().max())
    if not difference <= PARITY_TOLERANCE[model.dtype]:
        raise ValueError(
            f"{name}: log-probs from its hidden states and from its logits differ by {difference:.2g} nats: it scales "
            "its logits in a way that dpofast does not know"
        )
