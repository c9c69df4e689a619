"""What a checkpoint holds besides weights: callbacks' counters, a subclass's files, the sums between two logs."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

from dpofast.checkpointing.folder import DamagedCheckpoint, verify
from dpofast.checkpointing.trainer import CheckpointedTrainer
from tests.support.tiny_training import SAVING, losses_of, make_trainer

pytestmark = pytest.mark.slow(10)


def test_a_checkpoint_of_an_older_format_is_refused_by_name(tmp_path, monkeypatch):
    with monkeypatch.context() as older:
        older.setattr("dpofast.checkpointing.folder._FORMAT", 1)
        make_trainer(tmp_path, **{**SAVING, "max_steps": 2}).train()
    with pytest.raises(ValueError, match=r"none is whole; .*checkpoint-2: was written by an older dpofast: install"):
        make_trainer(tmp_path, **SAVING).train(resume_from_checkpoint="latest")
    with pytest.raises(
        DamagedCheckpoint, match="checkpoint-2: was written by an older dpofast: install that to resume"
    ):
        make_trainer(tmp_path, **SAVING).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


class Counter(TrainerCallback, ExportableState):
    def __init__(self, stride=1):
        self.stride, self.count = stride, 0

    def on_step_end(self, args, state, control, **kwargs):
        self.count += self.stride

    def state(self):
        return {"args": {"stride": self.stride}, "attributes": {"count": self.count}}


def test_callbacks_go_on_with_their_counters_and_keep_their_options(tmp_path):
    for resume, strides, counts in ((None, (1, 10), [6, 60]), ("latest", (2, 10), [4 + 2 * 2, 60])):
        counters = [Counter(stride) for stride in strides]
        trainer = make_trainer(tmp_path, **SAVING)
        for counter in counters:
            trainer.add_callback(counter)
        trainer.train(resume_from_checkpoint=resume)
        assert [counter.count for counter in counters] == counts
        shutil.rmtree(tmp_path / "checkpoint-6")


def test_a_subclass_adds_files_of_its_own(tmp_path):
    class WithNotes(CheckpointedTrainer):
        notes = ""

        def save_more(self, folder):
            Path(folder, "notes.txt").write_text(f"{self.state.global_step} steps")

        def load_more(self, folder):
            self.notes = Path(folder, "notes.txt").read_text()

    model = nn.Sequential(nn.Linear(1, 1))
    model.forward = lambda x: {"loss": model[0](x).square().mean()}
    data = [{"x": torch.ones(1)}] * 4
    args = TrainingArguments(
        str(tmp_path), save_steps=2, max_steps=4, report_to="none", use_cpu=True, disable_tqdm=True
    )
    trainer = WithNotes(model, args, train_dataset=data)
    trainer.train()
    assert "notes.txt" in verify(tmp_path / "checkpoint-2")["files"]
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.notes == "2 steps"


@pytest.mark.parametrize("logging_steps", [1, 4, 5])
def test_logs_go_on_between_two_logs(tmp_path, logging_steps):
    options = {**SAVING, "logging_steps": logging_steps}
    whole = make_trainer(tmp_path, **options)
    whole.train()
    resumed = make_trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    clocks = ("tokens_per_second", "train_runtime", "train_samples_per_second", "train_steps_per_second")

    def logs(trainer):
        return [{k: v for k, v in entry.items() if k not in clocks} for entry in trainer.state.log_history[:-1]]

    assert logs(resumed) == logs(whole) and losses_of(whole)
    # Trainer's own mean is over the steps since the run was resumed.
    if logging_steps == 1:
        mean = sum(losses_of(whole)[2:]) / 4
        assert resumed.state.log_history[-1]["train_loss"] == pytest.approx(mean, rel=1e-6)
