"""bench/roofline's prediction for many GPUs: what a division leaves on one of them, and which it chooses."""

import pytest

from bench.roofline import __main__ as command
from bench.roofline import scale_tables
from bench.roofline.devices import DEVICES, GIB
from bench.roofline.divided import Division, Exchange, exchanges
from bench.roofline.models import MODELS
from bench.roofline.scale import divisions, each_division, model_bytes, predict
from bench.roofline.step import Setting
from bench.roofline.work import Pairs

LARGE, EXPERTS = MODELS["llama-3.1-70b"][1], MODELS["qwen3-235b-a22b"][1]
H100 = DEVICES["H100"]


def setting(**changes):
    pairs = Pairs.make(32, 16_384, 8192, 8192)
    return Setting(**{"model": LARGE, "pairs": pairs, "device": H100, "devices": 64, "epochs": 3, **changes})


def test_weights_of_a_mixture_of_experts():
    assert EXPERTS.weights() == pytest.approx(235.1e9, rel=1e-3)
    assert EXPERTS.active_weights() == pytest.approx(22.2e9, rel=1e-3)
    assert LARGE.active_weights() == LARGE.weights()


def test_bytes_of_weights_gradients_and_optimizer_divide_by_gpus():
    count = LARGE.weights()
    held = model_bytes(setting(), Division(devices=64, sequence=4))
    assert held["optimizer"] == pytest.approx(8 * count / 64)
    layers = 2 * 2 * (LARGE.layer_weights() + 2 * LARGE.hidden)  # two of them, in bfloat16
    assert held["weights"] == pytest.approx(4 * count / 64 + layers)
    assert held["gradients"] == pytest.approx(4 * count / 64 + layers)
    divided = model_bytes(setting(), Division(devices=64, tensor=8))
    assert divided["optimizer"] == pytest.approx(8 * count / 64, rel=1e-3)  # norms are copied
    assert divided["weights"] - 4 * count / 64 == pytest.approx(layers / 8, rel=0.01)
    adapter = model_bytes(setting(lora=16), Division(devices=64))
    trained = LARGE.lora_weights(16) / 64
    assert (adapter["gradients"], adapter["optimizer"]) == (4 * trained, 8 * trained)
    assert adapter["weights"] == pytest.approx(2 * count / 64 + 4 * trained + layers)


def test_a_group_of_rows_divides_activations_and_head():
    alone, shared = (predict(setting(), Division(devices=8, sequence=k)) for k in (1, 8))
    extra = (LARGE.queries + 2 * LARGE.keys) * 32_766 / 8 * 2 * LARGE.layers
    assert shared.memory["activations"] == pytest.approx(alone.memory["activations"] / 8 + extra, rel=1e-3)
    assert shared.memory["head"] < alone.memory["head"] / 6
    assert Division(devices=8, sequence=8).key_copies(EXPERTS) == 2


def test_what_is_exchanged():
    found = {e.what: e for e in exchanges(LARGE, Division(devices=16, sequence=2), 1000, micro_batches=3)}
    passes = 2 * LARGE.weights() - LARGE.vocab * LARGE.hidden
    assert found["weights"].size == 3 * 2 * passes and found["weights"].ranks == 16
    assert found["gradients"].size == 3 * 4 * LARGE.weights()
    assert found["rows"].sent == 2 * LARGE.layers * 500 * (2 * LARGE.queries + 2 * LARGE.keys) * 2 / 2
    (hidden,) = exchanges(LARGE, Division(devices=8, tensor=8), 1000, repeated=True)
    assert hidden.sent == 2 * (8 * LARGE.layers + 1) * 1000 * LARGE.hidden * 2 * 7 / 8


def test_seconds_inside_a_node_and_between_nodes():
    rows = Exchange(what="rows", size=1e9, ranks=8)
    assert rows.seconds(H100, Division(devices=64, sequence=8)) == pytest.approx(1e9 * 7 / 8 / 450e9 / 0.8)
    rows = Exchange(what="rows", size=1e9, ranks=16)
    assert rows.seconds(H100, Division(devices=64, sequence=16)) == pytest.approx(1e9 / 2 / 50e9 / 0.8)
    weights = Exchange(what="weights", size=1e9, ranks=64)  # once a node, over all its adapters
    assert weights.seconds(H100, Division(devices=64)) == pytest.approx(1e9 * 7 / 8 / 400e9 / 0.8)
    part = Exchange(what="weights", size=1e9, ranks=8)  # the eighth that each GPU of a node gathers for itself
    assert part.seconds(H100, Division(devices=64, tensor=8)) == pytest.approx(1e9 * 7 / 8 / 50e9 / 0.8)


def test_only_what_heads_pairs_and_gpus_allow():
    names = {division.name for division in divisions(setting(model=EXPERTS))}
    assert "FSDP2" not in names  # 32 pairs on 64 GPUs
    assert {"TP 2 x FSDP2", "TP 4 x FSDP2", "SP 64 x FSDP2", "SP 2 x DDP"} <= names
    assert "TP 8 x FSDP2" not in names  # four key heads
    assert not list(divisions(setting(model=MODELS["llama-3.1-8b"][1], devices=2048)))


def test_the_fastest_that_fits_comes_first_and_small_memory_is_said():
    found = each_division(setting(devices=32))
    fits = [each.fits for each in found]
    assert fits == sorted(fits, reverse=True)
    assert found[0].seconds == min(each.seconds for each in found if each.fits)
    assert all(each.peak <= 0.92 * 80 * GIB for each in found if each.fits)
    assert not each_division(setting(devices=8))[0].fits


def test_offloading_leaves_two_layers_and_fills_the_processors_memory():
    division = Division(devices=64, sequence=2)
    kept, moved = (
        predict(setting(lora=16, **{"checkpointing": True}), division, offloaded=offloaded)
        for offloaded in (False, True)
    )
    states = 32_766 / 2 * LARGE.hidden * 2
    assert moved.host == LARGE.layers * states and kept.host == 0
    assert kept.memory["activations"] - moved.memory["activations"] == (LARGE.layers - 2) * states
    assert moved.name == "SP 2 x FSDP2, offloaded" and kept.name == "SP 2 x FSDP2, recomputed"


def test_the_command(monkeypatch, capsys):
    arguments = ["--scale", "--model", "llama-3.1-70b", "--devices", "16", "--pairs", "8", "--lora", "16"]
    assert command.main([*arguments, "--lengths", "16384/8192/8192"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("PREDICTIONS, not measurements: H100 SXM x 16, 8 pairs a step, LoRA 16")
    assert "SP 16 x FSDP2" in said and "TP 8 x FSDP2" in said
    assert command.main([*arguments[:4], "16384", "--pairs", "1"]) == 2
    assert "expected a number that the pairs and heads can be divided over" in capsys.readouterr().err
    monkeypatch.setattr(scale_tables, "GPUS", (512,))
    monkeypatch.setattr(scale_tables, "MODELS_SHOWN", {"llama-3.1-8b": "Llama-3.1-8B"})
    assert command.main(["--scale", "--device", "H200"]) == 0
    said = capsys.readouterr().out
    assert "H200" in said and "no way to divide so few pairs" in said
    with pytest.raises(SystemExit):
        command.main(["--scale", "--pairs", "3"])
    assert "expected no other option with --scale but --device, without --model, got --pairs" in capsys.readouterr().err
