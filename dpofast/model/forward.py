"""Runs a model's backbone over a packed batch: hidden states (N, D) at the positions that predict the N targets.

packed_hidden runs the one packed row of T positions; padded_hidden runs S padded rows, for models that cannot pack.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dpofast.model.attention.indexer import check_whole_histories_selected
from dpofast.model.attention.interface import use_packed_attention
from dpofast.model.attention.layout import PackedLayout, packed_mask
from dpofast.model.checks.support import attention_calls, cannot_pack
from dpofast.model.moe import RoutingCounts, balancing_loss, routing_counts, row_weights
from dpofast.model.neftune import packed_noise, padded_noise
from dpofast.model.parts import backbone_of, whole_backbone
from dpofast.model.recurrent.follow import one_kind_each, segment_arguments, shares_rows
from dpofast.model.rope import (
    check_read,
    depends_on_length,
    longest_sequence,
    packed_positions,
    padded_positions,
    split_by_table,
)
from dpofast.model.vision.merge import idle_call, packed_with_images, padded_inputs
from dpofast.model.vision.positions import has_own_positions, own_positions
from dpofast.packing.batch import PackedBatch
from dpofast.packing.split import split_by_kind

# Position tables may have a few rows more than positions: OPT's begins with two that it never reads.
_SPARE_POSITIONS = 8
# Names of the number of positions: nearly all, Whisper's decoder, MPT
_MOST_POSITIONS = ("max_position_embeddings", "max_target_positions", "max_seq_len")


def packed_backbone(model: Any, batch: PackedBatch, *, appended: int = 0, **options: Any) -> Any:
    """The backbone's output over the packed row, last_hidden_state (1, T, D); options go to the backbone as they are.

    Where several processes share the batch, that of this one's rows, (1, R, D), and a collective.

    Of a batch with images the whole of a composite model runs, and the output is that of its language model. The batch
    is one that separated returned; appended as in split_by_table.

    Raises:
        ValueError: a sequence longer than the model's table of positions or than index_topk, or attention layers that
            saw no layout.
    """
    _check_positions(model, longest_sequence(batch) - 1)
    check_whole_histories_selected(model, longest_sequence(batch) - 1)
    use_packed_attention(backbone_of(model))  # set_attn_implementation may have taken it off since
    layout = PackedLayout(batch.segments, batch.split)
    positions = _positions(model, batch, appended)
    input_ids, position_ids = batch.input_ids[None], batch.position_ids
    if batch.split is not None:
        rows = batch.split.rows
        input_ids, position_ids = input_ids.index_select(1, rows), position_ids.index_select(0, rows)
        positions = positions.index_select(1, rows)
    run = backbone_of(model)
    if batch.media is not None:
        run = functools.partial(packed_with_images, model, media=batch.media)
    with packed_noise(model, batch), _numbered(backbone_of(model), position_ids):
        output = run(
            input_ids=input_ids,
            position_ids=positions,
            attention_mask=packed_mask(layout, batch.input_ids.device),
            use_cache=False,
            packed_layout=layout,
            **segment_arguments(model, batch.segments),
            **options,
        )
    check_read(model, positions)
    expected = attention_calls(model)
    if layout.calls != expected:
        raise cannot_pack(model, f"{layout.calls} of its {expected} attention calls saw the packed layout")
    if layout.foreign_masks:
        raise cannot_pack(model, f"its attention has a mask of its own, {layout.foreign_masks[0]}, beside the layout")
    return output


def _positions(model: Any, batch: PackedBatch, appended: int) -> Tensor:
    """Position ids of the packed row: (1, T), or (3, 1, T) by the rule that the model has for images.

    Raises:
        ValueError: images in a sequence beyond the length from which the rotary table depends on it.
    """
    if batch.media is None or batch.media.is_idle or not has_own_positions(model):
        return packed_positions(model, batch, appended=appended)
    longest = longest_sequence(batch) - appended
    if depends_on_length(model, longest):
        raise ValueError(
            f"{type(model).__name__}: a sequence of {longest} tokens is so long that the rotary table depends on its "
            "length, which is not supported beside images: cut the data to a smaller max_length"
        )
    return own_positions(model, batch)


def separated(model: Any, batch: PackedBatch) -> PackedBatch:
    """The batch, with rows shared only by sequences that the model computes them alike for."""
    if not shares_rows(model):
        return split_by_kind(batch, one_kind_each(batch.lengths()))
    return split_by_table(model, batch)


@contextlib.contextmanager
def _numbered(backbone: Any, positions: Tensor) -> Iterator[None]:
    """Inside, decoders that number their rows themselves, as BART's do, look up positions (T,) instead."""
    if "position_ids" in inspect.signature(backbone.forward).parameters:
        yield
        return

    def given(module: nn.Module, args: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        rows = options.get("position_ids")
        return args, options if rows is None else {**options, "position_ids": positions.view(rows.shape)}

    tables = [module for name, module in backbone.named_modules() if name.split(".")[-1] == "embed_positions"]
    handles = [table.register_forward_pre_hook(given, with_kwargs=True) for table in tables]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def packed_hidden(
    model: Any, batch: PackedBatch, *, balance: bool | RoutingCounts = False
) -> tuple[Tensor, Tensor | None]:
    """Hidden states (N, D) in the order of the batch's targets, from one row of T positions.

    Where several processes share the batch, those of this one's targets, (N_r, D), and a collective.

    With balance also the load-balancing loss of a mixture of experts, a float32 scalar; where balance has the counts of
    a whole step, the batch's addend of its loss. Else None.
    """
    batch = separated(model, batch)
    output = packed_backbone(model, batch, **({"output_router_logits": True} if balance else {}))
    hidden = output.last_hidden_state.squeeze(0)  # not [0], whose gradient is copied into zeros
    logit_rows = batch.logit_rows if batch.split is None else batch.split.logit_rows
    hidden = hidden.index_select(0, logit_rows.to(hidden.device))
    if not balance:
        return hidden, None
    step = balance if isinstance(balance, RoutingCounts) else None
    return hidden, balancing_loss(output.router_logits, _top_k(model), row_weights(batch), step)


def packed_routing(model: Any, batch: PackedBatch) -> RoutingCounts:
    """How often the batch's rows choose each expert of a mixture of experts, from the backbone alone."""
    batch = separated(model, batch)
    output = packed_backbone(model, batch, output_router_logits=True)
    return routing_counts(output.router_logits, _top_k(model), row_weights(batch))


def _top_k(model: Any) -> int:
    return model.config.get_text_config().num_experts_per_tok


def padded_hidden(model: Any, batch: PackedBatch) -> Tensor:
    """Hidden states (N, D) in the order of the batch's targets, from S padded rows and the model's own attention.

    Rows of similar length run together, so that pads stay under a fifth of what is computed; with several processes
    all rows run in one call, because a sharded backbone must be called equally often on each. Reading the lengths back
    from the device is a sync, which packed_hidden does without. The vision tower sees the images of every row.

    Raises:
        ValueError: a sequence longer than the model's table of positions.
    """
    input_ids, attended, in_response = batch.padded()
    # A row's last token is only ever a target.
    input_ids, attended, predicts = input_ids[:, :-1], attended[:, 1:], in_response[:, 1:].cpu()
    lengths = attended.sum(dim=1).cpu()
    _check_positions(model, int(lengths.max()))
    bounds, device = batch.cu_targets.tolist(), input_ids.device
    run = backbone_of(model) if batch.media is None else whole_backbone(model)
    paths = None if batch.media is None else batch.paths()
    parts, targets = [], []
    for rows in similar_lengths(lengths):
        longest = int(lengths[rows[0]])
        index = torch.tensor(rows, device=device)
        positions = padded_positions(model, lengths[rows] + 1, longest, device)
        images = {} if paths is None else padded_inputs(model, batch, paths[index], longest)
        with padded_noise(model, lengths[rows] + 1), idle_call(model, batch.media):
            output = run(
                input_ids=input_ids[index, :longest],
                attention_mask=attended[index, :longest],
                use_cache=False,
                **positions,
                **images,
            )
        check_read(model, positions.get("position_ids"))
        hidden = output.last_hidden_state.flatten(0, 1)
        parts.append(hidden.index_select(0, predicts[rows, :longest].flatten().nonzero().squeeze(1).to(hidden.device)))
        targets += [target for row in rows for target in range(bounds[row], bounds[row + 1])]
    hidden = torch.cat(parts)
    return hidden.index_select(0, torch.tensor(targets).argsort().to(hidden.device))


def similar_lengths(lengths: Tensor) -> list[list[int]]:
    """Rows in groups, longest first, each at least four fifths as long as the longest of its group."""
    order = lengths.argsort(descending=True, stable=True)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return [order.tolist()]
    groups: list[list[int]] = []
    for row, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        if not groups or 5 * length < 4 * lengths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(row)
    return groups


def _check_positions(model: Any, positions: int) -> None:
    """A model that looks positions up in a table has no row for later ones; rotary and ALiBi models have no table."""
    config = model.config.get_text_config()
    name, most = next(((n, getattr(config, n)) for n in _MOST_POSITIONS if hasattr(config, n)), ("", None))
    if most is None or positions <= most or not _has_position_table(model, most):
        return
    raise ValueError(
        f"{type(model).__name__}: a prompt with its response has {positions} positions, and the model's table holds "
        f"{most} ({name}): cut the data to max_length={most}, or train a model with a longer context"
    )


def _has_position_table(model: Any, most: int) -> bool:
    if model.config.get_text_config().model_type == "mpt":  # its biases always have max_seq_len positions
        return True
    words = model.get_input_embeddings()
    tables = [m.weight for m in backbone_of(model).modules() if isinstance(m, nn.Embedding) and m is not words]
    # GPT-J and CodeGen keep theirs, of sines, as buffers.
    tables += [buffer for buffer in backbone_of(model).buffers() if buffer.ndim == 2]
    return any(most <= len(table) <= most + _SPARE_POSITIONS for table in tables)
