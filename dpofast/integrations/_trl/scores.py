"""Log-probs and statistics of a fused model's labels, as trl's (rows, width - 1) grids of next-token values.

Packed where the model and the call can be: what rows begin with alike once, without padding. Padded elsewhere: the
backbone runs trl's rows as they are. Either way only the positions that predict a label reach the LM head.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from dpofast.common.constants import IGNORE_INDEX
from dpofast.head.linear_logprobs import linear_logprobs
from dpofast.head.options import LogprobOutput
from dpofast.integrations._trl.images import unpackable_arguments, with_images
from dpofast.integrations._trl.rows import PackedRows, PaddedRows
from dpofast.model.attach import PackedForward
from dpofast.model.forward import packed_backbone
from dpofast.model.lm_head import logit_options, logprob_head
from dpofast.model.parts import whole_backbone
from dpofast.model.recurrent.follow import one_kind_each, shares_rows
from dpofast.model.rope import depends_on_length, table_lengths

# Inputs other than the tokens that do not affect the result.
_NEUTRAL = {"use_cache", "return_dict", "logits_to_keep", "output_hidden_states"}
# alpha / sqrt(width * D) for every token of the padded rows: a packed row is wider, and rows share its positions.
NOISE = "NEFTune scales and draws its noise for the rows of a padded batch"


@dataclass(frozen=True)
class FusedOptions:
    """How a fused model computes its log-probs.

    Attributes:
        level: "forward" (packed) or "kernel" (padded backbone).
        on_unpackable: "kernel": rows that cannot be packed go through the padded backbone, with a warning; or "raise".
        temperature: divides the logits.
        stats: per-token statistics beside the log-probs.
        max_logits_bytes: as in linear_logprobs, None for its default.
        calls: how many forwards ran packed, how many padded and why; shared with report().
    """

    level: str
    on_unpackable: str
    temperature: float = 1.0
    stats: tuple[str, ...] = ()
    max_logits_bytes: int | None = None
    calls: Counter[str] = field(default_factory=Counter, compare=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedOptions:
        """Itself: copies of a model count in the same counter."""
        return self

    def run_padded(self, name: str, reason: str) -> None:
        """Allow the model of this name its padded backbone for this reason, with a warning.

        Raises:
            ValueError: on_unpackable is "raise".
        """
        if self.on_unpackable == "raise":
            raise ValueError(
                f"{name}: cannot run packed: {reason}. Keep trl's padded forward with dpofast's head instead: "
                'patch_trl(on_unpackable="kernel") or patch_trl(level="kernel")'
            )
        warnings.warn(
            f"{name} keeps trl's padded forward, with dpofast's head: {reason}. "
            'patch_trl(on_unpackable="raise") refuses that',
            stacklevel=2,
        )


class Scores(NamedTuple):
    """What a fused call computes.

    Attributes:
        grids: (rows, width - 1) each, 0 where nothing is labelled: "log_probs", float32, nats, and statistics by trl's
            names.
        aux_loss: the balancing loss of a mixture of experts, where it was asked for; else None.
    """

    grids: dict[str, Tensor]
    aux_loss: Tensor | None


@dataclass(frozen=True, eq=False)
class _Call:
    """A fused model's call.

    Attributes:
        args, kwargs: the model's inputs, without None and output_router_logits.
        labels: (rows, width) int64, IGNORE_INDEX where a token is not scored.
        rows: the collator's description of the padded rows, or None.
        stats: statistics to compute.
        balance: whether the balancing loss of a mixture of experts is asked for.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    labels: Tensor
    rows: PaddedRows | None
    stats: tuple[str, ...]
    balance: bool

    @property
    def input_ids(self) -> Any:
        """(rows, width), or None."""
        return self.args[0] if self.args else self.kwargs.get("input_ids")

    @property
    def router_option(self) -> dict[str, bool]:
        """What makes the backbone return router logits."""
        return {"output_router_logits": True} if self.balance else {}


def score_labels(
    model: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    labels: Tensor,
    rows: PaddedRows | None,
    stats: tuple[str, ...],
) -> Scores:
    """Scores of labels (rows, width) for a fused model called with args and kwargs; rows as the collator read them.

    Raises:
        ValueError: inputs that cannot be packed, where the model's options do not allow the padded backbone.
    """
    options: FusedOptions = model._dpofast_fused
    inputs = {name: value for name, value in kwargs.items() if value is not None}
    default = getattr(model.config.get_text_config(), "output_router_logits", False)
    balance = bool(inputs.pop("output_router_logits", default))
    call = _Call(args, inputs, labels, rows, stats, balance)
    reason = _unpackable(model, call)
    if reason is None:
        rows = with_images(model, _rows_of(call), call.kwargs)
        longest = max(map(len, rows.ids))
        kinds: Callable[[Tensor], Tensor] | None = None
        if not shares_rows(model):
            kinds = one_kind_each
        elif depends_on_length(model, longest):
            kinds = partial(table_lengths, model)
        packed = rows.packed(call.input_ids.device, every_token=balance, kinds=kinds)
        if packed is not None:
            _count(options, rows, packed)
            return _score_packed(model, call, packed, rows.shape)
        reason = "no row has a label"
        call = replace(call, rows=rows)
    options.calls[_padded(reason)] += 1
    return _score_padded(model, call)


def _padded(reason: str) -> str:
    """What FusedOptions.calls counts padded forwards under."""
    return f"padded: {reason}"


def _rows_of(call: _Call) -> PaddedRows:
    """The collator's rows, or those read from the inputs where trl has truncated them since."""
    if call.rows is not None and call.rows.shape == tuple(call.input_ids.shape):
        return call.rows
    return PaddedRows.from_tensors(call.input_ids, call.kwargs.get("attention_mask"), call.labels != IGNORE_INDEX)


def _count(options: FusedOptions, rows: PaddedRows, packed: PackedRows) -> None:
    options.calls["packed"] += 1
    unshared = rows.unshared_pairs()
    empty = sum(not len(labels) for labels in rows.labels)
    if unshared:
        options.calls["pairs packed without sharing, because their prompts differ"] += unshared
    if empty:
        options.calls["rows without labels, left out"] += empty
    if packed.batch.media is not None:
        options.calls["images of padded rows"] += sum(len(one.images) for one in rows.media or () if one is not None)
        options.calls["images that the vision tower saw for them"] += packed.batch.media.num_seen()


def _unpackable(model: Any, call: _Call) -> str | None:
    """Why this call runs the padded backbone, or None where it is packed."""
    options: FusedOptions = model._dpofast_fused
    if not isinstance(model, PackedForward):
        return 'level "kernel" was asked for' if options.level == "kernel" else "the model cannot be packed"
    tokens = call.input_ids
    reason = unpackable_arguments(model, call.kwargs.keys() - _NEUTRAL - {"input_ids", "attention_mask"})
    if reason is None and (len(call.args) > 1 or tokens is None or tokens.shape != call.labels.shape):
        reason = "it was given inputs of another shape than the labels (prompt-learning adapters)"
    if reason is None and _draws_noise(model):
        reason = NOISE
    if reason is None:
        return None
    if not options.calls[_padded(reason)]:
        options.run_padded(type(model).__name__, reason)
    return reason


def _draws_noise(model: Any) -> bool:
    """Whether transformers' NEFTune is on and active."""
    return model.training and hasattr(model.get_input_embeddings(), "neftune_noise_alpha")


def is_reference_pass(model: Any) -> bool:
    """Whether this is trl's reference pass through a policy's adapters, of which only the log-probs are read.

    trl gives a reference model of its own no statistics to compute; a PEFT policy is its own reference with its adapter
    off, or with the adapter named "ref".
    """
    if torch.is_grad_enabled() or "peft" not in sys.modules:
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    layer = next((module for module in model.modules() if isinstance(module, BaseTunerLayer)), None)
    return layer is not None and (layer.disable_adapters or "ref" in layer.active_adapters)


def _score_packed(model: Any, call: _Call, packed: PackedRows, shape: tuple[int, int]) -> Scores:
    """The backbone over the packed row; the balancing loss over every token of the padded rows."""
    output = packed_backbone(model, packed.batch, appended=int(call.balance), **call.router_option)
    hidden = output.last_hidden_state[0].index_select(0, packed.logit_rows)
    aux_loss = None
    if call.balance:
        logits = tuple(layer.index_select(0, packed.attended) for layer in output.router_logits)
        aux_loss = _balancing_loss(model, logits, None)
    scores = _head_scores(model, hidden, packed.targets, call.stats)
    grids = {
        name: _grid(value.index_select(0, packed.source.to(value.device)), packed.cells, shape)
        for name, value in _per_token(scores)
    }
    return Scores(grids, aux_loss)


def _score_padded(model: Any, call: _Call) -> Scores:
    """The backbone over the padded rows; positions that predict a label reach the LM head."""
    inputs = {name: value for name, value in call.kwargs.items() if name not in _NEUTRAL}
    output = whole_backbone(model)(*call.args, **inputs, use_cache=False, **call.router_option)
    labels, (height, width) = call.labels, call.labels.shape
    if call.rows is None or call.rows.shape != (height, width):
        # waits for the device, as trl's own boolean indexing does
        cells = (labels[:, 1:] != IGNORE_INDEX).flatten().nonzero().squeeze(1)
    else:
        cells = torch.from_numpy(call.rows.cells()).to(labels.device)
    row, column = cells // (width - 1), cells % (width - 1)
    scores = _head_scores(model, output.last_hidden_state[row, column], labels[row, column + 1], call.stats)
    grids = {name: _grid(value, cells, (height, width)) for name, value in _per_token(scores)}
    aux_loss = None
    if call.balance:
        aux_loss = _balancing_loss(model, output.router_logits, inputs.get("attention_mask"))
    return Scores(grids, aux_loss)


def _head_scores(model: Any, hidden: Tensor, targets: Tensor, stats: tuple[str, ...]) -> LogprobOutput:
    """Inside the head's call, where a weight that FSDP2 or ZeRO-3 sharded is whole."""
    options: FusedOptions = model._dpofast_fused

    def compute(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> LogprobOutput:
        return linear_logprobs(
            hidden.to(weight.device, weight.dtype),
            weight,
            targets.to(weight.device),
            bias=bias,
            temperature=options.temperature,
            stats=stats,
            max_logits_bytes=options.max_logits_bytes,
            **logit_options(model.config.get_text_config()),
        )

    return LogprobOutput(*logprob_head(model)(hidden, compute=compute))


def _per_token(scores: LogprobOutput) -> list[tuple[str, Tensor]]:
    """Log-probs and the statistics that were computed, (M,) each, by trl's names."""
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
    """The load-balancing loss over the router logits of every layer: Mixtral's, as trl computes it for each family."""
    config = model.config.get_text_config()
    experts = getattr(model, "num_experts", None) or getattr(config, "num_experts", None)
    chosen = getattr(model, "num_experts_per_tok", None) or getattr(config, "num_experts_per_tok", None)
    if experts is None or chosen is None:
        raise ValueError(
            f"{type(model).__name__}: expected a mixture of experts with num_experts and num_experts_per_tok, as "
            "output_router_logits asks for its balancing loss: set router_aux_loss_coef=0 in the model's config"
        )
    return load_balancing_loss_func(router_logits, experts, chosen, attention_mask)
