"""bench/roofline: its counts are those of real models and heads, its arithmetic is what its pages say."""

import json
import math
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from bench.cases import RESULTS
from bench.cost import Cost
from bench.head.problem import MODES, Problem, run
from bench.roofline import __main__ as command
from bench.roofline import heads, layers, published, results, work
from bench.roofline.calls import flops
from bench.roofline.devices import DEVICES, GIB, Device, exchange_seconds, find_device
from bench.roofline.models import MODEL_TYPES, MODELS, find_model, from_config
from bench.roofline.step import DPOFAST, IMPLEMENTATIONS, NAIVE, TRL, Setting, best, predict, strategy
from bench.roofline.work import Call, Pairs
from dpofast import PreferenceLoss, attach_logprob_head, pack
from dpofast.model.attach import PackedPreference
from tests.support.layer_traffic import layer_traffic

TINY = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
}
FLOAT = layers.PRECISIONS["float32"]
ROWS, WIDTH = 4, 9
PADDED = Call(positions=ROWS * WIDTH, targets=20, sequences=ROWS, width=WIDTH, visible=ROWS * WIDTH**2)


def head_call(shape, call, precision=FLOAT, *, grad=True, trained=True):
    device = DEVICES["H100"]
    return heads.HeadCall(model=shape, call=call, precision=precision, device=device, grad=grad, trained=trained)


def llama(**changes):
    torch.manual_seed(0)
    return LlamaForCausalLM._from_config(LlamaConfig(**TINY, **changes), attn_implementation="eager")


def count_padded(model):
    """The products of a forward and a backward of all logits."""
    ids = torch.randint(0, TINY["vocab_size"], (ROWS, WIDTH))
    with Cost() as cost:
        model(ids, use_cache=False).logits.float().log_softmax(-1).gather(-1, ids[..., None]).sum().backward()
    return cost


@pytest.mark.parametrize("tied", [False, True])
def test_weights_and_padded_products_are_those_of_a_real_model(tied):
    model = llama(tie_word_embeddings=tied)
    shape = from_config(model.config.to_dict())
    assert shape.weights() == sum(p.numel() for p in model.parameters())
    cost = count_padded(model)
    positions = PADDED.positions
    gemms = layers.forward_gemms(shape, positions) + layers.backward_gemms(shape, positions)
    gemms += heads.full_logits(head_call(shape, PADDED)).gemms
    attention = layers.attention_flops(shape, PADDED.visible)
    # Without flash attention a backward has two products for each of the forward's.
    assert cost.gemm_flops == flops(gemms) + 3 * attention

    def unordered(found):
        totals = Counter()
        for product, times in found.items():
            totals[tuple(sorted(product))] += times
        return totals

    assert set(unordered(cost.gemms) - unordered(gemms)) == {tuple(sorted((WIDTH, shape.head_dim, WIDTH)))}
    assert not unordered(gemms) - unordered(cost.gemms)


@pytest.mark.parametrize("lora", [0, 4])
@pytest.mark.parametrize("again", [False, True])
def test_products_with_an_adapter_and_with_checkpointing(lora, again):
    model = llama()
    shape = from_config(model.config.to_dict())
    whole = model
    if lora:
        whole = get_peft_model(model, LoraConfig(r=lora, target_modules="all-linear", task_type="CAUSAL_LM"))
        assert sum(p.numel() for p in whole.parameters() if p.requires_grad) == shape.lora_weights(lora)
    if again:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    cost = count_padded(whole.train())
    gemms = layers.forward_gemms(shape, PADDED.positions, lora)
    gemms += layers.backward_gemms(shape, PADDED.positions, lora, embedding_grad=again or not lora)
    gemms += heads.full_logits(head_call(shape, PADDED, trained=not lora)).gemms
    if again:
        gemms += layers.recomputed_gemms(shape, PADDED.positions, lora)
    attention = layers.attention_flops(shape, PADDED.visible)
    assert cost.gemm_flops == flops(gemms) + (4 if again else 3) * attention


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_weights_and_products_of_every_model_type_that_is_taken(kind):
    changes = {
        "mistral": {"sliding_window": None},
        "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
        "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 56},
    }
    config = {"model_type": kind, "pad_token_id": 0, **TINY, **changes.get(kind, {})}
    model = AutoModelForCausalLM.from_config(
        CONFIG_MAPPING[kind].from_dict(dict(config)), attn_implementation="eager", experts_implementation="eager"
    )
    shape = from_config(config)
    norms = shape.hidden * (2 * shape.layers + 1)
    assert shape.weights() - norms == sum(p.numel() for p in model.parameters() if p.ndim > 1)
    gemms = layers.forward_gemms(shape, PADDED.positions) + layers.backward_gemms(shape, PADDED.positions)
    gemms += heads.full_logits(head_call(shape, PADDED)).gemms
    assert count_padded(model).gemm_flops == flops(gemms) + 3 * layers.attention_flops(shape, PADDED.visible)


@pytest.mark.parametrize("shared", [True, False])
def test_positions_targets_and_products_of_a_packed_step(shared):
    model = llama()
    shape = from_config(model.config.to_dict())
    pairs = Pairs((5, 7, 3), (4, 2, 6), (3, 5, 2))
    draw = torch.Generator().manual_seed(0)

    def ids(length):
        return torch.randint(0, TINY["vocab_size"], (length,), generator=draw).tolist()

    columns = zip(pairs.prompt, pairs.chosen, pairs.rejected, strict=True)
    examples = [{"prompt_ids": ids(p), "chosen_ids": ids(c), "rejected_ids": ids(r)} for p, c, r in columns]
    (batch,) = pack(examples, share_prompts=shared)
    ((call,),) = work.packed(pairs, 1000, shared=shared)
    assert (call.positions, call.targets) == (batch.num_tokens, batch.num_targets)
    attach_logprob_head(model)
    known = PackedPreference(torch.zeros(batch.num_sequences), PreferenceLoss(), len(pairs))
    with Cost() as cost:
        model(packed=batch, preference=known).loss.backward()
    gemms = layers.forward_gemms(shape, call.positions) + layers.backward_gemms(shape, call.positions)
    gemms += heads.dpofast_on_cpu(head_call(shape, call)).gemms
    # Attention on the CPU is one operator, which is no product to the count.
    assert cost.gemm_flops == flops(gemms)


def test_pairs_of_query_and_key_of_packed_sequences():
    ((call,),) = work.packed(Pairs((3,), (3,), (2,)), 100)
    # prompt 1 + 2 + 3; chosen's two inputs see 4 and 5 keys, rejected's one sees 4
    assert call.visible == 6 + 9 + 4 and call.gathered == 3 + 2 * 3
    parts = work.packed(Pairs.make(10, 20, 30, 40), 256, devices=3)
    assert all(call.positions <= 256 for (call,) in parts)
    assert sum(call.positions for (call,) in parts) == pytest.approx(10 * 88 / 3, abs=len(parts))
    ((whole,),) = work.packed(Pairs((500,), (40,), (60,)), 256)
    assert whole.positions == 500 + 39 + 59


HEADS = {"naive": heads.full_logits, "trl": heads.trl_on_cpu, "liger": heads.liger_on_cpu}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", HEADS)
def test_products_and_peak_of_the_peers_heads(name, mode):
    from bench.head import peers

    pytest.importorskip({"naive": "torch", "trl": "trl", "liger": "liger_kernel"}[name])
    n, d, v, pairs = 192, 16, 40_000, 4
    problem = Problem.make(n, d, v, pairs, torch.float32, torch.device("cpu"))
    head = peers.build(problem, [name])[0][name]
    with Cost() as cost:
        _, grads = run(head, problem, mode)
    rows = n // (2 * pairs)
    call = Call(positions=n, targets=n, sequences=2 * pairs, width=rows + 1, visible=0)
    shape = replace(MODELS["smollm2-135m"][1], hidden=d, vocab=v)
    predicted = HEADS[name](head_call(shape, call, grad=mode != "forward", trained=mode == "trained"))
    assert flops(predicted.gemms) == cost.gemm_flops
    assert predicted.peak == pytest.approx(cost.peak_bytes_beyond(*grads), rel=0.05)


def test_the_head_of_dpofast_is_traced():
    shape, precision = MODELS["llama-3.1-8b"][1], layers.PRECISIONS["bfloat16"]
    call = Call(positions=16_384, targets=8190, sequences=1, width=16_384, visible=0)
    rows = 8192  # of the next multiple
    for grad, trained, units in ((False, False, 1), (True, False, 2), (True, True, 3)):
        cost = heads.dpofast(head_call(shape, call, precision, grad=grad, trained=trained))
        assert flops(cost.gemms) == units * 2 * rows * shape.hidden * shape.vocab
        # float32 logits are read, E is written in 16 bits; beside them hidden states and vectors.
        assert cost.bytes == pytest.approx(rows * shape.vocab * (6 if grad else 4), rel=0.06)
    assert cost.gemms[shape.vocab, rows, shape.hidden] == 1 and cost.operators < 60
    wide = heads.dpofast(head_call(shape, call, layers.PRECISIONS["autocast"]))
    assert wide.bytes - cost.bytes == 6 * shape.hidden * shape.vocab


def test_every_counted_step_on_record_had_the_predicted_products():
    counted = [row.gflops for row in results.compare() if row.line.startswith("step") and row.gflops]
    assert len(counted) >= 30
    for measured, predicted in counted:
        assert predicted == pytest.approx(measured, rel=1e-9)


def test_every_recorded_line_is_predicted_or_named_with_the_reason(capsys):
    rows = results.compare()
    recorded = [json.loads(line)["figures"] for line in (RESULTS / "step.jsonl").read_text().splitlines()]
    assert sum(row.line.startswith("step") for row in rows) == sum(len(figures["engines"]) for figures in recorded)
    assert all((row.seconds is None) == bool(row.why) for row in rows)
    within = [predicted / measured for measured, predicted in (row.seconds for row in rows if row.seconds)]
    assert len(within) > 80 and all(0.4 < ratio < 1.6 for ratio in within)
    assert command.main(["--results"]) == 0
    shown = capsys.readouterr().out
    assert "step: dpofast-live" in shown and "not predicted: the packer computes no product" in shown


def test_lines_of_a_gpu_are_predicted_from_its_entry(tmp_path):
    shape = {"n": 8192, "d": 4096, "v": 128_256, "pairs": 16}
    contender = {"seconds": [0.03], "gemm_units": 2.0, "counted_bytes": 10**9}
    result = {"floor_s": [0.02], "contenders": {"dpofast pairs": contender}}
    piece = {"shape": shape, "mode": "frozen", "result": result}
    gpu = {"name": "NVIDIA H100 80GB HBM3"}
    lines = [
        {"run": "a", "gpu": gpu, "part": "head", "piece": "D 4096, frozen", "figures": piece},
        {"run": "a", "gpu": {"name": "another"}, "part": "head", "piece": "D 4096, frozen", "figures": piece},
        {"run": "a", "gpu": gpu, "part": "rows", "piece": "copy", "figures": {}},
    ]
    records = [{"date": "2027-01-01T00:00:00", "figures": figures} for figures in lines]
    (tmp_path / "gpu.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    head, unknown, rows = results.compare(tmp_path)
    assert head.seconds[0] == 0.03 and 0.022 < head.seconds[1] < 0.027
    assert unknown.why == "no entry for another" and "only heads" in rows.why


class TestLayerBytes:
    """The bytes of eager layers against operators' inputs and outputs, in layers whose attention does nothing."""

    SHAPE = {"hidden_size": 60, "intermediate_size": 84, "num_attention_heads": 6, "num_key_value_heads": 2}

    @pytest.mark.parametrize("name", layers.EAGER)
    def test_forward_backward_saved_and_operators(self, name):
        tokens = 64
        config = LlamaConfig(**{**TINY, **self.SHAPE, "num_hidden_layers": 1})
        shape = from_config(config.to_dict())
        counted = layer_traffic(config, tokens, name)
        expected = layers.EAGER[name]
        for kind in ("forward", "backward", "saved"):
            # Reading a norm's weight once is left out.
            assert getattr(expected, kind).total(shape, tokens) == pytest.approx(counted[kind], rel=2e-3), kind
        assert expected.operators == (counted["forward operators"], counted["backward operators"])

    def test_adapter(self):
        config = LlamaConfig(**{**TINY, **self.SHAPE, "num_hidden_layers": 1})
        shape, tokens = from_config(config.to_dict()), 256
        plain, adapted = (layer_traffic(config, tokens, "float32", lora=lora) for lora in (0, 2))
        forward, backward = layers.PEFT.total(shape, tokens, 4)
        assert adapted["forward"] - plain["forward"] == pytest.approx(forward, rel=0.01)
        assert adapted["backward"] - plain["backward"] == pytest.approx(backward, rel=0.03)
        added = tuple(adapted[f"{way} operators"] - plain[f"{way} operators"] for way in ("forward", "backward"))
        assert added == layers.PEFT.operators

    def test_fused_layers_move_less(self):
        shape = MODELS["llama-3.1-8b"][1]
        for name, precision in layers.PRECISIONS.items():
            eager, fused = layers.EAGER[name], layers.compiled(precision)
            for kind in ("forward", "backward", "saved"):
                ways = (eager, layers.liger(precision), fused)
                most, liger, least = (getattr(way, kind).total(shape, 8192) for way in ways)
                assert least <= liger < most


def test_a_product_takes_its_operations_or_its_bytes_and_whole_waves_of_tiles():
    device = Device(
        name="d", peak_flops=2e12, gemm=0.5, attention=1, bandwidth=2e11, stream=0.5, memory=GIB, multiprocessors=4
    )
    assert device.gemm_seconds(Counter({(512, 1024, 256): 2}), 2) == pytest.approx(2 * 2 * 512 * 1024 * 256 / 1e12)
    # 5 tiles on 4 multiprocessors fill two waves by five eighths; split four ways, 20 parts fill five whole ones.
    assert device._waves_filled(640, 256) == 1
    assert replace(device, multiprocessors=7)._waves_filled(128, 256) == 1
    assert device.gemm_seconds(Counter({(1, 1000, 1000): 1}), 2) == pytest.approx(2 * (1000 + 10**6 + 1000) / 1e11)


def test_collectives_are_bound_by_links_within_a_node_and_by_the_network_between_nodes():
    h100 = DEVICES["H100"]
    assert exchange_seconds(h100, 1, 1e9) == 0
    assert exchange_seconds(h100, 8, 1e9) == pytest.approx(1e9 * 7 / 8 / 450e9 / 0.8)
    assert exchange_seconds(h100, 64, 1e9) == pytest.approx(1e9 * 7 / 8 / 400e9 / 0.8)


def setting(**changes):
    given = {"model": MODELS["llama-3.1-8b"][1], "pairs": Pairs.make(64, 200, 320, 280), "device": DEVICES["H100"]}
    return Setting(**{**given, "lora": 16, **changes})


def test_memory_of_weights_gradients_and_optimizer():
    full = setting(lora=0, precision="autocast", device=DEVICES["B200"])
    count = full.model.weights()
    ours, live = predict(full, DPOFAST).memory, predict(full, TRL).memory
    assert (ours["weights"], ours["gradients"], ours["optimizer"]) == (4 * count, 4 * count, 8 * count)
    assert live["weights"] == 8 * count
    shards = predict(replace(full, devices=64, sharded=True, precision="bfloat16"), DPOFAST).memory
    assert shards["optimizer"] == count / 8
    adapter = setting()
    held = predict(adapter, DPOFAST).memory
    assert held["weights"] == 2 * count + 4 * adapter.trained and held["optimizer"] == 8 * adapter.trained


def test_what_changes_a_step():
    plain = predict(setting(), DPOFAST)
    assert plain.seconds == sum(plain.terms.values()) and plain.bound == "products"
    again = predict(setting(checkpointing=True), DPOFAST)
    assert again.terms["products"] > plain.terms["products"] and again.peak < plain.peak
    third = predict(setting(epochs=3), DPOFAST)
    assert third.terms["reference"] == pytest.approx(plain.terms["reference"] / 3)
    assert predict(setting(epochs=3), TRL).terms["reference"] == predict(setting(), TRL).terms["reference"]
    slow_host = predict(setting(device=replace(DEVICES["H100"], launch=1e-2)), NAIVE)
    assert slow_host.bound == "host"
    shared = predict(setting(), DPOFAST)
    assert predict(setting(), replace(DPOFAST, layout="unshared")).positions > shared.positions
    far = predict(setting(lora=0, devices=64, sharded=True), DPOFAST)
    assert far.terms["communication"] > 0


def test_the_best_step_fits_where_one_does():
    found = {how.name: best(setting(), how) for how in IMPLEMENTATIONS}
    assert all(prediction.fits for prediction in found.values())
    assert found["dpofast"].seconds < min(found[name].seconds for name in ("naive", "trl", "liger"))
    whole = strategy(setting(lora=0))
    assert whole.precision == "autocast" and not best(whole, DPOFAST).fits
    assert strategy(setting(lora=0, devices=8)).sharded and not strategy(setting(devices=8)).sharded


def test_published_figures_are_within_what_the_page_says():
    ratios = [figure.predict()[0] / figure.measured for figure in published.PUBLISHED]
    step, *heads_alone = ratios
    assert all(0.75 < ratio < 1.1 for ratio in heads_alone) and 0.3 < step < 1
    sizes = [(f.predict()[1], f.measured_bytes) for f in published.PUBLISHED if f.measured_bytes]
    assert all(made == pytest.approx(published_bytes, rel=0.1) for made, published_bytes in sizes)
    prediction = published.open_instruct()
    assert prediction.tokens_per_second * 16 * prediction.seconds == pytest.approx(524_288)
    assert published.model_flops_utilization(prediction) * prediction.seconds / 6.19 == pytest.approx(
        published.OPEN_INSTRUCT_MFU, abs=0.02
    )


def test_the_command(capsys, tmp_path):
    assert command.main(["--model", "qwen2.5-0.5b", "--pairs", "8", "--spread", "0.5"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("PREDICTIONS, not measurements")
    assert all(f"\n{name}" in shown for name in ("naive", "trl", "liger", "dpofast"))
    (tmp_path / "config.json").write_text(json.dumps(LlamaConfig(**TINY).to_dict()))
    assert find_model(str(tmp_path)) == from_config(LlamaConfig(**TINY).to_dict())
    assert command.main(["--model", str(tmp_path), "--devices", "2", "--pairs", "4", "--lora", "4"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "none"], "--model: expected one of smollm2-135m, .* or the path of a config.json, got 'none'"),
        (["--model", "qwen2.5-7b", "--device", "T4"], "--device: expected one of A100, .*, got 'T4'"),
        (["--model", "qwen2.5-7b", "--pairs", "4", "--devices", "8"], "as many --pairs as --devices, got 4 and 8"),
        (
            ["--model", "qwen2.5-7b", "--lengths", "0/2/2"],
            "--lengths: expected 1 to 1e9 tokens of each part, got 0/2/2",
        ),
        (["--model", "qwen2.5-7b", "--lengths=9/-1/2"], "--lengths: expected .* got 9/-1/2"),
        (["--model", "qwen2.5-7b", "--lengths", "9/nan/1e300"], "--lengths: expected .* got 9/nan/1e\\+300"),
        (["--model", "qwen2.5-7b", "--spread", "nan"], "--spread: expected a number from 0 to 3, got nan"),
        (["--model", "qwen2.5-7b", "--spread", "inf"], "--spread: expected a number from 0 to 3, got inf"),
        (["--model", "qwen2.5-7b", "--spread", "-1"], "--spread: expected a number from 0 to 3, got -1"),
        (["--results", "/nowhere"], "--results: expected a folder with lines in step.jsonl, .*, got /nowhere"),
    ],
)
def test_what_the_command_refuses(capsys, arguments, message):
    assert command.main(arguments) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "expected the JSON object of a transformers config, got a list"),
        ("hidden_size: 8", "expected the JSON of a transformers config, got none"),
        ('{"model_type": "gpt2", "n_embd": 8}', "expected a model_type whose layers are counted, .*, got 'gpt2'"),
    ],
)
def test_a_file_that_is_refused_is_named(capsys, tmp_path, text, message):
    path = tmp_path / "x.json"
    path.write_text(text)
    assert command.main(["--model", str(path)]) == 2
    assert re.search(f"error: --model {re.escape(str(path))}: {message}", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected --model, --scale or --results"),
        (["--model", "m", "--lengths", "3/4"], "expected PROMPT/CHOSEN/REJECTED"),
        (["--model", "m", "--pairs", "0"], "--pairs, .* of at least 1"),
        (
            ["--results", "--model", "m", "--max-tokens", "9"],
            "no other option with --results, got --model, --max-tokens\n",
        ),
    ],
)
def test_usage_errors(capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        command.main(arguments)
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        *(
            ({**TINY, "model_type": kind}, f"expected a model_type .* gemma, llama, .*, got {kind!r}")
            for kind in ("gpt_neox", "phi", "starcoder2", "deepseek_v3", "gpt_oss", "gemma3_text", "qwen2_moe", None)
        ),
        (
            {"model_type": "llama", "hidden_size": 8},
            "without num_hidden_layers, intermediate_size, num_attention_heads",
        ),
        ({**TINY, "model_type": "llama", "num_attention_heads": "6"}, "that transformers takes for llama, got: "),
        ({**TINY, "model_type": "mistral"}, "all keys, got sliding_window 4096"),
        ({**TINY, "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64}, "got sliding_window 64"),
        ({**TINY, "model_type": "qwen3_moe", "mlp_only_layers": [0]}, "layers that are all alike, got mlp_only_layers"),
        ({**TINY, "model_type": "qwen3_moe", "decoder_sparse_step": 2}, "all alike, got .* a decoder_sparse_step"),
    ],
)
def test_configs_that_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        from_config(config)


def test_what_a_config_leaves_out_is_as_its_type_has_it():
    sizes = {key: TINY[key] for key in TINY if key not in ("num_key_value_heads", "head_dim")}
    gemma, qwen = (from_config({"model_type": kind, **sizes}) for kind in ("gemma", "qwen2"))
    assert gemma.tied and not qwen.tied
    assert (gemma.kv_heads, gemma.head_dim) == (16, 256) and qwen.head_dim == 8
    unused = {"use_sliding_window": False, "sliding_window": 64, "tie_word_embeddings": True}
    assert from_config({"model_type": "qwen2", **sizes, **unused}) == replace(qwen, tied=True)


def test_known_models_have_their_published_sizes():
    billions = {"smollm2-135m": 0.1345, "qwen2.5-0.5b": 0.494, "qwen2.5-7b": 7.62, "olmo-2-7b": 7.30}
    billions |= {"llama-3.1-8b": 8.03, "llama-3.1-70b": 70.55, "mixtral-8x7b": 46.7, "qwen3-235b-a22b": 235.09}
    assert {name: shape.weights() / 1e9 for name, (_, shape) in MODELS.items()} == pytest.approx(billions, rel=2e-3)
    assert find_device("h100") is DEVICES["H100"] and math.isinf(results._cpu(1.0, math.inf).memory)
