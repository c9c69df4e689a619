"""Options, loading and the scoring loop that `dpofast eval` and `dpofast score` share."""

from __future__ import annotations

import contextlib
import math
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.distributed.device_mesh import init_device_mesh
from tqdm.auto import tqdm

from dpofast.cli.arguments import DATA_HELP
from dpofast.cli.load_models import (
    Loading,
    base_of,
    device,
    is_adapter,
    load_adapter,
    load_model,
    load_processing,
    load_tokenizer,
    named,
)
from dpofast.cli.run_options import first_adapter
from dpofast.common.ranks import Ranks
from dpofast.data.encode_pairs import TRUNCATION_MODES
from dpofast.data.formats import LIST_REF_COLUMN, REF_COLUMNS, place
from dpofast.data.images.prompt_images import PromptImages
from dpofast.data.load import DataReport, load_preferences, tokenize_preferences
from dpofast.data.token_rows import has_lists, has_reference
from dpofast.model.attach import attach_logprob_head
from dpofast.model.checks.parity import check_shards
from dpofast.model.parallel.mapped import widened
from dpofast.model.parallel.shard import shard
from dpofast.scoring.lockstep import Lockstep
from dpofast.scoring.order import prompt_order
from dpofast.scoring.score import WINDOW, Forward, run_batch, runs_of, score_together
from dpofast.training.checks.images import has_images
from dpofast.training.parallel.commands import agreed
from dpofast.training.processing import processing_of

# On a CPU a pass without gradients is fastest where its activations stay in cache.
_MAX_TOKENS_GPU, _MAX_TOKENS_CPU = 16384, 1024


@dataclass(kw_only=True)
class ScoringArguments:
    """Options of both commands: the model, the pairs or lists, and the reference."""

    model: str = field(metadata={"help": "A checkpoint: a folder or hub name, or the folder of a LoRA adapter."})
    data: str = field(metadata={"help": DATA_HELP})
    split: str = field(default="train", metadata={"help": "The split of --data, where it has several."})
    ref_model: str | None = field(
        default=None,
        metadata={
            "help": "The reference. Default: the rows' own ref_chosen_logps and ref_rejected_logps (of lists "
            "ref_responses_logps), else an adapter's base model."
        },
    )
    no_reference: bool = field(
        default=False,
        metadata={
            "help": "Rewards without a reference, beta times log-prob; with --loss_type simpo, orpo, cpo or sft."
        },
    )
    beta: float = field(default=0.1, metadata={"help": "The strength that rewards are measured in."})
    max_length: int | None = field(
        default=1024, metadata={"help": "Prompt plus response is cut to so many tokens, where truncation_mode says."}
    )
    truncation_mode: str = field(
        default="keep_start", metadata={"help": "As in training: keep_start, or keep_end (cuts the prompt's start)."}
    )
    on_bad_row: str = field(default="raise", metadata={"help": "A bad row: raise (stop) or skip (count, leave out)."})
    assistant_only_loss: bool = field(
        default=True, metadata={"help": "As in training: of a response of several turns only the assistant's count."}
    )
    dtype: str = field(default="float32", metadata={"help": "The dtype models are loaded in: float32 or bfloat16."})
    bf16: bool = field(default=False, metadata={"help": "Compute in bfloat16 on float32 weights, as training does."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Weights in 4 bits, by bitsandbytes."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Allow a model's own Python code to run."})
    padded: bool = field(default=False, metadata={"help": "Padded rows, for models that cannot run packed."})
    max_tokens: int | None = field(
        default=None,
        metadata={"help": "Packed positions at once (default 1024 on the CPU, 16384 on a GPU); memory only."},
    )
    max_logits_bytes: int | None = field(default=None, metadata={"help": "Room for logits in bytes."})
    fsdp: bool = field(
        default=False,
        metadata={
            "help": "Under torchrun: the processes share each model's weights (FSDP2), and not only the rows, for "
            "models that one device does not hold."
        },
    )

    def __post_init__(self) -> None:
        """Check what is cheap to check."""
        if not 0 < self.beta < math.inf:
            raise ValueError(f"beta: expected a positive number, got {self.beta}")
        if self.no_reference and self.ref_model:
            raise ValueError("no_reference: leave it out, or leave --ref_model out")
        if self.truncation_mode not in TRUNCATION_MODES:
            raise ValueError(f"truncation_mode: expected one of {TRUNCATION_MODES}, got {self.truncation_mode!r}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens: expected at least 1, got {self.max_tokens}")
        if self.fsdp and self.load_in_4bit:
            raise ValueError("fsdp: not supported with load_in_4bit, whose weights stay where they are: leave one out")

    @property
    def data_options(self) -> dict[str, Any]:
        """The options of tokenize_preferences."""
        return {
            "max_length": self.max_length,
            "truncation_mode": self.truncation_mode,
            "on_bad_row": self.on_bad_row,
            "assistant_only_loss": self.assistant_only_loss,
        }


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Data as loaded and as tokens, the report on its rows; the policy, and the reference or None without a model.

    order (n,) int64: the rows of tokens in the order in which they are scored. images: makes the pixels of prompts with
    images; None where the data or the model have none.
    """

    dataset: Dataset
    tokens: Dataset
    order: np.ndarray
    report: DataReport
    model: Any
    ref_model: Any
    images: PromptImages | None


def load(arguments: ScoringArguments) -> Dataset:
    """The data as they are; ValueError where they cannot be used."""
    return load_preferences(arguments.data, split=arguments.split, on_bad_row=arguments.on_bad_row)


def prepare(arguments: ScoringArguments, dataset: Dataset, ranks: Ranks) -> Prepared:
    """Load tokenizer, processor and models, and tokenize; what is cheap to check comes first.

    Args:
        arguments: the command's.
        dataset: of load().
        ranks: the processes that score; all of them call this.

    Raises:
        ValueError: fsdp on one process; data, a tokenizer, a processor or a model that cannot be used, or no reference
            where one is needed.
    """
    if arguments.fsdp and ranks.processes == 1:
        raise ValueError(
            "fsdp: expected several processes, which share the model's weights, got 1: start them by torchrun "
            "--nproc_per_node N -m dpofast ..., or leave fsdp out"
        )
    access = {"trust_remote_code": arguments.trust_remote_code}
    whole = load_processing(arguments.model, load_tokenizer(arguments.model, **access), dataset.column_names, **access)
    given = has_reference(dataset.column_names)
    if not (arguments.ref_model or arguments.no_reference or given or is_adapter(arguments.model)):
        raise ValueError(
            f"ref_model: {named(arguments.model)} is no adapter, so its reference must be named (the model that "
            "training began with): --ref_model; or --no_reference for losses that have none"
        )
    if not (arguments.ref_model or arguments.no_reference or given) and (first := first_adapter(arguments.model)):
        raise ValueError(
            f"ref_model: {arguments.model} was trained on from the adapter in {first}: name its reference, which is "
            f"that adapter (--ref_model {shlex.quote(first)}), or the base model"
        )
    model, ref_model = _models(arguments, ranks, given=given)
    processing = processing_of(whole, None, model, ref_model)
    if processing.refused is not None and has_images(dataset):
        raise ValueError(f"{arguments.data}: its rows have images, and {processing.refused}")
    tokens, report = tokenize_preferences(
        dataset,
        processing.tokenizer,
        vocab_size=model.get_input_embeddings().weight.shape[0],
        images=processing.images,
        **arguments.data_options,
    )
    if arguments.no_reference:
        brought = [name for name in (*REF_COLUMNS, LIST_REF_COLUMN) if name in tokens.column_names]
        tokens = tokens.remove_columns(brought)
    return Prepared(
        dataset=dataset,
        tokens=tokens,
        order=prompt_order(tokens),
        report=report,
        model=model,
        ref_model=ref_model,
        images=processing.images,
    )


def _models(arguments: ScoringArguments, ranks: Ranks, *, given: bool) -> tuple[Any, Any]:
    """The policy and the reference, None where the rows bring its log-probs or the policy without its adapter is it."""
    loading = Loading(
        dtype=arguments.dtype,
        trust_remote_code=arguments.trust_remote_code,
        load_in_4bit=arguments.load_in_4bit,
        to_shard=arguments.fsdp,
    )
    reference = arguments.ref_model
    if is_adapter(arguments.model):
        model, keeps_base = load_adapter(arguments.model, loading)
        if arguments.no_reference:
            model = model.merge_and_unload()
        elif not (keeps_base or given):
            reference = reference or base_of(arguments.model)
    else:
        model = load_model(arguments.model, loading)
    ref_model = load_model(reference, loading) if reference else None
    vocab = model.get_input_embeddings().weight.shape[0]
    for part in filter(None, (model, ref_model)):
        theirs = part.get_input_embeddings().weight.shape[0]
        if theirs != vocab:
            raise ValueError(f"ref_model: expected the model's vocabulary of {vocab} tokens, got {theirs}")
        part.requires_grad_(False).eval()
        if not (arguments.load_in_4bit or arguments.fsdp):  # bitsandbytes has put them there
            part.to(device())
        attach_logprob_head(part, padded=arguments.padded)
        with torch.autocast(device().type, torch.bfloat16, enabled=arguments.bf16):  # again, as scored() runs it
            if arguments.fsdp:
                with widened(part):
                    shard(part, init_device_mesh(device().type, (ranks.processes,)))
                check_shards(part, None, ranks.all_reduce_max)
            else:
                attach_logprob_head(part, padded=arguments.padded)
    return model, ref_model


def scored(
    arguments: ScoringArguments, prepared: Prepared, ranks: Ranks, *, start: int = 0, ld_alpha: float | None = None
) -> Iterator[list[dict[str, Any]]]:
    """Yields score_rows in the order of prepared.order, each with its row, in lists of whole windows.

    Each process computes a window at a time, and all of them yield the rows of all. A progress bar is shown on a
    terminal.

    Args:
        arguments: the command's.
        prepared: data and models.
        ranks: the processes that share the rows; all of them iterate.
        start: rows of that order that are left out.
        ld_alpha: as in score_rows.

    Raises:
        FloatingPointError: a log-prob that is not finite, with its row.
    """
    total, lists = len(prepared.tokens), has_lists(prepared.tokens.column_names)
    compute = _Scoring(arguments, prepared, ranks, ld_alpha)
    hidden = True if ranks.process else None  # None: where there is no terminal
    label = f"scored {'lists' if lists else 'pairs'}"
    with tqdm(total=total, initial=start, desc=label, disable=hidden, leave=False, file=sys.stderr) as bar:
        for first in range(start, total, WINDOW * ranks.size):
            own = first + WINDOW * ranks.rank
            parts = agreed(ranks, partial(compute.window, prepared.order[own : own + WINDOW]))
            rows = [row for part in parts for row in part]
            yield rows
            bar.update(len(rows))


class _Scoring:
    """Scores windows of rows, on every process one at a time."""

    def __init__(self, arguments: ScoringArguments, prepared: Prepared, ranks: Ranks, ld_alpha: float | None) -> None:
        self._arguments, self._prepared = arguments, prepared
        where = device()
        self._forward = Forward(
            max_tokens=arguments.max_tokens or (_MAX_TOKENS_CPU if where.type == "cpu" else _MAX_TOKENS_GPU),
            share="none" if arguments.padded else "prefix",
            max_logits_bytes=arguments.max_logits_bytes,
            device=where,
            autocast=partial(torch.autocast, where.type, torch.bfloat16, enabled=arguments.bf16),
            images=prepared.images,
            lockstep=Lockstep(ranks) if arguments.fsdp else None,
        )
        self._ld_alpha = ld_alpha

    def window(self, rows: np.ndarray) -> list[dict[str, Any]]:
        """The scores of these rows of the tokens. A collective where the models are sharded."""
        prepared, lockstep = self._prepared, self._forward.lockstep
        tokens = prepared.tokens.select(rows)
        with contextlib.ExitStack() as together:
            if lockstep is not None:
                given = has_reference(prepared.tokens.column_names)
                runs = runs_of(prepared.model, prepared.ref_model, given=given)
                idle = partial(run_batch, runs=runs, forward=self._forward)
                together.enter_context(lockstep.until_all_are_done(prepared.model, idle))
            found = score_together(
                tokens,
                prepared.model,
                prepared.ref_model,
                beta=self._arguments.beta,
                ld_alpha=self._ld_alpha,
                forward=self._forward,
            )
            for row in found:
                self._check_finite(row)
        return found

    def _check_finite(self, row: dict[str, Any]) -> None:
        found = row["responses_logps"] if "responses_logps" in row else (row["chosen_logps"], row["rejected_logps"])
        if not all(map(math.isfinite, found)):
            report = self._prepared.report
            raise FloatingPointError(
                f"{report.source}, {place(report.unit, row['row'])}: its log-probs under {self._arguments.model} are "
                "not finite: look at the checkpoint's weights, and at this row"
            )
