"""The forward-only pass: token log-probs of responses (response_logps), log-probs and rewards of rows (score_rows).

Rows are read, packed like a training step, and run WINDOW at a time, so that memory does not grow with the dataset.
Log-probs are kept token by token: every sum of them (whole responses, LD-DPO's weighted ones) follows from one pass.
Of rows with images, the pixels of a few are made by a background thread while the model runs on those before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from dpofast.common.eval_mode import eval_mode
from dpofast.data.formats import ORDER_COLUMN
from dpofast.data.images.columns import IMAGE_KEYS
from dpofast.data.images.prompt_images import PromptImages
from dpofast.packing.arguments import at_least_one
from dpofast.packing.batch import PackedBatch
from dpofast.packing.pack import pack
from dpofast.scoring.ahead import Ahead
from dpofast.scoring.lockstep import Lockstep
from dpofast.scoring.pixels import PixelGroup, needs_pixels, pixel_groups
from dpofast.scoring.responses import ResponseLogps, check_ld_alpha
from dpofast.scoring.windows import Window, windows

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
        images: makes the pixels of rows with images; None: rows have none, or bring media.
        group: the process group that computes each micro-batch together (sequence parallelism): all its ranks must
            run the same examples. None: this process alone.
        lockstep: where the model's forwards are collectives, keeps those of all processes equally many; the caller
            enters its until_all_are_done().
        gathered_dtype: the dtype in which FSDP2 gathers weights under mixed precision; None: that of the parameters.
    """

    max_tokens: int | None
    share: str = "prefix"
    max_logits_bytes: int | None = None
    device: torch.device
    autocast: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    images: PromptImages | None = None
    group: Any = None
    lockstep: Lockstep | None = None
    gathered_dtype: torch.dtype | None = None


class Run(NamedTuple):
    """A model, and what makes the context that it runs in (PEFT's disable_adapter)."""

    model: Any
    inside: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext


def response_logps(examples: Any, model: Any, forward: Forward) -> ResponseLogps:
    """Token log-probs of the responses of pairs or lists, in the order of the examples; of lists best first.

    Args:
        examples: pairs or lists, in any form that `pack` takes; or rows of a token-level dataset with images, a
            Dataset, an Arrow table or mappings.
        model: with the log-prob head attached, on forward.device. It is in eval mode during the call.
        forward: how it is run.

    Raises:
        ValueError: examples that `pack` refuses, rows with images without forward.images, or an image that can no
            longer be read or is another one than when the row was tokenized.
    """
    (found,) = _responses_logps(examples, [Run(model)], forward)
    return found


@torch.no_grad()
def _responses_logps(examples: Any, runs: Sequence[Run], forward: Forward) -> list[ResponseLogps]:
    """response_logps of several models, which get the same micro-batches: their pixels are made once."""
    logps: list[list[Tensor]] = [[] for _ in runs]
    lengths, examples_of, rows, responses = [], [], [], 0
    with contextlib.ExitStack() as stack:
        for model in {id(run.model): run.model for run in runs}.values():
            stack.enter_context(eval_mode(model))
        micro_batches = stack.enter_context(contextlib.closing(_micro_batches(examples, forward)))
        for batch, of_examples in micro_batches:
            if forward.lockstep is not None:
                batch = forward.lockstep.announced(batch, runs[0].model)
            for found, own_logps in zip(logps, run_batch(batch, runs, forward), strict=True):
                found.append(own_logps)
            lengths.append(batch.cu_targets.diff())
            examples_of.append(of_examples)
            own = batch.pairs if batch.columns.lists is None else batch.columns.lists
            rows.append(torch.where(own < 0, -1, own + responses).to(torch.int32))
            responses += batch.num_sequences
    cu_targets = torch.zeros(responses + 1, dtype=torch.int32)
    if not responses:
        return [ResponseLogps(torch.empty(0), cu_targets, torch.empty(0, 2, dtype=torch.int32)) for _ in runs]
    torch.cumsum(torch.cat(lengths), 0, dtype=torch.int32, out=cu_targets[1:])
    most = max(part.shape[1] for part in rows)
    of_micro_batches = torch.cat([torch.nn.functional.pad(part, (0, most - part.shape[1]), value=-1) for part in rows])
    in_order = torch.empty_like(of_micro_batches)
    in_order[torch.cat(examples_of)] = of_micro_batches
    return [ResponseLogps(torch.cat(found), cu_targets, in_order) for found in logps]


@torch.no_grad()
def run_batch(batch: PackedBatch, runs: Sequence[Run], forward: Forward) -> list[Tensor]:
    """(N,) float32 on the CPU from each model, in its mode, of a batch on the CPU, split over a group."""
    if forward.group is not None:
        batch = batch.split_over(forward.group)
    on_device, found = batch.to(forward.device), []
    for run in runs:
        with run.inside(), forward.autocast():
            output = run.model(packed=on_device, max_logits_bytes=forward.max_logits_bytes)
        found.append(output.logps.float().cpu())
    return found


def _micro_batches(examples: Any, forward: Forward) -> Generator[tuple[PackedBatch, Tensor], None, None]:
    """Micro-batches on the CPU, each with the places of its pairs or lists among the examples."""

    def packed(group: PixelGroup) -> list[tuple[PackedBatch, Tensor]]:
        try:
            batches = pack(group.examples, forward.max_tokens, share=forward.share)
        except ValueError as error:
            raise group.renamed(error) from error
        return [(batch, group.rows[batch.pair_examples]) for batch in batches]

    if not needs_pixels(examples):
        for batch in pack(examples, forward.max_tokens, share=forward.share):
            yield batch, batch.pair_examples
        return
    if forward.images is None:
        raise ValueError(
            f"images: expected what makes the pixels of rows with {IMAGE_KEYS}, got None: give "
            "images=PromptImages(processor, vision_inputs(model))"
        )
    with Ahead(pixel_groups(examples, forward.images), packed) as groups:
        for group in groups:
            yield from group


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
    images: PromptImages | None = None,
) -> Iterator[dict[str, Any]]:
    """Score preference pairs or lists, row by row in input order; memory does not grow with their number.

    Rows share what they begin with inside a window only, since results come in the input's order: a dataset in the
    order of prompt_order costs least.

    Args:
        dataset: tokenize_preferences' dataset, or an iterable of mappings with prompt_ids, chosen_ids, rejected_ids,
            or of lists with prompt_ids, responses_ids and ranks or scores. Their weights of tokens are factors of the
            log-probs; a column beta replaces beta. Mappings may have media, as for `pack`, or the columns of a
            tokenized dataset with images.
        model: the policy, with the log-prob head attached, on `device`. It is in eval mode while a window is computed,
            and between windows in the mode that it was in.
        ref_model: the reference, likewise. None: the rows' own ref_chosen_logps and ref_rejected_logps (of lists
            ref_responses_logps) where they have them; else under PEFT the model without its adapter; else none.
        beta: factor of the implicit rewards, beta·(logps − ref_logps).
        max_tokens: as in Forward, for both models; so are the next four.
        share: as in Forward.
        max_logits_bytes: as in Forward.
        device: as in Forward.
        autocast: as in Forward.
        window: rows computed together.
        ld_alpha: weights the log-probs as in PreferenceLoss; for pairs whose tokens have no weights.
        images: as in Forward.

    Returns:
        An iterator of dicts. Always: chosen_logps, rejected_logps (floats: nats, summed over the response),
        chosen_tokens, rejected_tokens (ints), and row (int) where the input has it. With a reference: ref_chosen_logps,
        ref_rejected_logps, chosen_rewards, rejected_rewards (beta·(logps − ref_logps)) and margins (their difference).
        Of lists: responses_logps, responses_tokens, ref_responses_logps and responses_rewards, lists in the order of
        the responses in the row of the source, and margins of the best and the worst response.

    Raises:
        ValueError: beta or window out of range; while iterating, a row that `pack` refuses, named by its place in its
            window, a beta that is not positive, a column that stands beside some rows' ids only, ld_alpha with lists
            or weights of tokens, and the errors of images in response_logps.
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
        images=images,
    )
    return _scored(windows(dataset, window), model, ref_model, beta, ld_alpha, forward)


def score_together(
    dataset: Dataset, model: Any, ref_model: Any, *, beta: float, ld_alpha: float | None, forward: Forward
) -> list[dict[str, Any]]:
    """score_rows of one window: these rows, of which there may be none."""
    whole = windows(dataset, max(1, len(dataset)))
    return list(_scored(whole, model, ref_model, beta, ld_alpha, forward))


def runs_of(model: Any, ref_model: Any, *, given: bool) -> list[Run]:
    """What score_rows runs: the policy, and a reference unless there is none or the rows bring its log-probs.

    Args:
        model: the policy.
        ref_model: the reference, or None.
        given: the rows bring its log-probs.
    """
    if ref_model is not None:
        return [Run(model), Run(ref_model)]
    without_adapter = not given and hasattr(model, "disable_adapter")
    return [Run(model), Run(model, model.disable_adapter)] if without_adapter else [Run(model)]


def _scored(
    scored_together: Iterator[Window],
    model: Any,
    ref_model: Any,
    beta: float,
    ld_alpha: float | None,
    forward: Forward,
) -> Iterator[dict[str, Any]]:
    for window in scored_together:
        check_ld_alpha(ld_alpha, is_list=window.is_list, weighted=window.weights is not None)
        own = window.betas()
        reference = None if ref_model is not None else window.reference()
        runs = runs_of(model, ref_model, given=reference is not None)
        policy, *others = _responses_logps(window.examples, runs, forward)
        columns = {"logps": policy.sums(ld_alpha, window.weights), "tokens": policy.lengths()}
        if others:
            reference = others[0].sums(ld_alpha, window.weights)
        if reference is not None:
            factor = beta if own is None else own[:, None]
            columns |= {"ref_logps": reference, "rewards": factor * (columns["logps"] - reference)}
        yield from _rows(window, columns, policy.member)


def _rows(window: Window, columns: dict[str, Tensor], member: Tensor) -> Iterator[dict[str, Any]]:
    """What score_rows returns of a window; columns (P, K), member (P, K) bool."""
    numbers = window.beside.get("row")
    places = window.beside.get(ORDER_COLUMN) if window.is_list else None
    margins = None
    if (rewards := columns.get("rewards")) is not None:
        worst = rewards.gather(1, member.sum(1, keepdim=True) - 1)[:, 0]
        margins = (rewards[:, 0] - worst).tolist()
    counts = member.sum(1).tolist()
    lists = {name: values.tolist() for name, values in columns.items()}
    for index, count in enumerate(counts):
        row: dict[str, Any] = {}
        for name, values in lists.items():
            own = values[index][:count]
            if not window.is_list:
                row |= {_column(name, side): value for side, value in zip(("chosen", "rejected"), own, strict=True)}
                continue
            if places is not None:
                own = [own[k] for k in np.argsort(places[index])]
            row[_column(name, "responses")] = own
        if margins is not None:
            row["margins"] = margins[index]
        if numbers is not None:
            row["row"] = numbers[index]
        yield row


def _column(name: str, responses: str) -> str:
    """The name of an output column: chosen_logps, ref_chosen_logps, responses_rewards ..."""
    return f"ref_{responses}_logps" if name == "ref_logps" else f"{responses}_{name}"
