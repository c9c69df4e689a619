"""Progress on a terminal and without one, the metrics file, and the picture drawn from it."""

import io
import json
import re
import resource
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset
from matplotlib.image import imread
from rich.console import Console
from torch import nn
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers import ProgressCallback as TqdmCallback

from dpofast.common.memory import peak_memory
from dpofast.report.progress import JsonlCallback, ProgressCallback, follow, read_metrics
from dpofast.report.training_plot import plot_training

TRAINED = {"loss": 0.5, "rewards/accuracies": 0.75, "rewards/margins": 1.25, "tokens_per_second": 12345.6}
HELD_OUT = {"eval_loss": 0.25, "eval_rewards/accuracies": 1.0, "eval_rewards/margins": -2.0}


def state(step=0):
    return SimpleNamespace(global_step=step, max_steps=10, is_world_process_zero=True)


def shown(terminal, *logs, width=160):
    """What ProgressCallback prints for a run with these logs, one a step."""
    printed = io.StringIO()
    callback = ProgressCallback("DPO", Console(file=printed, force_terminal=terminal, width=width, color_system=None))
    callback.on_train_begin(None, state(), None)
    for step, log in enumerate(logs, 1):
        callback.on_step_end(None, state(step), None)
        callback.on_log(None, state(step), None, logs=log)
    callback.on_train_end(None, state(len(logs)), None)
    return printed.getvalue()


def test_without_a_terminal_each_log_is_a_line():
    first, second, third = shown(False, TRAINED, HELD_OUT, {"loss": 2.0}, {"train_runtime": 1.0}).splitlines()
    memory_and_time = r"  peak RAM \d+\.\d\d GiB  left 0:00:\d\d"
    assert re.fullmatch(
        r"DPO: step 1/10  loss 0\.5000  accuracy 0\.75  margin \+1\.25  tokens/s 12,346" + memory_and_time, first
    )
    assert second == "DPO: step 2/10  held-out: loss 0.2500  accuracy 1.00  margin -2.00"
    assert re.fullmatch(r"DPO: step 3/10  loss 2\.0000" + memory_and_time, third)


def test_the_time_left_follows_the_pace_since_the_run_began_or_was_resumed(monkeypatch):
    clock = iter([100.0, 160.0])
    monkeypatch.setattr("dpofast.report.progress.time.monotonic", lambda: next(clock))
    printed = io.StringIO()
    callback = ProgressCallback(console=Console(file=printed, width=160))
    callback.on_train_begin(None, state(4), None)
    callback.on_log(None, state(4), None, logs=TRAINED)  # nothing done yet: no pace
    callback.on_log(None, state(6), None, logs=TRAINED)  # two steps took a minute, four are left
    callback.on_log(None, state(10), None, logs=TRAINED)
    assert [line.partition("left ")[2] for line in printed.getvalue().splitlines()] == ["", "0:02:00", ""]


def test_peak_memory_is_what_the_process_has_used():
    before, kind = peak_memory()
    block = np.ones(60_000_000, np.uint8)
    after, _ = peak_memory()
    assert kind == "RAM" and before > 100 * 2**20 and after >= before and block.sum() == len(block)


def test_on_a_terminal_a_bar_shows_the_values_and_evaluations_are_lines():
    printed = shown(True, TRAINED, HELD_OUT)
    assert "2/10" in printed and "loss 0.5000  accuracy 0.75  margin +1.25  tokens/s 12,346  peak RAM" in printed
    assert "DPO: step 2/10  held-out: loss 0.2500" in printed and "DPO: step 1/10" not in printed
    assert printed.count("\x1b[?25l") == printed.count("\x1b[?25h") == 1, "the cursor is hidden, and shown again"


@pytest.mark.parametrize("width", [80, 110])
def test_a_narrow_terminal_keeps_steps_times_and_values(width):
    last = shown(True, TRAINED, TRAINED, width=width).split("\x1b[2K")[-1].replace("\x1b[?25h", "")
    bar, values = [line.rstrip() for line in last.splitlines() if line.strip()]
    assert re.fullmatch(r"DPO ━+[╸╺]?━* +2/10 \d:\d\d:\d\d left (-:--:--|\d:\d\d:\d\d)", bar), bar
    assert re.fullmatch(r"loss 0\.5000  accuracy 0\.75  margin \+1\.25  tokens/s 12,346  peak RAM \S+ GiB", values)
    assert max(len(bar), len(values)) <= width


def test_ties_are_shown_where_there_are_some():
    first, second = shown(False, {**TRAINED, "rewards/accuracies": 0.0, "rewards/ties": 1.0}, TRAINED).splitlines()
    assert "accuracy 0.00  ties 1.00  margin" in first and "ties" not in second


@pytest.mark.parametrize("disable_tqdm", [False, True])
def test_follow_takes_the_place_of_transformers_progress(tmp_path, disable_tqdm):
    args = TrainingArguments(str(tmp_path), report_to="none", disable_tqdm=disable_tqdm, use_cpu=True)
    trainer = Trainer(nn.Linear(1, 1), args, train_dataset=Dataset.from_dict({"x": [1]}))
    follow(trainer, tmp_path / "metrics.jsonl", title="here")
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert kinds.count(ProgressCallback) == kinds.count(JsonlCallback) == 1
    assert TqdmCallback not in kinds and PrinterCallback not in kinds


def test_metrics_are_json_lines_and_not_finite_is_null(tmp_path):
    callback = JsonlCallback(tmp_path / "new" / "metrics.jsonl")
    callback.on_train_begin(None, state(), None)
    callback.on_log(None, state(1), None, logs={"loss": float("nan"), "epoch": 0.5})
    callback.on_log(None, state(2), None, logs={"loss": 1.0})
    assert read_metrics(callback.path) == [{"step": 1, "loss": None, "epoch": 0.5}, {"step": 2, "loss": 1.0}]


def test_a_new_run_starts_a_new_file_and_a_resumed_one_goes_on_after_its_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = "".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(5))
    path.write_text(lines + '{"step": 5, "lo', encoding="utf-8")
    callback = JsonlCallback(path)
    callback.on_train_begin(None, state(2), None)
    assert [entry["step"] for entry in read_metrics(path)] == [0, 1, 2]
    callback.on_train_begin(None, state(0), None)
    assert read_metrics(path) == []


def test_a_line_that_does_not_fit_is_left_out_and_the_file_stays_whole(tmp_path):
    callback = JsonlCallback(tmp_path / "metrics.jsonl")
    callback.on_train_begin(None, state(), None)
    callback.on_log(None, state(1), None, logs={"loss": 1.0})
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (callback.path.stat().st_size + 9, usual[1]))
    try:
        with pytest.warns(UserWarning, match="metrics.jsonl: the log of step 2 is left out: .*File too large"):
            callback.on_log(None, state(2), None, logs={"loss": 2.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    callback.on_log(None, state(3), None, logs={"loss": 3.0})
    assert [entry["step"] for entry in read_metrics(callback.path)] == [1, 3]


def test_a_log_that_cannot_be_written_at_all_does_not_end_the_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    (tmp_path / ".tmp-metrics.jsonl").mkdir()  # in the way of the new file
    callback = JsonlCallback(path)
    with pytest.warns(UserWarning, match="metrics.jsonl: it is tried again with the first log: .*Is a directory"):
        callback.on_train_begin(None, state(1), None)
    with pytest.warns(UserWarning, match="metrics.jsonl: the log of step 2 is left out: .*Is a directory"):
        callback.on_log(None, state(2), None, logs={"loss": 2.0})
    (tmp_path / ".tmp-metrics.jsonl").rmdir()
    callback.on_log(None, state(3), None, logs={"loss": 3.0})
    assert [entry["step"] for entry in read_metrics(path)] == [1, 3]
    path.unlink()
    path.mkdir()
    with pytest.warns(UserWarning, match="metrics.jsonl: the log of step 4 is left out: "):
        callback.on_log(None, state(4), None, logs={"loss": 4.0})
    path.rmdir()
    tmp_path.rmdir()  # a folder that somebody removed is made again
    callback.on_log(None, state(5), None, logs={"loss": 5.0})
    assert [entry["step"] for entry in read_metrics(path)] == [5]


def test_a_line_of_another_shape_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for line, got in (("[1]", "got list"), ("[" * 100_000, "maximum recursion")):
        path.write_text(f'{{"step": 1}}\n{line}\n')
        with pytest.raises(ValueError, match=f"metrics.jsonl, line 2: expected one JSON object a line.*{got}"):
            read_metrics(path)


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="metrics.jsonl, line 2: expected one JSON object a line"):
        read_metrics(path)


def test_picture_of_a_run_without_evaluation_and_with_gaps(tmp_path):
    path = tmp_path / "metrics.jsonl"
    logs = [TRAINED, {**TRAINED, "rewards/margins": None}, {"train_runtime": 1.0}]
    path.write_text("".join(json.dumps({"step": i, **log}) + "\n" for i, log in enumerate(logs)), encoding="utf-8")
    plot_training(path, tmp_path / "training.png")
    assert imread(tmp_path / "training.png").std() > 0.01


def test_a_run_without_a_loss_cannot_be_drawn(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 0, **HELD_OUT}) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match="expected a training log with a loss to draw, got 1 logs without one"):
        plot_training(path, tmp_path / "training.png")
    assert not (tmp_path / "training.png").exists()
