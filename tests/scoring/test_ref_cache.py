"""Cached reference log-probs: equal to live ones, computed once, never stale, and intact after a kill."""

import copy
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from dpofast import DPOConfig, DPOTrainer, attach_logprob_head, reference
from dpofast.data.formats import REF_COLUMNS
from dpofast.scoring import ref_cache, ref_store
from dpofast.scoring.fingerprints import ResponseFingerprints, first_equal, model_fingerprint
from dpofast.scoring.ref_cache import add_reference_columns
from dpofast.scoring.score import Forward
from tests.support.thread_ranks import in_threads
from tests.support.tiny import tiny_dataset, tiny_model, tiny_pairs

FORWARD = Forward(max_tokens=64, device=torch.device("cpu"))
WINDOW = 5


@pytest.fixture
def model():
    return attach_logprob_head(tiny_model())


@pytest.fixture
def computed(monkeypatch):
    """The number of rows of every window that the model computes."""
    rows, plain = [], ref_cache.response_logps

    def counting(table, *args):
        rows.append(len(table))
        return plain(table, *args)

    monkeypatch.setattr(ref_cache, "response_logps", counting)
    return rows


def columns_of(dataset, model, folder, forward=FORWARD, **options):
    result = add_reference_columns(dataset, model, forward, cache_dir=folder, **{"window": WINDOW, **options})
    assert all(result.features[name].dtype == "float32" for name in REF_COLUMNS)
    return np.stack([result[name] for name in REF_COLUMNS], 1).astype(np.float32)


def shards_in(folder):
    return sorted(Path(folder).glob("*/*.safetensors"))


def truth(model, examples, ld_alpha=None):
    """By the model's own padded logits; with ld_alpha, tokens past the shorter response count ld_alpha times."""
    rows = []
    for example in examples:
        sides = [(example["prompt_ids"], example[name]) for name in ("chosen_ids", "rejected_ids")]
        with torch.no_grad():
            logps = reference.padded_logprobs(model, **reference.padded_rows(sides))
        lengths = [len(response) for _, response in sides]
        weights = [
            [1.0 if i < min(lengths) or ld_alpha is None else ld_alpha for i in range(length)] for length in lengths
        ]
        rows.append([float(p @ torch.tensor(w)) for p, w in zip(logps.split(lengths), weights, strict=True)])
    return np.array(rows, np.float32)


@pytest.mark.parametrize("folder", [None, "cache"])
def test_the_columns_are_the_models_own_log_probs(tmp_path, model, folder):
    folder = folder and tmp_path / folder
    dataset, examples = tiny_dataset(13), tiny_pairs(13)
    for ld_alpha in (None, 0.25, 0.0):
        ours = columns_of(dataset, model, folder, ld_alpha=ld_alpha)
        np.testing.assert_allclose(ours, truth(model, examples, ld_alpha), atol=2e-5)
    model.train()
    columns_of(dataset, model, folder)
    assert model.training


def test_a_second_run_computes_nothing_whatever_its_ld_alpha(tmp_path, model, computed):
    dataset = tiny_dataset(13)
    first = columns_of(dataset, model, tmp_path)
    assert computed == [5, 5, 3]
    assert np.array_equal(columns_of(dataset, copy.deepcopy(model), tmp_path), first)
    weighted = columns_of(dataset, model, tmp_path, ld_alpha=0.5)
    assert computed == [5, 5, 3]
    assert np.array_equal(weighted, columns_of(dataset, model, None, ld_alpha=0.5))


def test_equal_responses_are_stored_once_and_have_one_number_everywhere(tmp_path, model):
    prompt, first, second, third = [5, 6, 7], [8, 9], [10, 11, 12], [13]
    # With two rows a window the same responses meet in several windows.
    pairs = [(first, second), (second, third), (third, first), (first, third), (second, first)]
    dataset = Dataset.from_list([{"prompt_ids": prompt, "chosen_ids": c, "rejected_ids": r} for c, r in pairs])
    sums = columns_of(dataset, model, tmp_path, window=2)
    numbers = {}
    for row, pair in zip(sums, pairs, strict=True):
        for value, response in zip(row, pair, strict=True):
            assert numbers.setdefault(tuple(response), value) == value
    sizes = [len(ref_store.safetensors.numpy.load(path.read_bytes())["cu_targets"]) - 1 for path in shards_in(tmp_path)]
    assert sizes == [3, 2, 2]


def test_first_equal():
    checksums = np.array([[1, 2], [3, 4], [1, 2], [1, 3], [3, 4], [1, 2]], np.uint64)
    assert first_equal(checksums).tolist() == [0, 1, 0, 3, 1, 0]
    # Where the prompt ends makes a difference, and so does the side's content, not the side.
    rows = [([1, 2], [3], [4]), ([1], [2, 3], [4]), ([1, 2], [4], [3])]
    dataset = Dataset.from_list(
        [dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), row, strict=True)) for row in rows]
    )
    assert ResponseFingerprints.of(dataset).first_equal().tolist() == [0, 1, 2, 3, 1, 0]


def changes():
    def weights(model):
        model.model.norm.weight.data[3] += 1e-3

    def config(model):
        model.config.rms_norm_eps = 1e-3

    def buffer(model):
        model.model.rotary_emb.inv_freq[0] += 0.5

    return {"weights": weights, "config": config, "buffer": buffer}


@pytest.mark.parametrize("change", changes().values(), ids=changes())
def test_another_model_has_another_checksum(model, change):
    other = copy.deepcopy(model)
    assert model_fingerprint(other) == model_fingerprint(model)
    other.config.use_cache = not other.config.use_cache
    other.config.pad_token_id = 7
    assert model_fingerprint(other) == model_fingerprint(model)
    change(other)
    assert model_fingerprint(other) != model_fingerprint(model)


def test_any_weight_of_a_large_tensor_counts():
    model = tiny_model(vocab_size=200_000)  # 25.6 MB: seven pieces
    before = model_fingerprint(model)
    model.lm_head.weight.data.view(torch.int32)[-1, -1] ^= 1
    assert model_fingerprint(model) != before
    assert model_fingerprint(model.to(torch.bfloat16)) != model_fingerprint(model.to(torch.float16))


def test_a_sharded_model_has_the_checksum_of_the_whole_one(tmp_path):
    model = tiny_model()
    whole = model_fingerprint(model)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        sharded = distribute_tensor(model.lm_head.weight.detach(), mesh, [Shard(0)])
        model.lm_head.weight = torch.nn.Parameter(sharded)
        assert model_fingerprint(model) == whole
    finally:
        dist.destroy_process_group()


def test_an_adapter_counts_where_it_is_switched_on():
    base = model_fingerprint(tiny_model())
    lora = LoraConfig(r=2, target_modules="all-linear", modules_to_save=["norm"], task_type="CAUSAL_LM")
    peft = get_peft_model(tiny_model(), lora)
    active = model_fingerprint(peft)
    assert active != base
    with peft.disable_adapter():
        assert model_fingerprint(peft) == base
        with torch.no_grad():
            for name, weight in peft.named_parameters():
                if "lora_B" in name or "modules_to_save" in name:
                    weight.fill_(0.1)
        assert model_fingerprint(peft) == base
    trained = model_fingerprint(peft)
    assert trained not in (base, active)
    # What another adapter holds does not matter as long as it is not in use.
    peft.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj"]))
    assert model_fingerprint(peft) == trained
    peft.set_adapter("other")
    assert model_fingerprint(peft) not in (base, active, trained)
    peft.set_adapter("default")
    assert model_fingerprint(peft) == trained
    peft.peft_config["default"].lora_alpha = 99
    assert model_fingerprint(peft) not in (base, trained)


def other_tokens(dataset, model, forward):
    examples = dataset.to_list()
    examples[7]["rejected_ids"][-1] = 3 + (examples[7]["rejected_ids"][-1] - 2) % 90
    return Dataset.from_list(examples), model, forward


def other_model(dataset, model, forward):
    other = copy.deepcopy(model)
    other.lm_head.weight.data[0, 0] += 1e-3
    return dataset, other, forward


def other_dtype(dataset, model, forward):
    autocast = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
    return dataset, model, Forward(max_tokens=64, device=forward.device, autocast=autocast)


@pytest.mark.parametrize(
    "change", [other_tokens, other_model, other_dtype, None], ids=["tokens", "model", "dtype", "version"]
)
def test_what_is_stale_is_not_used_and_refused_where_it_is_named(
    tmp_path, model, computed, monkeypatch, request, change
):
    name = request.node.callspec.id
    dataset = tiny_dataset(13)
    columns_of(dataset, model, tmp_path)
    (cache,) = tmp_path.iterdir()
    kept = {path.name: path.read_bytes() for path in cache.iterdir()}
    assert np.array_equal(columns_of(dataset, model, cache), columns_of(dataset, model, tmp_path))
    assert computed == [5, 5, 3]
    if change is None:
        monkeypatch.setattr(ref_cache, "ENGINE_VERSION", ref_cache.ENGINE_VERSION + 1)
        asked = dataset, model, FORWARD
    else:
        asked = change(dataset, model, FORWARD)
    with pytest.raises(
        ValueError, match=f"belong to another {name} .{name}: .* there, .* here.: name the folder above"
    ):
        columns_of(asked[0], asked[1], cache, asked[2])
    fresh = columns_of(asked[0], asked[1], None, asked[2])
    assert np.array_equal(columns_of(asked[0], asked[1], tmp_path, asked[2]), fresh)
    assert computed == [5, 5, 3] * 3
    assert {path.name: path.read_bytes() for path in cache.iterdir()} == kept


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "first byte": lambda path, folder: flip(path, 0.0),
    "a byte": lambda path, folder: flip(path, 0.6),
    "last byte": lambda path, folder: flip(path, 1.0),
    "short": lambda path, folder: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path, folder: path.write_bytes(b""),
    "of other rows": lambda path, folder: path.write_bytes(shards_in(folder)[0].read_bytes()),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_shard_is_named_and_computed_again(tmp_path, model, computed, damage):
    dataset = tiny_dataset(13)
    whole = columns_of(dataset, model, tmp_path)
    (_, path, _) = shards_in(tmp_path)
    content = path.read_bytes()
    damage(path, tmp_path)
    with pytest.warns(UserWarning, match=rf"{path.name}: damaged, its checksum .*; its 5 rows are computed again"):
        assert np.array_equal(columns_of(dataset, model, tmp_path), whole)
    assert computed == [5, 5, 3, 5]
    assert path.read_bytes() == content


def test_a_shard_of_another_cache_is_not_used(tmp_path, model):
    dataset = tiny_dataset(13)
    columns_of(dataset, other_model(dataset, model, FORWARD)[1], tmp_path)
    (stranger, *_) = shards_in(tmp_path)
    whole = columns_of(dataset, model, tmp_path)
    (mine,) = {path for path in shards_in(tmp_path) if path.name.startswith("0000000000")} - {stranger}
    mine.unlink()
    stranger.rename(mine.with_name(stranger.name))
    with pytest.warns(UserWarning, match="its checksum does not match"):
        assert np.array_equal(columns_of(dataset, model, tmp_path), whole)


def test_a_shard_that_cannot_be_read_is_named(tmp_path, model, monkeypatch):
    dataset = tiny_dataset(13)
    whole = columns_of(dataset, model, tmp_path)
    path, plain = shards_in(tmp_path)[0], Path.read_bytes

    def broken(self):
        if self == path:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return plain(self)

    monkeypatch.setattr(Path, "read_bytes", broken)
    with pytest.warns(UserWarning, match=rf"{path.name}: cannot be read \(Input/output error\)"):
        assert np.array_equal(columns_of(dataset, model, tmp_path), whole)


@pytest.mark.parametrize("content", [b"", b"[]", b"{\xff", b'{"tokens": 1}'])
def test_a_damaged_manifest(tmp_path, model, content):
    dataset = tiny_dataset(13)
    whole = columns_of(dataset, model, tmp_path)
    (manifest,) = tmp_path.glob("*/manifest.json")
    good = manifest.read_bytes()
    manifest.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"its manifest.json is damaged|belong to another tokens, model, dtype, version"
    ):
        columns_of(dataset, model, manifest.parent)
    shards_in(tmp_path)[0].unlink()
    assert np.array_equal(columns_of(dataset, model, tmp_path), whole)
    assert manifest.read_bytes() == good
    assert set(json.loads(good)) == {"format", "tokens", "model", "dtype", "version"}


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path, model):
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match=r"cannot be stored in .*file.* \(Not a directory\): they stay in memory"):
        ours = columns_of(tiny_dataset(13), model, tmp_path / "file" / "cache")
    assert np.array_equal(ours, columns_of(tiny_dataset(13), model, None))


def test_a_disk_that_fills_up_loses_nothing(tmp_path, model, computed, monkeypatch):
    dataset, plain, calls = tiny_dataset(13), os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 4:  # the manifest's file and folder, the first shard's
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return plain(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(UserWarning, match="No space left on device.*another one will compute again") as caught:
        whole = columns_of(dataset, model, tmp_path)
    assert len(caught) == 1 and computed == [5, 5, 3]
    monkeypatch.undo()
    (cache,) = tmp_path.iterdir()
    assert sorted(path.name[:10] for path in cache.iterdir()) == ["0000000000", "manifest.j"], "no half shard, no rest"
    assert np.array_equal(columns_of(dataset, model, tmp_path), whole)
    assert len(shards_in(tmp_path)) == 3


def test_what_a_killed_run_left_aside_is_removed_once_it_is_old(tmp_path, model):
    dataset = tiny_dataset(13)
    columns_of(dataset, model, tmp_path)
    (cache,) = tmp_path.iterdir()
    (cache / ".tmp-old").touch()
    (cache / ".tmp-new").touch()
    os.utime(cache / ".tmp-old", (0, 0))
    shards_in(tmp_path)[0].unlink()
    columns_of(dataset, model, tmp_path)
    assert [path.name for path in cache.glob(".tmp-*")] == [".tmp-new"]


def test_ranks_share_the_windows(tmp_path, model, computed):
    dataset = tiny_dataset(23)
    first, second = in_threads(lambda ranks: columns_of(dataset, model, tmp_path, ranks=ranks))
    assert sorted(computed) == [3, 5, 5, 5, 5]
    assert np.array_equal(first, second)
    assert np.array_equal(first, columns_of(dataset, model, tmp_path)) and len(computed) == 5


def test_ranks_get_what_they_cannot_read_from_those_that_can(tmp_path, model, computed):
    dataset = tiny_dataset(23)
    expected = columns_of(dataset, model, None)
    computed.clear()
    folders = [tmp_path / "one machine", tmp_path / "another"]
    for _ in range(2):  # the second time each machine finds its own windows
        for found in in_threads(lambda ranks: columns_of(dataset, model, folders[ranks.rank], ranks=ranks)):
            assert np.array_equal(found, expected)
        assert sorted(computed) == [3, 5, 5, 5, 5]
    assert [len(shards_in(folder)) for folder in folders] == [3, 2]
    shards_in(folders[0])[0].unlink()
    in_threads(lambda ranks: columns_of(dataset, model, folders[ranks.rank], ranks=ranks))
    assert len(computed) == 6
    in_threads(lambda ranks: columns_of(dataset, model, None, ranks=ranks))  # without a cache
    assert len(computed) == 11


def test_the_progress_bar_starts_where_the_last_run_stopped(tmp_path, model, monkeypatch):
    dataset, bars = tiny_dataset(13), []
    columns_of(dataset, model, tmp_path)
    shards_in(tmp_path)[1].unlink()
    plain = ref_cache.tqdm
    monkeypatch.setattr(ref_cache, "tqdm", lambda **options: bars.append(plain(**options)) or bars[-1])
    columns_of(dataset, model, tmp_path, description="reference")
    assert [(bar.initial, bar.total, bar.n) for bar in bars] == [(8, 13, 13)]
    assert "reference" in bars[0].desc


@pytest.mark.slow(15)
def test_a_run_that_is_killed_goes_on(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2]), "OMP_NUM_THREADS": "1"}
    child = subprocess.run(
        [sys.executable, "-m", "tests.support.kill_reference", tmp_path],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert child.returncode == 0, child.stdout


def train(output_dir, *, dataset=None, **options):
    args = {"max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1, "report_to": "none", "use_cpu": True}
    args |= {"save_strategy": "no", "disable_tqdm": True, "learning_rate": 1e-2}
    trainer = DPOTrainer(
        tiny_model(),
        args=DPOConfig(output_dir=str(output_dir), **{**args, **options}),
        train_dataset=dataset or tiny_dataset(),
        eval_dataset=tiny_dataset(5, seed=1),
    )
    trainer.train()
    return trainer


@pytest.mark.slow(7)
def test_runs_that_share_a_folder_compute_once(tmp_path, computed):
    shared = str(tmp_path / "shared")
    first = train(tmp_path / "a", ref_cache_dir=shared)
    assert computed == [12, 5], "train and eval data"
    losses = [entry["loss"] for entry in first.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-6)
    for options in (
        {"beta": 0.5},
        {"loss_type": "ipo"},
        {"ld_alpha": 0.3},
        {"max_tokens": 32},
        {"share": "none"},
    ):
        train(tmp_path / "b", ref_cache_dir=shared, **options)
    assert computed == [12, 5]
    train(tmp_path / "b", ref_cache_dir=shared, bf16=True)
    train(tmp_path / "b", ref_cache_dir=shared, padded=True)
    train(tmp_path / "b", ref_cache_dir=shared, dataset=tiny_dataset(11))
    assert computed == [12, 5] + [12, 5] * 2 + [11]
    assert not (tmp_path / "a" / "reference").exists()


def test_the_cache_lies_beside_the_run_unless_told_otherwise(tmp_path, computed):
    first, second = train(tmp_path), train(tmp_path)
    assert computed == [12, 5]
    assert len(list((tmp_path / "reference").iterdir())) == 2
    for one, two in zip(first.state.log_history, second.state.log_history, strict=True):
        assert one.get("loss") == two.get("loss")


def test_at_the_first_step_the_margin_is_0(tmp_path):
    trainer = train(tmp_path, dataset=tiny_dataset(300))
    first = trainer.state.log_history[0]
    assert first["rewards/margins"] == pytest.approx(0.0, abs=1e-6)
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6)
