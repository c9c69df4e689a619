"""README.md of a trained model: what was trained on what, with which loss and options."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpofast._version import __version__
from dpofast.common.printable import printable
from dpofast.training.config import DPOConfig

_MARK = "<!-- written by dpofast -->"


@contextlib.contextmanager
def model_card_of(trainer: Any, folder: str) -> Iterator[None]:
    """Write README.md into a model's folder when what is written there inside has been written.

    A file that was there before and is not dpofast's own is left alone; PEFT's template, written inside, is not.
    """
    path = Path(folder) / "README.md"
    own = not path.exists() or _MARK in path.read_text(encoding="utf-8")
    yield
    if own and trainer.is_world_process_zero():
        pairs = trainer.args.per_device_train_batch_size * trainer.data_ranks.size
        steps, reports = trainer.state.global_step, trainer.data_reports
        card = model_card(trainer.model, trainer.args, reports, pairs_per_step=pairs, steps=steps)
        path.write_text(card, encoding="utf-8")


def model_card(model: Any, args: DPOConfig, reports: dict[str, Any], *, pairs_per_step: int, steps: int) -> str:
    """Returns the text; local folders are named by their last part only.

    Args:
        model: what was trained.
        args: of the run.
        reports: the DataReport of every dataset, by its name.
        pairs_per_step: pairs or lists, on all ranks together.
        steps: optimizer steps so far.
    """
    loss = args.preference_loss()
    base = _name(getattr(model.config, "name_or_path", "")) or type(model).__name__
    adapter = getattr(model, "peft_config", None)
    kinds = loss.kind if isinstance(loss.kind, str) else " + ".join(loss.kind)
    trained = next(iter(adapter.values())) if adapter else None
    unit = reports["train"].example_kind if "train" in reports else "pairs"
    facts = {
        "Base model": f"`{base}`",
        "Trained": "all weights" if trained is None else f"an adapter ({type(trained).__name__})",
        "Data": "; ".join(
            f"{name}: {report.examples:,} {report.example_kind} of `{_name(report.source)}`"
            for name, report in reports.items()
        ),
        "Loss": f"`{kinds}`, beta {args.beta:g}" + ("" if loss.needs_reference else ", without a reference"),
        "Steps": f"{steps:,} of {pairs_per_step} {unit}",
        "Learning rate": f"{args.learning_rate:g}, {args.lr_scheduler_type.value}",
        "Longest row": f"{args.max_length} tokens",
        "Precision": "bf16 mixed"
        if args.bf16
        else "fp16 mixed"
        if args.fp16
        else str(model.dtype).removeprefix("torch."),
        "Seed": str(args.seed),
        "dpofast": __version__,
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items() if value)
    return f"""---
base_model: {base}
library_name: {"transformers" if trained is None else "peft"}
tags:
- dpo
- dpofast
---
{_MARK}

# {_name(args.output_dir) or base}

`{base}`, trained on preference {unit} by direct preference optimization.

| | |
|---|---|
{rows}
"""


def _name(source: str) -> str:
    """The last part of a local path, which says nothing of the machine; a hub name as it is. Fit for a table's cell."""
    name = Path(source).name if Path(source).is_absolute() or Path(source).exists() else source
    return printable(" ".join(name.split())).replace("|", "\\|").replace("`", "'")
