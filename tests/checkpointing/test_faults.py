"""Faults around a run: disks, terminals and signals that fail it, a second run beside it, a forged checkpoint."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_callback import ExportableState

from dpofast.checkpointing.callback_state import callback_states, restore_callback_states
from dpofast.checkpointing.folder import (
    LOCK,
    MANIFEST,
    STATE,
    DamagedCheckpoint,
    _serialized,
    read_manifest,
    rotate,
    verify,
    verify_resumable,
)
from dpofast.checkpointing.signals import TrainingInterrupted
from dpofast.checkpointing.write_errors import as_os_errors
from dpofast.report.progress import follow
from tests.support.tiny import tiny_dataset
from tests.support.tiny_training import SAVING, make_trainer, weights_of

pytestmark = pytest.mark.slow(15)


# ---- disks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 7360 vs 7252"),
            "torch.save: .",
        ),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), "torch.save: Pytorch"),
        (Exception("No space left on device (os error 28)"), "tokenizers: No space left"),
    ],
    ids=["archive", "stream", "tokenizer"],
)
def test_what_the_libraries_raise_on_a_full_disk_is_an_os_error(error, message):
    with pytest.raises(OSError, match=message), as_os_errors():
        raise error


def test_a_disk_that_is_really_full():
    with pytest.raises(OSError, match="torch.save: "), as_os_errors():
        torch.save(torch.zeros(100_000), "/dev/full")


@pytest.mark.parametrize("error", [RuntimeError("a bug"), Exception("a bug"), ValueError("(os error 28)")], ids=str)
def test_other_errors_stay_what_they_are(error):
    with pytest.raises(type(error)) as raised, as_os_errors():
        raise error
    assert raised.value is error


def test_an_old_checkpoint_that_cannot_be_deleted_does_not_end_the_run(tmp_path, trained, monkeypatch):
    real = os.rename

    def busy(source, target):
        if "deleted" in str(target):
            raise OSError(errno.EBUSY, "Device or resource busy", str(source))
        real(source, target)

    monkeypatch.setattr(os, "rename", busy)
    trainer = make_trainer(tmp_path, **SAVING, save_total_limit=1)
    with pytest.warns(UserWarning, match=r"checkpoint-2: cannot be deleted .Device or.*save_total_limit=1"):
        trainer.train()
    assert torch.equal(weights_of(trainer), trained[1])
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{step}" for step in (2, 4, 6)]
    monkeypatch.undo()
    rotate(tmp_path, 1, [tmp_path / "checkpoint-6"])
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]


def test_what_an_earlier_deletion_left_is_in_nobodys_way(run):
    for why in ("deleted", "replaced"):
        for step in (2, 6):
            stuck = run / f".tmp-{why}-checkpoint-{step}"
            stuck.mkdir()
            (stuck / ".nfs0001").write_text("open elsewhere")
    rotate(run, 2, [run / "checkpoint-6"])
    assert not (run / "checkpoint-2").exists() and (run / ".tmp-deleted-checkpoint-2" / ".nfs0001").exists()


def test_a_model_that_cannot_be_written_names_the_last_checkpoint(run, monkeypatch):
    trainer = make_trainer(run, **SAVING)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("transformers.Trainer.save_model", full)
    with pytest.raises(OSError, match=r"could not be written to \S+run: .*No space.*checkpoint-6 is the last"):
        trainer.save_model()


# ---- output --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gone", ["full disk", "reader"])
def test_standard_output_that_is_gone_does_not_end_the_run(tmp_path, trained, monkeypatch, gone):
    if gone == "full disk":
        stream = open("/dev/full", "w", buffering=1)  # noqa: SIM115
    else:
        reader, writer = os.pipe()
        os.close(reader)
        stream = open(writer, "w", buffering=1)  # noqa: SIM115
    monkeypatch.setattr(sys, "stdout", stream)
    trainer = make_trainer(tmp_path, **SAVING)
    follow(trainer, tmp_path / "metrics.jsonl")
    with pytest.warns(UserWarning, match="standard output cannot be written to"):
        trainer.train()
    assert torch.equal(weights_of(trainer), trained[1])
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 7


# ---- a second run --------------------------------------------------------------------------------------------------


def test_a_second_run_into_the_folder_is_refused_while_the_first_one_trains(tmp_path):
    class Second(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                trainer = make_trainer(tmp_path, **SAVING)  # another lock, as in another process
                with pytest.raises(ValueError, match=rf"{tmp_path}: process {os.getpid()} on .* is writing to it"):
                    trainer.train()
                refused.append(trainer)

    refused = []
    trainer = make_trainer(tmp_path, **SAVING)
    trainer.add_callback(Second())
    trainer.train()
    assert len(refused) == 1 and not (tmp_path / LOCK).exists()
    for step in (2, 4, 6):
        verify(tmp_path / f"checkpoint-{step}")
    refused[0].train()  # the first one has ended


# ---- signals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_to_the_whole_process_group_stops_with_a_checkpoint(tmp_path, name):
    """As a scheduler or a closed terminal sends it: data-loading workers get it too, which the step still needs."""

    class Signal(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                group = f"-{os.getpgid(0)}"  # a worker knows its parent's signals from others'
                subprocess.run(["kill", f"-{name.removeprefix('SIG')}", "--", group], start_new_session=True)
                time.sleep(0.3)  # workers that the signal ends are noticed within this step

    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
        trainer = make_trainer(tmp_path, **SAVING, save_total_limit=1, dataloader_num_workers=2)
        trainer.add_callback(Signal())
        try:
            trainer.train()
        except TrainingInterrupted as stop:
            (tmp_path / "stopped.txt").write_text(str(stop))
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert (tmp_path / "stopped.txt").read_text().startswith(f"stopped by {name} after step 3 of 6; go on with")
    verify_resumable(tmp_path / "checkpoint-3")


# ---- a forged checkpoint -------------------------------------------------------------------------------------------


class Counting(TrainerCallback, ExportableState):
    def __init__(self, patience=3):
        self.patience, self.count, self.best, self.path = patience, 0, None, "mine"

    def state(self):
        return {"args": {"patience": self.patience}, "attributes": {"count": self.count, "best": self.best}}


def test_callbacks_get_back_what_is_their_state_and_nothing_else():
    first, second = Counting(), Counting(patience=9)
    first.count, second.best = 5, 0.25
    states = json.loads(json.dumps(callback_states([first, second, TrainerCallback()])))
    restored = [Counting(), Counting(patience=1)]
    restore_callback_states(restored, states, "folder")
    assert [(c.patience, c.count, c.best) for c in restored] == [(3, 5, None), (1, 0, 0.25)]
    states["Counting"][0]["attributes"] |= {"path": "theirs", "count": 7}
    states["TrainerCallback"] = {"args": {}, "attributes": {"path": "theirs"}}
    plain = TrainerCallback()
    with pytest.warns(UserWarning, match=r"folder: its trainer_state.json has values of \w+ .*left out: .'path'."):
        restore_callback_states([*restored, plain], states, "folder")
    assert restored[0].path == "mine" and restored[0].count == 7 and not hasattr(plain, "path")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"attributes": {"count": "many"}}, "'many' as count of Counting, and int was expected"),
        ({"attributes": {"count": True}}, "True as count of Counting"),
        ({"attributes": [1]}, "no object with attributes of Counting"),
        ("text", "no object with attributes of Counting"),
    ],
)
def test_state_of_another_type_is_refused(state, message):
    with pytest.raises(DamagedCheckpoint, match=message):
        restore_callback_states([Counting()], {"Counting": state}, "folder")


def forge(folder, content):
    """Write another trainer_state.json, with a manifest that fits it."""
    (folder / STATE).write_bytes(content)
    manifest = {key: value for key, value in read_manifest(folder).items() if key != "checksum"}
    manifest["files"][STATE] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / MANIFEST).write_bytes(_serialized(manifest))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1]", "is not one of transformers' TrainerState: found list"),
        (b'{"global_step": 6, "__class__": 1}', "found .'__class__'."),
        (b'{"global_step": 5, "log_history": [], "stateful_callbacks": {}}', "is not that of step 6"),
        (b'{"global_step": 6, "log_history": [1], "stateful_callbacks": {}}', "is not that of step 6"),
        (b'{"global_step": 6, "log_history": [], "stateful_callbacks": [1]}', "is not that of step 6"),
        (b"[" * 100_000 + b"]" * 100_000, "cannot be read: maximum recursion"),
        (b"\xff", "cannot be read"),
    ],
    ids=["list", "unknown", "step", "logs", "callbacks", "deep", "bytes"],
)
def test_a_trainer_state_of_another_shape_is_refused(run, content, message):
    forge(run / "checkpoint-6", content)
    with pytest.raises(DamagedCheckpoint, match=message):
        make_trainer(run, **SAVING).train(resume_from_checkpoint=str(run / "checkpoint-6"))


@pytest.mark.parametrize(
    "files",
    [[1], {"a": 1}, {"a": {"bytes": "1", "sha256": ""}}, {"../a": {"bytes": 1, "sha256": ""}}, {"/etc/passwd": {}}],
    ids=str,
)
def test_a_manifest_of_another_shape_is_refused(run, files):
    manifest = {key: value for key, value in read_manifest(run / "checkpoint-6").items() if key != "checksum"}
    (run / "checkpoint-6" / MANIFEST).write_bytes(_serialized({**manifest, "files": files}))
    with pytest.raises(DamagedCheckpoint, match="its manifest.json is damaged"):
        verify(run / "checkpoint-6")
    (run / "checkpoint-6" / MANIFEST).write_bytes(_serialized({**manifest, "run": [1]}))
    with pytest.raises(DamagedCheckpoint, match="its manifest.json is not that of a run: expected step"):
        verify_resumable(run / "checkpoint-6")


def test_a_named_pipe_in_place_of_a_manifest_is_not_read(run):
    (run / "checkpoint-6" / MANIFEST).unlink()
    os.mkfifo(run / "checkpoint-6" / MANIFEST)
    with pytest.raises(DamagedCheckpoint, match="manifest.json cannot be read: it is no regular file"):
        read_manifest(run / "checkpoint-6")
    shutil.rmtree(run / "checkpoint-6")


def test_a_run_that_a_callback_stopped_goes_on_and_says_so(tmp_path):
    class TimeLimit(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = control.should_save = state.global_step == 3

    (whole := make_trainer(tmp_path / "whole", **SAVING)).train()
    first = make_trainer(tmp_path / "run", **SAVING)
    first.add_callback(TimeLimit())
    first.train()
    again = make_trainer(tmp_path / "run", **SAVING)
    with pytest.warns(UserWarning, match="a callback stopped the run after step 3 of 6; the run goes on"):
        again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6
    assert torch.equal(weights_of(again), weights_of(whole))


@pytest.mark.parametrize(("patience", "steps", "said"), [(1, 2, "nothing is left to train"), (9, 6, "the run goes on")])
def test_early_stopping_holds_when_its_run_is_resumed_and_more_patience_goes_on(tmp_path, patience, steps, said):
    options = {**SAVING, "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss"}
    options |= {
        "greater_is_better": True,
        "evaluation": tiny_dataset(4),
        "learning_rate": 1e-3,
    }  # a falling loss is bad
    first = make_trainer(tmp_path, **options)
    first.add_callback(EarlyStoppingCallback(1))
    first.train()
    assert first.state.global_step == 2
    again = make_trainer(tmp_path, **options)
    again.add_callback(EarlyStoppingCallback(patience))
    with pytest.warns(UserWarning, match=said):
        again.train(resume_from_checkpoint=True)
    assert again.state.global_step == steps
