"""Sharded checkpoints: of two gloo ranks under FSDP2, and of one process, which writes the same files."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dpofast.checkpointing.folder import DamagedCheckpoint, newest_whole, verify
from dpofast.checkpointing.model_files import ModelFiles
from dpofast.checkpointing.sharded import load_sharded_optimizer, load_sharded_weights, save_sharded, whole_weights
from dpofast.cli.main import main
from tests.support.resume_cases import CASES, SHARDED, killed_on_ranks, on_ranks
from tests.support.tiny import tiny_dataset, tiny_model
from tests.support.tiny_training import SAVING, losses_of, make_trainer, weights_of

pytestmark = pytest.mark.slow(60)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folder of a run of which the second rank was killed in its eighth step, and how both ended."""
    folder = tmp_path_factory.mktemp("killed")
    return folder / "full", killed_on_ranks(folder, 2, {"kill": ["step", 8, 1]}, SHARDED)


@pytest.fixture(scope="module")
def resumed(written, killed, tmp_path_factory):
    folder, _ = written("sharded")
    cases = {name: {**case, "source": f"{folder}/{name}/checkpoint-5"} for name, case in CASES.items()}
    cases["killed"] = {"source": f"{killed[0]}/checkpoint-5"}
    return on_ranks(tmp_path_factory.mktemp("resumed"), 2, cases, SHARDED)


@pytest.mark.parametrize("case", [*CASES, "killed"])
def test_resumed_to_the_last_bit(written, resumed, case):
    for before, after in zip(written("sharded")[1], resumed, strict=True):
        expected, found = before[case if case in CASES else "full"], after[case]
        assert found["logs"] == expected["logs"] and found["warnings"] == []
        assert all(torch.equal(w, expected["weights"][name]) for name, w in found["weights"].items())


def test_a_killed_rank_ends_the_others_and_leaves_a_whole_checkpoint(killed):
    folder, codes = killed
    assert codes[1] == -9 and codes[0] not in (0, None)
    assert newest_whole(folder) == (folder / "checkpoint-5", [])


@pytest.mark.parametrize("case", CASES)
def test_shards_hold_what_save_model_writes_and_no_more(written, tmp_path, case):
    folder = written("sharded")[0] / case
    (saved,) = (folder / "end").glob("*.safetensors")
    expected, found = load_file(saved), whole_weights(folder / "checkpoint-10")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    assert main(["export", str(folder / "checkpoint-10"), str(tmp_path / "out")]) == 0
    assert load_file(tmp_path / "out" / saved.name).keys() == expected.keys()
    assert {path.name for path in (folder / "checkpoint-10" / "sharded").iterdir()} == {
        *(".metadata", "__0_0.distcp", "__1_0.distcp")
    }
    assert not list((folder / "checkpoint-10").glob("*.safetensors"))


# ---- one process ----------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(monkeypatch):
    """Let one process write shards too."""
    monkeypatch.setattr(ModelFiles, "writes_shards", True)


def test_best_model_and_rotation(shards, tmp_path):
    options = {
        **{**SAVING, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "save_total_limit": 1},
        "metric_for_best_model": "lengths/rejected",  # the first one: all are equal
    }
    trainer = make_trainer(tmp_path, evaluation=tiny_dataset(4, seed=1), **options)
    trainer.train()
    assert trainer.state.best_global_step == 2
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    best = whole_weights(tmp_path / "checkpoint-2")
    assert all(torch.equal(weight, best[name]) for name, weight in trainer.model.state_dict().items())


def test_a_full_disk_is_reported_and_the_next_save_works(shards, tmp_path, monkeypatch):
    from torch.distributed.checkpoint import FileSystemWriter

    original, failures = FileSystemWriter.write_data, iter([OSError(28, "No space left on device")])

    def write(*args):
        for failure in failures:
            raise failure
        return original(*args)

    monkeypatch.setattr(FileSystemWriter, "write_data", write)
    with pytest.warns(
        UserWarning, match="checkpoint of step 2 could not be written: rank 0: .*No space left on device"
    ):
        make_trainer(tmp_path, **SAVING).train()
    assert sorted(path.name for path in tmp_path.glob("*checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]


def test_a_damaged_shard_is_passed_over(shards, tmp_path):
    whole = make_trainer(tmp_path, **SAVING)
    whole.train()
    (shard,) = (tmp_path / "checkpoint-6" / "sharded").glob("*.distcp")
    os.truncate(shard, 1000)
    trainer = make_trainer(tmp_path, **SAVING)
    before = weights_of(trainer)
    with pytest.raises(
        DamagedCheckpoint, match="sharded/__0_0.distcp has 1000 bytes, and .*newest whole checkpoint is"
    ):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert torch.equal(weights_of(trainer), before)
    with pytest.warns(UserWarning, match="passed over: .*__0_0.distcp"):
        trainer.train(resume_from_checkpoint="latest")
    assert losses_of(trainer) == losses_of(whole) and torch.equal(weights_of(trainer), weights_of(whole))
    verify(tmp_path / "checkpoint-6")


def test_frozen_weights_of_a_model_are_there_and_states_only_of_what_has_some(tmp_path):
    model = tiny_model()
    model.lm_head.requires_grad_(False)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW([{"params": trained[:3]}, {"params": trained[3:], "weight_decay": 0.0}], lr=0.1)
    trained[0].grad = torch.ones_like(trained[0])
    optimizer.step()
    save_sharded(model, optimizer, tmp_path)
    assert whole_weights(tmp_path).keys() == model.state_dict().keys()

    other = tiny_model()
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(1.0)
    other.lm_head.requires_grad_(False)
    its = [weight for weight in other.parameters() if weight.requires_grad]
    fresh = torch.optim.AdamW([{"params": its[:3]}, {"params": its[3:]}], lr=0.2)
    load_sharded_weights(other, tmp_path)
    load_sharded_optimizer(other, fresh, tmp_path)
    assert all(torch.equal(weight, other.state_dict()[name]) for name, weight in model.state_dict().items())
    assert list(fresh.state) == [its[0]]
    assert all(torch.equal(fresh.state[its[0]][key], value) for key, value in optimizer.state[trained[0]].items())
    assert [group["lr"] for group in fresh.param_groups] == [0.1, 0.1] and fresh.param_groups[1]["weight_decay"] == 0.0

    with pytest.raises(
        ValueError, match=r"expected the weights of LlamaForCausalLM in its shards, 0 are missing .* 9 unkn"
    ):
        load_sharded_weights(tiny_model(num_hidden_layers=2), tmp_path)
    with pytest.raises(ValueError, match=r"expected .* in the shape \(97, 64\), got \(97, 32\)"):
        load_sharded_weights(tiny_model(hidden_size=64), tmp_path)
    with pytest.raises(
        ValueError, match=r"optimizer_groups.pt: expected groups of \[\d+\] weights as in this run, got"
    ):
        load_sharded_optimizer(other, torch.optim.AdamW(other.parameters()), tmp_path)


def test_an_optimizer_with_states_of_another_shape_is_refused(tmp_path):
    model = tiny_model()
    optimizer = torch.optim.Adafactor(model.parameters())
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    with pytest.raises(
        ValueError, match=r"optim: Adafactor keeps row_var .* of .*, which is not sharded as the weight"
    ):
        save_sharded(model, optimizer, tmp_path)


def test_only_descriptions_of_tensors_are_unpickled(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    (tmp_path / "sharded").mkdir()
    Path(tmp_path, "sharded", ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(
        ValueError, match="expected descriptions of tensors by torch .*system does not describe a tensor"
    ):
        whole_weights(tmp_path)
    assert not (tmp_path / "ran").exists()
