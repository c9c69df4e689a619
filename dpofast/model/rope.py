"""Rotary tables that depend on a sequence's length: LongRoPE (arXiv 2402.13753) and dynamic NTK.

transformers chooses such a table once a call, by the call's largest position, so that one long sequence would change
the log-probs of all that are computed beside it. Here a hook on the rotary module gives every position the table that a
plain forward over its sequence alone has. Sequences no longer than the original context, which have the usual table,
are left to the module.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from dpofast.model.wrappers import drop_hooks
from dpofast.packing.batch import PackedBatch
from dpofast.packing.split import following_value, split_by_kind

_MODULES = "_dpofast_rotary_modules"  # an attribute of the model
_ATTRIBUTE = "dpofast_table_lengths"


@dataclass(frozen=True, eq=False)
class TableLengths:
    """The length by which each position's table is chosen; it travels as an attribute of the position ids.

    Attributes:
        values: (rows, T) int64, like the position ids.
        distinct: its values, ascending.
        readers: ids of the rotary modules that have read it.
    """

    values: Tensor
    distinct: list[int]
    readers: set[int] = field(default_factory=set)


def follow_lengths(model: nn.Module) -> None:
    """Hook the model's rotary modules whose table depends on the length; calls without TableLengths are unchanged."""
    stop_following(model)
    found = [module for module in model.modules() if hasattr(module, "original_max_seq_len") and _kinds(module)]
    for module in found:
        module.register_forward_hook(_own_tables, with_kwargs=True)
    vars(model)[_MODULES] = found


def stop_following(model: Any) -> None:
    """Undo follow_lengths."""
    vars(model).pop(_MODULES, None)
    drop_hooks(model, lambda hook: hook is _own_tables)


def split_by_table(model: nn.Module, batch: PackedBatch, *, appended: int = 0) -> PackedBatch:
    """The batch in which only sequences of one table share rows; the batch itself where all have one.

    Only where a sequence is longer than the original context does this read lengths back from the device.

    Args:
        model: an attached model.
        batch: on the model's device.
        appended: tokens at the end of every sequence that are no part of it.
    """
    longest = longest_sequence(batch) - appended
    if not depends_on_length(model, longest):
        return batch
    return split_by_kind(batch, table_lengths(model, batch.lengths().cpu() - appended))


def packed_positions(model: nn.Module, batch: PackedBatch, *, appended: int = 0) -> Tensor:
    """Position ids (1, T) of a batch that split_by_table returned, with its TableLengths where they matter."""
    positions = batch.position_ids[None]
    if depends_on_length(model, longest_sequence(batch) - appended):
        of_sequence = table_lengths(model, batch.lengths().cpu() - appended).to(positions.device)
        of_target = of_sequence.repeat_interleave(batch.cu_targets.diff().long().to(positions.device))
        of_row = torch.zeros_like(batch.position_ids).index_copy(0, batch.logit_rows, of_target)
        positions = _marked(positions, following_value(of_row)[None])
    return positions


def padded_positions(model: nn.Module, lengths: Tensor, width: int, device: torch.device) -> dict[str, Tensor]:
    """The option position_ids (rows, width) of a padded call over sequences of lengths (rows,), where it matters."""
    if not depends_on_length(model, int(lengths.max())):
        return {}
    positions = torch.arange(width, device=device).expand(len(lengths), width).clone()
    values = table_lengths(model, lengths).to(device)[:, None].expand(len(lengths), width)
    return {"position_ids": _marked(positions, values)}


def check_read(model: nn.Module, positions: Tensor | None) -> None:
    """Refuse the result of a backbone whose rotary modules have not read the lengths that its positions carry.

    Raises:
        ValueError: they have not.
    """
    lengths: TableLengths | None = getattr(positions, _ATTRIBUTE, None)
    if lengths is not None and not {id(module) for module in _rotary_modules(model)} <= lengths.readers:
        border = _border(model)
        raise ValueError(
            f"{type(model).__name__}: a sequence of {lengths.distinct[-1]} tokens is longer than the {border} up to "
            f"which the rotary table is fixed, and its layers do not let the table follow each sequence's own length: "
            f"cut the data to max_length={border}"
        )


def longest_sequence(batch: PackedBatch) -> int:
    """Tokens of the longest prompt + response, an upper bound that is read from the segments on the CPU."""
    return batch.segments.longest_path() + 1  # a response's last token has no position


def table_lengths(model: nn.Module, lengths: Tensor) -> Tensor:
    """(S,) int64: equal for sequences of lengths (S,) that have the same table, which a call of that length has."""
    border = _border(model)
    if border is None:
        return torch.zeros_like(lengths)
    dynamic = any("dynamic" in kind for module in _rotary_modules(model) for kind in _kinds(module).values())
    # LongRoPE has one table for all longer sequences, dynamic NTK one for each length
    beyond = lengths if dynamic else lengths.max().expand_as(lengths)
    return torch.where(lengths > border, beyond, border)


def depends_on_length(model: nn.Module, longest: int) -> bool:
    """Whether a sequence of that many tokens has another table than short ones."""
    border = _border(model)
    return border is not None and longest > border


def _border(model: nn.Module) -> int | None:
    """The greatest length up to which all tables are the usual ones; None for a model without such tables."""
    borders = []
    for module in _rotary_modules(model):
        config: Any = module.config
        for layer_type, kind in _kinds(module).items():
            parameters = config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]
            # a table of dynamic NTK that has grown is not given back at the original length itself
            borders.append(
                parameters["original_max_position_embeddings"]
                if kind == "longrope"
                else module.original_max_seq_len - 1
            )
    return min(borders, default=None)


def _rotary_modules(model: nn.Module) -> list[Any]:
    """The modules that follow_lengths found; a search in each call would take as long as a small layer."""
    return vars(model).get(_MODULES, [])


def _kinds(module: Any) -> dict[str | None, str]:
    """The rope types of a module that depend on the length, by layer type (None where it has one for all)."""
    kinds = getattr(module, "rope_type", None)
    by_layer = kinds if isinstance(kinds, dict) else {None: kinds}
    return {
        layer: kind
        for layer, kind in by_layer.items()
        if kind is not None and (kind == "longrope" or "dynamic" in kind)
    }


def _marked(positions: Tensor, values: Tensor) -> Tensor:
    setattr(positions, _ATTRIBUTE, TableLengths(values, values.unique().tolist()))
    return positions


@torch.compiler.disable
def _own_tables(module: Any, args: tuple[Any, ...], options: dict[str, Any], output: Any) -> Any:
    """A forward hook: cos and sin (rows, T, Dh) of every position, by the table of its length."""
    positions = options["position_ids"] if "position_ids" in options else args[1]
    lengths: TableLengths | None = getattr(positions, _ATTRIBUTE, None)
    if lengths is None:
        return None
    lengths.readers.add(id(module))
    options = {name: value for name, value in options.items() if name != "position_ids"}
    for length in lengths.distinct:
        table = table_of_length(module, args[0] if args else options.pop("x"), positions, length, options)
        chosen = lengths.values == length
        output = tree_map(lambda ours, new, at=chosen: torch.where(at[..., None], new, ours), output, table)
    return output


@torch.no_grad()
def table_of_length(module: Any, x: Tensor, positions: Tensor, length: int, options: dict[str, Any]) -> Any:
    """What the module returns for positions (rows, T) in a call of that length; x gives dtype and device.

    A copy computes it: dynamic NTK keeps its last table in the module.
    """
    fresh = copy.deepcopy(module, {id(module.config): module.config})
    fresh.forward(x, positions[..., :1] * 0, **options)  # back to the original table
    last = positions.new_full((*positions.shape[:-1], 1), length - 1)
    output = fresh.forward(x, torch.cat((positions.clamp(max=length - 1), last), dim=-1), **options)
    return tree_map(lambda part: part[..., :-1, :], output)
