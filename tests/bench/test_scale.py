"""bench.scale: what is counted on ranks, and bench/roofline's formulas of the same against it."""

import json

import pytest
import torch
from torch import nn

from bench.roofline import layers
from bench.roofline.divided import Division, exchanges
from bench.roofline.models import ModelShape
from bench.roofline.work import Pairs, packed
from bench.scale import __main__ as scale
from bench.scale import loading, rank, table
from bench.scale.counts import Collectives, Saved
from bench.scale.modes import MODES, PROFILES, alone

SHORT = PROFILES["short"]
SHAPE = ModelShape(
    layers=SHORT.layers,
    hidden=SHORT.hidden,
    intermediate=SHORT.intermediate,
    heads=SHORT.heads,
    kv_heads=SHORT.kv_heads,
    head_dim=SHORT.hidden // SHORT.heads,
    vocab=SHORT.vocab,
)
DIVISIONS = {
    "one": Division(devices=1, sharded=False),
    "ddp2": Division(devices=2, sharded=False),
    "fsdp2": Division(devices=2),
    "fsdp4": Division(devices=4),
    "tp2": Division(devices=2, tensor=2),
    "tp2-fsdp": Division(devices=4, tensor=2),
    "sp2": Division(devices=2, sequence=2, sharded=False),
    "sp4": Division(devices=4, sequence=4, sharded=False),
    "sp2-fsdp": Division(devices=4, sequence=2),
}
KINDS = {"weights": "all-gather", "gradients": "reduce-scatter", "rows": "all-to-all"}


def calls_of_steps():
    """What all ranks together run in each step."""
    rows, names = SHORT.rows(), ("prompt_ids", "chosen_ids", "rejected_ids")
    steps = [rows[start : start + SHORT.pairs] for start in range(0, len(rows), SHORT.pairs)]
    return [packed(Pairs(*(tuple(len(row[name]) for row in step) for name in names)), 10**9)[0][0] for step in steps]


def saved_bytes(call, division):
    """What autograd saves on one rank: eager layers in float32, their attention, the last norm, dW of the head."""
    part = division.layer_part(SHAPE)
    share = 1 / division.groups / division.sequence
    every = layers.EAGER["float32"].saved.total(SHAPE, call.positions * share)
    # between a layer's divided products
    halved = (1 - 1 / division.tensor) * SHAPE.layers * call.positions * share
    every -= halved * (16 * SHAPE.intermediate + 8 * SHAPE.queries + 8 * SHAPE.keys)
    keys = SHAPE.layers * 2 * 4 * part.keys * call.gathered * share  # copied for each response
    norm = 2 * 4 * SHAPE.hidden * call.positions * share
    rows = SHAPE.layers * division.kept_rows(SHAPE, call.positions * share, 4)
    return every + keys + norm + rows + 4 * part.vocab * SHAPE.hidden


def check_counts(name, ranks):
    """The formulas of a division against what ranks counted."""
    division = DIVISIONS[name]
    most = {kind: max(each["bytes"][kind] for each in ranks) for kind in ranks[0]["bytes"]}
    assert most["weights"] == pytest.approx(4 * division.weights(SHAPE), rel=0.002)
    if name != "tp2":  # whose embedding's gradient lies in a whole one
        assert most["gradients"] == pytest.approx(4 * division.trained(SHAPE, 0), rel=0.002)
    assert most["optimizer"] == pytest.approx(8 * division.trained(SHAPE, 0), rel=0.002)
    assert most["gathered"] <= 4 * division.gathered(SHAPE, 1) * 1.002
    calls = calls_of_steps()
    largest = max(saved_bytes(call, division) for call in calls)
    # Processes have about as many positions, not exactly.
    assert most["activations"] == pytest.approx(largest, rel=0.03 if division.groups == 1 else 0.06)
    for found in exchanges(SHAPE, division, calls[-1].positions / division.groups, width=4):
        # The embedding that tensor parallelism divides is gathered for the backward too, with log-sum-exps of the head.
        allowed = 0.08 if found.what == "weights" and division.tensor > 1 else 0.03
        kind = "all-reduce" if found.times == 2 else KINDS[found.what]
        assert ranks[0]["exchanges"][kind]["sent"] == pytest.approx(found.sent, rel=allowed), found


def run(folder, name):
    rank.write_model(folder / "model", SHORT)
    return rank.run(folder, "short", name)


def test_one_process_and_two_that_shard(tmp_path):
    """The formulas hold, losses are equal, and two ranks hold half."""
    one, two = run(tmp_path / "one", "one"), run(tmp_path / "two", "fsdp2")
    check_counts("one", one)
    check_counts("fsdp2", two)
    assert all(each["losses"] == pytest.approx(one[0]["losses"], abs=1e-5) for each in two)
    sizes = rank.checkpoint_bytes(tmp_path / "two")
    assert 4 * SHAPE.weights() < sizes["weights"] < sizes["all"]


@pytest.mark.ranks
@pytest.mark.parametrize("name", [name for name in DIVISIONS if name not in ("one", "fsdp2")])
def test_formulas_of_each_division(name, tmp_path):
    check_counts(name, run(tmp_path, name))


def test_what_autograd_saves_is_counted_once_and_weights_are_not():
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.ReLU(), nn.Linear(16, 4, bias=False))
    saved = Saved(model)
    assert saved.resident() == 4 * (8 * 16 + 16 * 4)
    with saved:
        given = torch.randn(5, 8)
        loss = model(given).sum()
        # the input, and what ReLU returns, which two nodes save
        assert saved.peak == 4 * 5 * (8 + 16)
        loss.backward()
        model(given[:1]).sum().backward()
    assert saved.peak == 4 * 5 * (8 + 16)
    assert saved.gathered == 0
    expected = torch.autograd.grad(model(given[:1]).sum() + model(given).sum(), model[0].weight)[0]
    torch.testing.assert_close(model[0].weight.grad, expected)


def test_exchanges_are_counted_by_kind(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with Collectives() as exchanged:
            torch.distributed.all_reduce(torch.ones(6))
            torch.distributed.all_reduce(torch.ones(3, dtype=torch.float64))
            torch.distributed.all_gather_into_tensor(torch.empty(4), torch.ones(4))
    finally:
        torch.distributed.destroy_process_group()
    assert exchanged.figures() == {
        "all-gather": {"calls": 1, "bytes": 16, "sent": 0},
        "all-reduce": {"calls": 1, "bytes": 24, "sent": 0},
        "numbers": {"calls": 1, "bytes": 24, "sent": 0},
    }


def counted(losses, activations=2048):
    sizes = dict.fromkeys(table.HELD, 1024) | {"activations": activations, "gathered": 0}
    exchanges = {"all-gather": {"calls": 3, "bytes": 4096, "sent": 2048}}
    return [{"losses": losses, "grad_norms": losses, "bytes": sizes, "exchanges": exchanges}]


def test_other_losses_are_no_result(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(rank, "run", lambda folder, profile, name: counted([0.5, 0.4 + 2e-5 * (name != "one")]))
    monkeypatch.setattr(rank, "checkpoint_bytes", lambda folder: {"all": 1, "weights": 1})
    results = tmp_path / "scale.jsonl"
    assert scale.main(["--modes", "ddp2", "--results", str(results)]) == 1
    assert "ddp2: expected the losses of one process within 1e-05" in capsys.readouterr().err
    assert not results.exists()


def test_the_record_and_its_table(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(rank, "run", lambda folder, profile, name: counted([0.5], 2048 if name == "one" else 512))
    monkeypatch.setattr(rank, "checkpoint_bytes", lambda folder: {"all": 5120, "weights": 1024})
    results = tmp_path / "scale.jsonl"
    assert scale.main(["--modes", "sp4", "--results", str(results)]) == 0
    (record,) = map(json.loads, results.read_text().splitlines())
    assert record["command"].startswith("python -m bench.scale --modes sp4")
    assert list(record["figures"]["modes"]) == ["one", "sp4"]
    assert "0 (0.25x)" in capsys.readouterr().out
    text = table.scale_table(tmp_path)
    assert "| SP 4 | 4 | 1 (1.00x) | 0 | 1 (1.00x) | 1 (1.00x) | 0 (0.25x) |" in text
    assert "3 all-gather 2" in text
    assert table.scale_table(tmp_path / "none") == "No run is recorded yet."


def test_every_mode_has_one_process_to_be_compared_with():
    for name in MODES:
        assert MODES[alone(MODES[name])].world == 1
    for profile in PROFILES.values():
        assert set(profile.modes) <= set(MODES)
        assert all(profile.pairs % (MODES[name].world // MODES[name].sharing) == 0 for name in profile.modes)


@pytest.mark.ranks
def test_weights_of_files_are_no_memory_of_a_process(tmp_path):
    assert loading.main(["--layers", "4", "--results", str(tmp_path / "loading.jsonl")]) == 0
    (record,) = map(json.loads, (tmp_path / "loading.jsonl").read_text().splitlines())
    mapped, converted = (record["figures"]["bytes"][way] for way in loading.WAYS)
    share = mapped["its float32 share"]
    assert mapped["loaded"] < 0.1 * share < converted["loaded"] / 18
    assert max(mapped["sharded"], mapped["reference log-probs computed"]) < 1.2 * share
