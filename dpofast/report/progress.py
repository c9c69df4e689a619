"""Trainer callbacks that show progress (a bar, or plain lines) and append every log to a JSON lines file."""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import os
import time
import warnings
from collections.abc import Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers import ProgressCallback as TqdmCallback

from dpofast.common.memory import peak_memory

# The log entries that hold each value (Trainer names its own speed differently), and its format.
_SHOWN = {
    "loss": ("{:.4f}", ("loss",)),
    "accuracy": ("{:.2f}", ("rewards/accuracies",)),
    "ties": ("{:.2f}", ("rewards/ties",)),
    "tau": ("{:+.2f}", ("rewards/kendall_tau",)),
    "best of K": ("{:.2f}", ("rewards/best_of_k",)),
    "margin": ("{:+.2f}", ("rewards/margins",)),
    "tokens/s": ("{:,.0f}", ("tokens_per_second", "train_tokens_per_second")),
}


def follow(trainer: Trainer, metrics: str | Path | None = None, *, title: str = "training") -> None:
    """Show a trainer's progress on standard output and append its logs to a file.

    Args:
        trainer: any transformers.Trainer; its own progress bar or log printer is removed.
        metrics: the JSON lines file, or None for no file.
        title: shown before the bar.
    """
    for theirs in (TqdmCallback, PrinterCallback):
        trainer.remove_callback(theirs)
    trainer.add_callback(ProgressCallback(title))
    if metrics is not None:
        trainer.add_callback(JsonlCallback(metrics))


class ProgressCallback(TrainerCallback):
    """Shows loss, accuracy, margin, tokens per second, peak memory and time left; a bar on a terminal, else lines.

    Args:
        title: shown before the bar.
        console: where to print; default: standard output.
    """

    def __init__(self, title: str = "training", console: Console | None = None) -> None:
        """Keep both; the bar is made when training begins."""
        self.title = title
        self.console = console or Console()
        self._bar: _Bar | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar."""
        self._begin = time.monotonic(), state.global_step
        if not (self.console.is_terminal and state.is_world_process_zero):
            return
        self._bar = _Bar(
            *(TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn()),
            *(TextColumn("left"), TimeRemainingColumn()),
            console=self.console,
        )
        self._task = self._bar.add_task(self.title, total=state.max_steps, completed=state.global_step)
        # An exception inside train() never reaches on_train_end, and the terminal's cursor would stay hidden.
        atexit.register(self._bar.stop)
        self._bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """Show a training log beside the bar; an evaluation, or any log without a terminal, as a line."""
        held_out = "eval_loss" in (logs or {})
        values = _values(logs or {}, prefix="eval_" if held_out else "")
        if not values or not state.is_world_process_zero:
            return
        if not held_out:
            memory, kind = peak_memory()
            values += f"  peak {kind} {memory / 2**30:.2f} GiB"
        if self._bar is not None and not held_out:
            self._bar.values = values
        else:
            values += "" if held_out else self._left(state)
            step = f"{self.title}: step {state.global_step}/{state.max_steps}"
            self.console.print(f"{step}  {'held-out: ' * held_out}{values}", highlight=False, soft_wrap=True)

    def _left(self, state: Any) -> str:
        """The time left at the speed so far, evaluations included."""
        started, first = self._begin
        done = state.global_step - first
        if done <= 0 or state.global_step >= state.max_steps:
            return ""
        seconds = (time.monotonic() - started) / done * (state.max_steps - state.global_step)
        return f"  left {timedelta(seconds=round(seconds))}"

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.stop()
            atexit.unregister(self._bar.stop)
            self._bar = None


class _Bar(Progress):
    """Steps and times on one line and values on a second: on 80 columns one line would push the times out."""

    values = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self.values:
            yield Text(self.values, no_wrap=True, overflow="ellipsis")


class JsonlCallback(TrainerCallback):
    """Appends every log to a file as one JSON line with its step; a value that is not finite is written as null.

    Where it cannot be written to (a full disk) a log is left out with a warning, and training continues.

    Args:
        path: the file; its folders are made when training begins.
    """

    def __init__(self, path: str | Path) -> None:
        """Keep the path."""
        self.path = Path(path)
        self._begin: int | None = None  # the step up to which lines are kept, until that is done

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Empty the file, or when resuming keep the lines up to the resumed step: later steps are trained again."""
        if state.is_world_process_zero:
            self._begin = state.global_step
            self._write_or_warn("", state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """Append one line."""
        if state.is_world_process_zero:
            self._write_or_warn(_line({"step": state.global_step, **(logs or {})}), state.global_step)

    def _write_or_warn(self, line: str, step: int) -> None:
        try:
            if self._begin is not None:
                self._keep_up_to(self._begin)
                self._begin = None
            if line:
                self._append(line)
        except OSError as error:
            left_out = f"the log of step {step} is left out" if line else "it is tried again with the first log"
            warnings.warn(f"{self.path}: {left_out}: {error}", stacklevel=4)

    def _keep_up_to(self, step: int) -> None:
        kept = []
        if step > 0 and self.path.exists():
            kept = [entry for entry in read_metrics(self.path) if entry.get("step", math.inf) <= step]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_name(f".tmp-{self.path.name}")  # killed in between, the former file is still there
        aside.write_text("".join(map(_line, kept)), encoding="utf-8")
        os.replace(aside, self.path)

    def _append(self, line: str) -> None:
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(self.path, size)  # half a line would spoil the next one
            raise


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Returns the entries of a JsonlCallback's file; an incomplete last line is ignored.

    Raises:
        ValueError: a line elsewhere that is not JSON, with its number.
    """
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    entries = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: expected one JSON object a line: {error}") from error
        if not isinstance(entry, dict):
            raise ValueError(f"{path}, line {number}: expected one JSON object a line, got {type(entry).__name__}")
        entries.append(entry)
    return entries


def _line(entry: Mapping[str, Any]) -> str:
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in entry.items()
    }
    return json.dumps(finite) + "\n"


def _values(logs: Mapping[str, Any], prefix: str) -> str:
    if f"{prefix}loss" not in logs:
        return ""
    parts = []
    for label, (form, names) in _SHOWN.items():
        found = [logs[prefix + name] for name in names if prefix + name in logs]
        if found and (found[0] or label != "ties"):  # ties are shown where there are some
            parts.append(f"{label} {form.format(found[0])}")
    return "  ".join(parts)
