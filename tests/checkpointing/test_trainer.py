"""Checkpoints: damage is seen before anything is loaded, and a failed save is not the end of a run.

test_identity.py has the runs that are refused, test_progress.py what a resumed run restores, test_kill.py the runs
that are killed, and test_ranks.py those of several processes.
"""

import errno
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback

from dpofast.checkpointing import folder as checkpoint_folder
from dpofast.checkpointing.folder import (
    MANIFEST,
    DamagedCheckpoint,
    check_writable,
    newest_whole,
    read_manifest,
    resolve_checkpoint,
    rotate,
    seal,
    staging_folder,
    verify,
)
from dpofast.checkpointing.trainer import CheckpointedTrainer
from tests.support.tiny import tiny_dataset, tiny_model
from tests.support.tiny_training import SAVING, make_trainer, weights_of

pytestmark = pytest.mark.slow(40)


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def files_of(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != "reference")


# ---- damage --------------------------------------------------------------------------------------------------------


def test_what_a_checkpoint_holds(trained):
    manifest = verify(trained[0] / "checkpoint-4")
    assert manifest["step"] == 4 and manifest["world_size"] == 1
    assert {*manifest["files"], MANIFEST} == set(files_of(trained[0] / "checkpoint-4"))
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "progress.pt"} < set(
        manifest["files"]
    )
    assert not list(trained[0].glob(".tmp-*"))


def test_every_file_damaged_in_every_way_is_named(trained, run):
    names = files_of(run / "checkpoint-6")
    assert len(names) >= 11
    for name in names:
        path = run / "checkpoint-6" / name
        content = path.read_bytes()
        for position in (0, len(content) // 2, len(content) - 1):
            flip(path, position)
            with pytest.raises(DamagedCheckpoint, match=rf"checkpoint-6: its (file )?{name} is damaged"):
                verify(run / "checkpoint-6")
            path.write_bytes(content)
        for cut in (content[:-1], content + b"\0", b""):
            path.write_bytes(cut)
            with pytest.raises(DamagedCheckpoint, match=rf"its (file {name} has {len(cut)} bytes, and|manifest)"):
                verify(run / "checkpoint-6")
            path.write_bytes(content)
        path.unlink()
        with pytest.raises(DamagedCheckpoint, match=rf"its file {name} is missing|has no manifest.json"):
            verify(run / "checkpoint-6")
        path.write_bytes(content)
    assert verify(run / "checkpoint-6") == verify(trained[0] / "checkpoint-6")


def sealed(folder, **facts):
    staged = staging_folder(folder)
    staged.mkdir()
    (staged / "weights").write_bytes(bytes(9))
    seal(staged, folder, facts)
    return folder / MANIFEST


def test_no_bit_of_the_manifest_can_change(tmp_path):
    path = sealed(tmp_path / "checkpoint-1", step=1)
    content = path.read_bytes()
    for position in range(len(content)):
        for bit in range(8):
            path.write_bytes(content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :])
            with pytest.raises(DamagedCheckpoint, match=r"its manifest.json is damaged"):
                read_manifest(path.parent)


def test_a_damaged_checkpoint_is_refused_before_anything_is_loaded(run, monkeypatch):
    flip(run / "checkpoint-6" / "optimizer.pt", 1000)
    trainer = make_trainer(run, **SAVING)
    before = weights_of(trainer)
    monkeypatch.setattr(torch, "load", None)
    monkeypatch.setattr(Trainer, "_load_from_checkpoint", None)
    message = (
        r"resume_from_checkpoint: \S+checkpoint-6: its file optimizer.pt is damaged.*"
        r"the newest whole checkpoint is \S+checkpoint-4$"
    )
    with pytest.raises(DamagedCheckpoint, match=message):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-6"))
    assert torch.equal(weights_of(trainer), before)


@pytest.mark.parametrize("resume", [True, "latest"])
def test_latest_takes_the_newest_whole_one_and_names_the_others(trained, run, resume):
    (run / "checkpoint-6" / "optimizer.pt").unlink()
    flip(run / "checkpoint-4" / "model.safetensors", -1)
    trainer = make_trainer(run, **SAVING)
    passed_over = (
        r"resuming from \S+checkpoint-2; passed over: .*optimizer.pt is missing; .*model.safetensors is damaged"
    )
    with pytest.warns(UserWarning, match=passed_over):
        trainer.train(resume_from_checkpoint=resume)
    assert torch.equal(weights_of(trainer), trained[1])
    # The damaged checkpoint has been replaced.
    assert newest_whole(run) == (run / "checkpoint-6", [])
    verify(run / "checkpoint-4")


def test_nothing_to_resume_from(run, tmp_path):
    with pytest.raises(ValueError, match=r"there is no checkpoint to resume from in \S+empty: it has none"):
        resolve_checkpoint("latest", tmp_path / "empty")
    with pytest.raises(ValueError, match=r"\S+nowhere is no checkpoint folder \(it has no manifest.json\)"):
        resolve_checkpoint(tmp_path / "nowhere", tmp_path)
    for step in (2, 4, 6):
        (run / f"checkpoint-{step}" / MANIFEST).unlink()
    with pytest.raises(ValueError, match="of those in it none is whole; .*checkpoint-6: has no manifest.json"):
        resolve_checkpoint(True, run)
    with pytest.raises(DamagedCheckpoint, match="has no manifest.json.*no other checkpoint beside it is whole"):
        resolve_checkpoint(run / "checkpoint-2", run)


def test_an_earlier_checkpoint_by_name_says_which_later_ones_stay(run):
    with pytest.warns(UserWarning, match=r"checkpoint-4, checkpoint-6 of later steps stay until this run writes them"):
        assert resolve_checkpoint(run / "checkpoint-2", run) == run / "checkpoint-2"


def test_files_of_others_do_not_matter_but_pickled_weights_do(run):
    (run / "checkpoint-6" / "note.txt").write_text("mine")
    resolve_checkpoint("latest", run)
    (run / "checkpoint-6" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(DamagedCheckpoint, match=r"weights in a pickle \(.bin\), and only safetensors are loaded"):
        resolve_checkpoint(run / "checkpoint-6", run)


def test_weights_alone_are_not_resumed(tmp_path):
    trainer = make_trainer(tmp_path, **SAVING, save_only_model=True)
    trainer.train()
    with pytest.raises(DamagedCheckpoint, match="save_only_model=True, so it has no optimizer state.*begin a new run"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


class Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ["DPOFAST_EVIL"],)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "progress.pt"])
def test_a_pickle_that_runs_code_is_not_loaded_even_where_the_manifest_fits(run, tmp_path, monkeypatch, name):
    monkeypatch.setenv("DPOFAST_EVIL", str(tmp_path / "evil"))
    folder = run / "checkpoint-4"
    facts = {key: value for key, value in read_manifest(folder).items() if key not in ("files", "format")}
    torch.save(Evil(), folder / name)
    (folder / MANIFEST).unlink()
    os.rename(folder, staging_folder(folder))
    seal(staging_folder(folder), folder, facts)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        make_trainer(run, **SAVING).train(resume_from_checkpoint=str(folder))
    assert not (tmp_path / "evil").exists()


def test_a_manifest_of_a_later_version(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_folder, "_FORMAT", 2)
    sealed(tmp_path / "checkpoint-1")
    monkeypatch.setattr(checkpoint_folder, "_FORMAT", 1)
    with pytest.raises(DamagedCheckpoint, match="was written by a newer dpofast"):
        verify(tmp_path / "checkpoint-1")


def test_a_disk_that_cannot_be_read(run, monkeypatch):
    def fails(path):
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(checkpoint_folder, "_digest", fails)
    with pytest.raises(DamagedCheckpoint, match=r"\S+ cannot be read: Input/output error"):
        verify(run / "checkpoint-6")


# ---- writing -------------------------------------------------------------------------------------------------------


def test_everything_is_on_disk_before_the_name_is_and_old_ones_go_last(tmp_path, monkeypatch):
    events, real = [], {"fsync": os.fsync, "rename": os.rename}

    def fsync(descriptor):
        events.append(("on disk", os.readlink(f"/proc/self/fd/{descriptor}")))
        real["fsync"](descriptor)

    def rename(source, target):
        events.append(("renamed", str(source), str(target)))
        real["rename"](source, target)

    trainer = make_trainer(tmp_path, **SAVING, save_total_limit=1)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    trainer.train()
    staged, folder = str(tmp_path / ".tmp-checkpoint-4"), str(tmp_path / "checkpoint-4")
    at = events.index(("renamed", staged, folder))
    synced = [event[1] for event in events[:at] if event[0] == "on disk" and event[1].startswith(staged)]
    names = [*verify(tmp_path / "checkpoint-6")["files"]]
    assert sorted(synced[: len(names)]) == sorted(f"{staged}/{name}" for name in names)
    assert synced[len(names) :] == [f"{staged}/{MANIFEST}", staged]
    assert events[at + 1 :][0] == ("on disk", str(tmp_path))
    deleted = ("renamed", str(tmp_path / "checkpoint-2"), str(tmp_path / ".tmp-deleted-checkpoint-2"))
    assert events.index(deleted) > at
    assert files_of(tmp_path) == ["checkpoint-6"]


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [
        (None, None, [1, 2, 3, 5, 9]),
        (0, None, [1, 2, 3, 5, 9]),
        (3, None, [2, 3, 5]),
        (1, None, [5]),
        (1, 2, [2, 5]),
        (3, 1, [1, 3, 5]),
        (1, 5, [5]),
    ],
)
def test_which_checkpoints_are_deleted(tmp_path, monkeypatch, limit, best, left):
    for step in (1, 2, 3, 9, 5):  # 9 is of a run that was taken back to 3
        (tmp_path / f"checkpoint-{step}").mkdir()
    monkeypatch.chdir(tmp_path)  # the same folders by another name
    rotate(tmp_path, limit, [tmp_path / "checkpoint-5", *([Path(f"checkpoint-{best}")] if best else [])])
    assert files_of(tmp_path) == [f"checkpoint-{step}" for step in left]


def test_leftovers_go_when_training_begins(run):
    for name in (".tmp-checkpoint-8", ".tmp-replaced-checkpoint-6", ".tmp-deleted-checkpoint-2"):
        shutil.copytree(run / "checkpoint-2", run / name)
    make_trainer(run, **SAVING).train(resume_from_checkpoint="latest")
    assert files_of(run) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def failing(function, *, calls, error):
    numbers = iter(range(1, 1 << 30))

    def wrapped(*args, **kwargs):
        if next(numbers) in calls:
            raise error
        return function(*args, **kwargs)

    return wrapped


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("owner", "name", "error"),
    [
        (os, "fsync", FULL),
        (os, "makedirs", OSError(errno.EROFS, "Read-only file system")),
        (
            torch,
            "save",
            RuntimeError("[enforce fail] . PytorchStreamWriter failed writing file data/0: file write failed"),
        ),
        (
            torch,
            "save",
            RuntimeError("[enforce fail at inline_container.cc:747] . file write failed: No space left on device"),
        ),
        (Trainer, "save_model", SafetensorError("I/O error: No space left on device (os error 28)")),
        (Trainer, "save_model", Exception("No space left on device (os error 28)")),
        (checkpoint_folder, "_serialized", FULL),
    ],
    ids=["fsync", "read-only", "pickle", "archive", "weights", "tokenizer", "manifest"],
)
def test_a_save_that_fails_is_said_and_the_next_one_is_tried(trained, tmp_path, monkeypatch, owner, name, error):
    trainer = make_trainer(tmp_path, **SAVING)
    monkeypatch.setattr(owner, name, failing(getattr(owner, name), calls=[1], error=error))
    message = (
        r"the checkpoint of step 2 could not be written: .*(No space|Read-only|file write failed).* "
        r"\([\d,]+ MB are free\); there is no whole one yet\. Training goes on, and the next save is tried"
    )
    with pytest.warns(UserWarning, match=message):
        trainer.train()
    assert files_of(tmp_path) == ["checkpoint-4", "checkpoint-6"]
    assert torch.equal(weights_of(trainer), trained[1])


def test_a_bug_is_not_taken_for_a_full_disk(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, **SAVING)
    monkeypatch.setattr(Trainer, "save_model", failing(None, calls=[1], error=RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        trainer.train()


def test_the_last_save_is_tried_twice_and_then_an_error_with_the_weights_kept(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, **SAVING)
    # The optimizer's state does not fit, the third and the fourth time.
    monkeypatch.setattr(
        CheckpointedTrainer,
        "_save_optimizer_and_scheduler",
        failing(CheckpointedTrainer._save_optimizer_and_scheduler, calls=[3, 4], error=FULL),
    )
    message = r"training is done, and the checkpoint of step 6 could not .*checkpoint-4; the weights alone are in \S+$"
    with pytest.warns(UserWarning, match="step 6 could not"), pytest.raises(OSError, match=message):
        trainer.train()
    assert torch.equal(weights_of(trainer), weights_of_folder(tmp_path))
    resumed = make_trainer(tmp_path, **SAVING)
    resumed.train(resume_from_checkpoint="latest")
    assert torch.equal(weights_of(resumed), weights_of(trainer))


def weights_of_folder(folder):
    model = tiny_model().from_pretrained(folder)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_best_step_that_could_not_be_kept_is_said(tmp_path, monkeypatch):
    trainer = make_trainer(
        tmp_path, **SAVING, evaluation=tiny_dataset(4, seed=1), eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True,
    )  # fmt: skip
    monkeypatch.setattr(Trainer, "save_model", failing(Trainer.save_model, calls=[1], error=FULL))
    with pytest.warns(UserWarning, match="this step was the best so far and is not kept"):
        trainer.train()


def test_a_damaged_best_checkpoint_is_not_loaded(tmp_path):
    trainer = make_trainer(
        tmp_path, **SAVING, evaluation=tiny_dataset(4, seed=1), eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True,
    )  # fmt: skip

    class Damage(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == 6:
                flip(Path(state.best_model_checkpoint, "model.safetensors"), -1)

    trainer.add_callback(Damage())
    with pytest.raises(DamagedCheckpoint, match="model.safetensors is damaged"):
        trainer.train()


def test_a_folder_that_cannot_be_written_is_refused_before_the_reference_pass(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise AssertionError("a reference was computed")

    monkeypatch.setattr("dpofast.training.ref_model.add_reference_columns", refused)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match=r"output_dir: \S+file/out cannot be written to: Not a directory"):
        make_trainer(file / "out")
    check_writable(tmp_path / "new" / "newer")
    assert files_of(tmp_path) == ["file"], "the check leaves nothing behind"
    monkeypatch.setattr("tempfile.TemporaryFile", failing(None, calls=[1], error=OSError(errno.EROFS, "Read-only")))
    with pytest.raises(ValueError, match=r"output_dir: \S+new cannot be written to: Read-only"):
        make_trainer(tmp_path / "new")


def test_transformers_checkpoint_in_place_on_sigterm_is_refused(tmp_path):
    with pytest.raises(ValueError, match="enable_jit_checkpoint: leave it out"):
        make_trainer(tmp_path, enable_jit_checkpoint=True)


def test_a_finished_run_has_nothing_left(tmp_path):
    finished, resumed = (make_trainer(tmp_path, **SAVING, max_steps=4) for _ in range(2))  # in the middle of an epoch
    finished.train()
    resumed.train(resume_from_checkpoint="latest")
    assert resumed.state.global_step == 4 and torch.equal(weights_of(resumed), weights_of(finished))
