"""Log-probs and implicit rewards of preference pairs: no loss, no gradient, and memory for a window of rows only.

A window of rows is packed like a training step, and its responses' log-probs are kept token by token, so that every
sum of them (whole responses, LD-DPO's weighted ones) comes from one pass over the model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from dpofast.data.arrow import chunk_bounds, read_chunks
from dpofast.data.formats import ID_COLUMNS, REF_COLUMNS
from dpofast.losses.sequences import chosen_and_rejected, pair_logprobs, segment_sums
from dpofast.packing.arguments import at_least_one
from dpofast.packing.pack import pack

# Rows planned together: enough for full micro-batches, few enough to stay in memory for any dataset.
WINDOW = 256


@dataclass(frozen=True, eq=False)
class ResponseLogps:
    """Log-probs of every token of the responses of P pairs; what is equal within a micro-batch stands here once.

    Attributes:
        logps: (N,) float32 on the CPU, nats.
        cu_targets: (S + 1,) int32; response s owns logps[cu_targets[s]:cu_targets[s + 1]].
        pairs: (P, 2) int32, chosen and rejected response of every row.
    """

    logps: Tensor
    cu_targets: Tensor
    pairs: Tensor

    def sums(self, ld_alpha: float | None = None) -> Tensor:
        """(P, 2) float32, nats: summed over each response, with ld_alpha as LD-DPO weights its tokens."""
        if ld_alpha is None:
            return chosen_and_rejected(segment_sums(self.logps, self.cu_targets), self.pairs)
        return pair_logprobs(self.logps, self.cu_targets, self.pairs, ld_alpha=ld_alpha)

    def lengths(self) -> Tensor:
        """(P, 2) int32: tokens of each response."""
        return self.cu_targets.diff()[self.pairs.long()]


@dataclass(frozen=True, kw_only=True)
class Forward:
    """How a model without gradients is run.

    Attributes:
        max_tokens: packed positions per micro-batch; no effect on results.
        share_prompts: run a prompt once for all its responses; False for a head attached with padded=True.
        max_logits_bytes: room for logits, None for the default.
        device: where the model is.
        autocast: makes the context that it runs in.
    """

    max_tokens: int | None
    share_prompts: bool = True
    max_logits_bytes: int | None = None
    device: torch.device
    autocast: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext


@torch.no_grad()
def response_logps(examples: Any, model: Any, forward: Forward) -> ResponseLogps:
    """Log-probs of examples in any form that `pack` takes, one pair each; the model is in eval mode meanwhile."""
    was_training = model.training
    model.eval()
    try:
        logps, lengths, pairs, sequences = [], [], [], 0
        for batch in pack(examples, forward.max_tokens, share_prompts=forward.share_prompts):
            with forward.autocast():
                output = model(packed=batch.to(forward.device), max_logits_bytes=forward.max_logits_bytes)
            logps.append(output.logps.float().cpu())
            lengths.append(batch.cu_targets.diff())
            pairs.append((batch.pair_examples, batch.pairs + sequences))
            sequences += batch.num_sequences
    finally:
        model.train(was_training)
    in_order = torch.empty(sum(len(rows) for rows, _ in pairs), 2, dtype=torch.int32)
    for rows, part in pairs:
        in_order[rows] = part
    bounds = torch.zeros(sequences + 1, dtype=torch.int32)
    if sequences:
        torch.cumsum(torch.cat(lengths), 0, dtype=torch.int32, out=bounds[1:])
    return ResponseLogps(torch.cat(logps) if logps else torch.empty(0), bounds, in_order)


def score_rows(
    dataset: Dataset | Iterable[Mapping[str, Any]],
    model: Any,
    ref_model: Any = None,
    *,
    beta: float,
    max_tokens: int | None,
    share_prompts: bool,
    max_logits_bytes: int | None,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
    window: int = WINDOW,
    ld_alpha: float | None = None,
) -> Iterator[dict[str, Any]]:
    """Score preference pairs, row by row in input order; memory does not grow with their number.

    Args:
        dataset: tokenize_preferences' dataset, or an iterable of mappings with prompt_ids, chosen_ids, rejected_ids.
        model: the policy, with the log-prob head attached, on `device`. Outside of a window's computation it is in the
            mode (train or eval) that it was in.
        ref_model: the reference, likewise. None: the rows' own ref_chosen_logps and ref_rejected_logps where they have
            them; else under PEFT the model without its adapter; else there is none.
        beta: the strength that implicit rewards are measured in.
        max_tokens: as in Forward, for both models, like the next four.
        share_prompts: see there.
        max_logits_bytes: see there.
        device: see there.
        autocast: see there.
        window: rows computed together.
        ld_alpha: as in PreferenceLoss: the log-probs are weighted so.

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
        share_prompts=share_prompts,
        max_logits_bytes=max_logits_bytes,
        device=device,
        autocast=autocast,
    )
    return _scored(_examples(dataset, window), model, ref_model, beta, ld_alpha, forward)


def _scored(
    parts: Iterator[tuple[Any, dict[str, Any]]],
    model: Any,
    ref_model: Any,
    beta: float,
    ld_alpha: float | None,
    forward: Forward,
) -> Iterator[dict[str, Any]]:
    for examples, given in parts:
        policy = response_logps(examples, model, forward)
        logps = policy.sums(ld_alpha)
        columns = {"chosen_logps": logps[:, 0], "rejected_logps": logps[:, 1]}
        columns |= dict(zip(("chosen_tokens", "rejected_tokens"), policy.lengths().T, strict=True))
        reference = None
        if ref_model is not None:
            reference = response_logps(examples, ref_model, forward).sums(ld_alpha)
        elif REF_COLUMNS[0] in given:
            reference = torch.tensor([given.pop(name) for name in REF_COLUMNS], dtype=torch.float32).T
        elif hasattr(model, "disable_adapter"):
            with model.disable_adapter():
                reference = response_logps(examples, model, forward).sums(ld_alpha)
        if reference is not None:
            rewards = beta * (logps - reference)
            columns |= dict(zip(REF_COLUMNS, reference.T, strict=True))
            columns |= dict(zip(("chosen_rewards", "rejected_rewards"), rewards.T, strict=True))
            columns["margins"] = rewards[:, 0] - rewards[:, 1]
        lists = {name: column.tolist() for name, column in columns.items()}
        if "row" in given:
            lists["row"] = given["row"]
        for values in zip(*lists.values(), strict=True):
            yield dict(zip(lists, values, strict=True))


def _examples(dataset: Any, window: int) -> Iterator[tuple[Any, dict[str, Any]]]:
    """What `pack` takes, a window at a time, and the columns that stand beside the token ids."""
    beside = (*REF_COLUMNS, "row")
    if isinstance(dataset, Dataset):
        given = [name for name in beside if name in dataset.column_names]
        for table in read_chunks(dataset, [*ID_COLUMNS, *given], chunk_bounds(len(dataset), window)):
            yield table.select(ID_COLUMNS), {name: table.column(name).to_pylist() for name in given}
        return
    rows = iter(dataset)
    while part := list(islice(rows, window)):
        examples = [{name: row.get(name) for name in ID_COLUMNS} for row in part]
        given = [name for name in beside if any(row.get(name) is not None for row in part)]
        for name in given:
            if any(row.get(name) is None for row in part):
                raise ValueError(f"{name}: expected it in every row or in none, and of these {len(part)} some lack it")
        one, other = (name in given for name in REF_COLUMNS)
        if one != other:
            raise ValueError(f"{REF_COLUMNS[one]}: expected it beside {REF_COLUMNS[other]}, and there is none")
        yield examples, {name: [row[name] for row in part] for name in given}
