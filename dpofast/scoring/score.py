"""The forward-only pass: token log-probs of responses (response_logps), log-probs and rewards of pairs (score_rows).

Rows are read, packed like a training step, and run WINDOW at a time, so that memory does not grow with the dataset.
Log-probs are kept token by token: every sum of them (whole responses, LD-DPO's weighted ones) follows from one pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
from datasets import Dataset

from dpofast.common.eval_mode import eval_mode
from dpofast.data.arrow import chunk_bounds, read_chunks
from dpofast.data.formats import ID_COLUMNS, REF_COLUMNS
from dpofast.packing.arguments import at_least_one
from dpofast.packing.pack import pack
from dpofast.scoring.responses import ResponseLogps

# Rows packed and computed together: enough for full micro-batches, few enough to hold in memory for any dataset.
WINDOW = 256


@dataclass(frozen=True, kw_only=True)
class Forward:
    """How a model is run without gradients.

    Attributes:
        max_tokens: packed positions per micro-batch; no effect on results.
        share: as in `pack`; "none" for a head attached with padded=True.
        max_logits_bytes: room for logits, None for the default.
        device: where the model is.
        autocast: returns the context manager that the model runs in.
    """

    max_tokens: int | None
    share: str = "prefix"
    max_logits_bytes: int | None = None
    device: torch.device
    autocast: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext


@torch.no_grad()
def response_logps(examples: Any, model: Any, forward: Forward) -> ResponseLogps:
    """Token log-probs of the pairs' responses, in the order of the examples.

    Args:
        examples: one pair each, in any form that `pack` takes.
        model: with the log-prob head attached, on forward.device. It is in eval mode during the call.
        forward: how it is run.
    """
    logps, lengths, rows, pairs, responses = [], [], [], [], 0
    with eval_mode(model):
        for batch in pack(examples, forward.max_tokens, share=forward.share):
            with forward.autocast():
                output = model(packed=batch.to(forward.device), max_logits_bytes=forward.max_logits_bytes)
            logps.append(output.logps.float().cpu())
            lengths.append(batch.cu_targets.diff())
            rows.append(batch.pair_examples)
            pairs.append(batch.pairs + responses)
            responses += batch.num_sequences
    cu_targets = torch.zeros(responses + 1, dtype=torch.int32)
    if not responses:
        return ResponseLogps(torch.empty(0), cu_targets, torch.empty(0, 2, dtype=torch.int32))
    torch.cumsum(torch.cat(lengths), 0, dtype=torch.int32, out=cu_targets[1:])
    of_micro_batches = torch.cat(pairs)
    in_order = torch.empty_like(of_micro_batches)
    in_order[torch.cat(rows)] = of_micro_batches
    return ResponseLogps(torch.cat(logps), cu_targets, in_order)


def score_rows(
    dataset: Dataset | Iterable[Mapping[str, Any]],
    model: Any,
    ref_model: Any = None,
    *,
    beta: float,
    max_tokens: int | None,
    share: str,
    max_logits_bytes: int | None,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
    window: int = WINDOW,
    ld_alpha: float | None = None,
) -> Iterator[dict[str, Any]]:
    """Score preference pairs, row by row in input order; memory does not grow with their number.

    Rows share what they begin with inside a window only, since results come in the input's order: a dataset in the
    order of prompt_order costs least.

    Args:
        dataset: tokenize_preferences' dataset, or an iterable of mappings with prompt_ids, chosen_ids, rejected_ids.
        model: the policy, with the log-prob head attached, on `device`. It is in eval mode while a window is computed,
            and between windows in the mode that it was in.
        ref_model: the reference, likewise. None: the rows' own ref_chosen_logps and ref_rejected_logps where they have
            them; else under PEFT the model without its adapter; else there is none.
        beta: factor of the implicit rewards, beta·(logps − ref_logps).
        max_tokens: as in Forward, for both models; so are the next four.
        share: as in Forward.
        max_logits_bytes: as in Forward.
        device: as in Forward.
        autocast: as in Forward.
        window: rows computed together.
        ld_alpha: weights the log-probs as in PreferenceLoss.

    Returns:
        An iterator of dicts. Always: chosen_logps, rejected_logps (floats: nats, summed over the response),
        chosen_tokens, rejected_tokens (ints), and row (int) where the input has it. With a reference: ref_chosen_logps,
        ref_rejected_logps, chosen_rewards, rejected_rewards (beta·(logps − ref_logps)) and margins (their difference).

    Raises:
        ValueError: beta or window out of range; while iterating, a row that `pack` refuses, named by its place in its
            window, and a column that stands beside some rows' ids only.
    """
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta: expected a positive number, got {beta}")
    at_least_one("window", window)
    forward = Forward(
        max_tokens=max_tokens,
        share=share,
        max_logits_bytes=max_logits_bytes,
        device=device,
        autocast=autocast,
    )
    return _scored(_windows(dataset, window), model, ref_model, beta, ld_alpha, forward)


class _Window(NamedTuple):
    """Rows that are scored together.

    Attributes:
        examples: the pairs, in a form that `pack` takes.
        beside: the columns that stand beside the token ids, a list each: reference log-probs and row numbers.
    """

    examples: Any
    beside: dict[str, list[Any]]


def _scored(
    scored_together: Iterator[_Window],
    model: Any,
    ref_model: Any,
    beta: float,
    ld_alpha: float | None,
    forward: Forward,
) -> Iterator[dict[str, Any]]:
    for examples, beside in scored_together:
        policy = response_logps(examples, model, forward)
        logps = policy.sums(ld_alpha)
        columns = {"chosen_logps": logps[:, 0], "rejected_logps": logps[:, 1]}
        columns |= dict(zip(("chosen_tokens", "rejected_tokens"), policy.lengths().T, strict=True))
        reference = None
        if ref_model is not None:
            reference = response_logps(examples, ref_model, forward).sums(ld_alpha)
        elif REF_COLUMNS[0] in beside:
            reference = torch.tensor([beside[name] for name in REF_COLUMNS], dtype=torch.float32).T
        elif hasattr(model, "disable_adapter"):
            with model.disable_adapter():
                reference = response_logps(examples, model, forward).sums(ld_alpha)
        if reference is not None:
            rewards = beta * (logps - reference)
            columns |= dict(zip(REF_COLUMNS, reference.T, strict=True))
            columns |= dict(zip(("chosen_rewards", "rejected_rewards"), rewards.T, strict=True))
            columns["margins"] = rewards[:, 0] - rewards[:, 1]
        lists = {name: column.tolist() for name, column in columns.items()}
        if "row" in beside:
            lists["row"] = beside["row"]
        for values in zip(*lists.values(), strict=True):
            yield dict(zip(lists, values, strict=True))


def _windows(dataset: Any, size: int) -> Iterator[_Window]:
    """The rows of a Dataset or an iterable of mappings, `size` at a time."""
    optional = (*REF_COLUMNS, "row")
    if isinstance(dataset, Dataset):
        given = [name for name in optional if name in dataset.column_names]
        for table in read_chunks(dataset, [*ID_COLUMNS, *given], chunk_bounds(len(dataset), size)):
            yield _Window(table.select(ID_COLUMNS), {name: table.column(name).to_pylist() for name in given})
        return
    rows = iter(dataset)
    while part := list(islice(rows, size)):
        given = [name for name in optional if any(row.get(name) is not None for row in part)]
        for name in given:
            if any(row.get(name) is None for row in part):
                raise ValueError(f"{name}: expected it in every row or in none, and of these {len(part)} some lack it")
        present = [name for name in REF_COLUMNS if name in given]
        missing = [name for name in REF_COLUMNS if name not in given]
        if present and missing:
            raise ValueError(f"{missing[0]}: expected it beside {present[0]}, and there is none")
        examples = [{name: row.get(name) for name in ID_COLUMNS} for row in part]
        yield _Window(examples, {name: [row[name] for row in part] for name in given})
