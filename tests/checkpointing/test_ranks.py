"""CheckpointedTrainer on two gloo ranks: both write into one folder, and an error on one is raised on all."""

import json
import os
import signal
import traceback
import warnings

import pytest
import torch
from torch import nn
from transformers import TrainingArguments

from dpofast.checkpointing.folder import DamagedCheckpoint, verify
from dpofast.checkpointing.signals import TrainingInterrupted
from dpofast.checkpointing.trainer import CheckpointedTrainer
from tests.support.rank_processes import become_rank, free_port, rank_context

pytestmark = pytest.mark.slow(30)

WORLD = 2
CASES = {}


class Model(nn.Module):
    """A regression with dropout, so that every rank's random state counts."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1))

    def forward(self, x, labels):
        return {"loss": (self.layers(x).squeeze(-1) - labels).square().mean()}


def make(out, **options):
    torch.manual_seed(1)
    data = [{"x": torch.randn(3), "labels": torch.randn(())} for _ in range(24)]
    given = {
        **{"per_device_train_batch_size": 2, "num_train_epochs": 2, "logging_steps": 3, "save_steps": 2},
        **{"report_to": "none", "disable_tqdm": True, "use_cpu": True, "learning_rate": 0.1},
        **{"ddp_backend": "gloo" if "WORLD_SIZE" in os.environ else None},
    }
    args = TrainingArguments(str(out), **{**given, **options})
    return CheckpointedTrainer(Model(), args, train_dataset=data)


def end(trainer):
    logs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return logs, torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def case(function):
    CASES[function.__name__] = function
    return function


@case
def resumed_to_the_last_bit(out, rank):
    whole = make(out)
    whole.train()
    losses, weights = end(whole)
    assert whole.state.global_step == 12 and len(losses) == 4
    names = set(verify(out / "checkpoint-4")["files"])
    assert {"rng_state_0.pth", "rng_state_1.pth", "progress_0.pt", "progress_1.pt"} < names
    resumed = make(out)
    resumed.train(resume_from_checkpoint=str(out / "checkpoint-4"))
    assert end(resumed)[0] == losses and torch.equal(end(resumed)[1], weights)


@case
def a_damaged_one_is_refused_everywhere(out, rank):
    make(out).train()
    if rank == 0:
        os.truncate(out / "checkpoint-12" / "model.safetensors", 10)
    torch.distributed.barrier()
    with pytest.raises(DamagedCheckpoint, match="model.safetensors has 10 bytes"):
        make(out).train(resume_from_checkpoint=str(out / "checkpoint-12"))
    trainer = make(out)
    trainer.train(resume_from_checkpoint="latest")
    assert trainer.state.global_step == 12


@case
def what_one_rank_cannot_write_is_no_checkpoint(out, rank):
    trainer = make(out)
    failures = iter([OSError("no room on this rank")] if rank == 1 else [])
    original = trainer._save_rng_state

    def save(folder):
        for failure in failures:
            raise failure
        original(folder)

    trainer._save_rng_state = save
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    said = [str(w.message) for w in caught if "could not be written" in str(w.message)]
    assert len(said) == (rank == 0) and all(
        "step 2 could not be written: no room on this rank" in text for text in said
    )
    assert sorted(path.name for path in out.glob("checkpoint-*"))[0] == "checkpoint-10"
    assert not (out / "checkpoint-2").exists() and verify(out / "checkpoint-4")


@case
def ranks_that_write_elsewhere_are_noticed(out, rank):
    trainer = make(out)
    if rank == 1:
        trainer._save_rng_state = lambda folder: None
    with pytest.raises(OSError, match=r"the files of ranks \[1\] are not in .*: all ranks need the same output_dir"):
        trainer.train()


@case
def a_signal_to_one_rank_stops_all(out, rank):
    trainer = make(out)
    original = trainer.training_step

    def step(*args, **kwargs):
        if rank == 1 and trainer.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    trainer.training_step = step
    name = "SIGTERM" if rank == 1 else "a signal to another process"
    with pytest.raises(TrainingInterrupted, match=f"stopped by {name} after step 3 of 12; go on with .*checkpoint-3"):
        trainer.train()
    whole, resumed = make(out / "whole"), make(out)
    whole.train()
    resumed.train(resume_from_checkpoint="latest")
    assert end(resumed)[0] == end(whole)[0] and torch.equal(end(resumed)[1], end(whole)[1])


def _rank(rank, port, folder):
    become_rank(rank, WORLD, port)
    outcomes = {}
    for name, function in CASES.items():
        try:
            function(folder / name, rank)
            outcomes[name] = ""
        except BaseException:
            outcomes[name] = traceback.format_exc()
        (folder / f"{rank}.json").write_text(json.dumps(outcomes))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank wrote, {case: traceback or ''}, and the folder of the cases. Ranks that hang are stopped."""
    folder = tmp_path_factory.mktemp("ranks")
    port = free_port()
    context = rank_context()
    processes = [context.Process(target=_rank, args=(rank, port, folder)) for rank in range(WORLD)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(600)
        process.kill()
    written = (folder / f"{rank}.json" for rank in range(WORLD))
    return [json.loads(path.read_text()) if path.exists() else {} for path in written], folder


@pytest.mark.parametrize("name", CASES)
def test_on_every_rank(ranks, name):
    for rank, written in enumerate(ranks[0]):
        failure = written.get(name, "did not finish: a deadlock, or the process died")
        assert not failure, f"rank {rank}:\n{failure}"


def test_one_process_resumes_what_two_wrote(ranks):
    folder = ranks[1] / "resumed_to_the_last_bit"
    with pytest.raises(ValueError, match="examples per step was 4, is 2. For 4 examples a step on 1 ranks set per_dev"):
        make(folder).train(resume_from_checkpoint="latest")
    trainer = make(folder, per_device_train_batch_size=4)
    with pytest.warns(UserWarning, match="written by 2 processes, on 1: .* random states .of dropout. begin anew"):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert trainer.state.global_step == 12 and len(end(trainer)[0]) == 4
