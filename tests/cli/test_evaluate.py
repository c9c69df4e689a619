"""dpofast eval: the trainer's own numbers for full and adapter checkpoints, intervals, JSON, and refusals."""

import json
import re

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM

from dpofast import DPOConfig, DPOTrainer, load_preferences
from dpofast.cli.main import main
from tests.support.tiny import save_tiny, tiny_tokenizer

pytestmark = pytest.mark.slow(30)

ROWS = [
    {"prompt": f"{i} 4 5", "chosen": " 6 8" + f" {i}" * (i % 3), "rejected": " 7 9" + " 3" * (i % 4)}
    for i in range(10, 40)
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base model, a full and an adapter checkpoint that were trained from it, and held-out pairs."""
    folder = tmp_path_factory.mktemp("eval")
    base, data = save_tiny(folder / "base"), folder / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    shared = ["--use_cpu", "--report_to", "none", "--learning_rate", "3e-3", "--max_steps", "6", "--no_html_report"]
    for name, flags in (("full", []), ("adapter", ["--lora_r", "4"])):
        arguments = ["--model", str(base), "--data", str(data), "--output_dir", str(folder / name)]
        assert main(["train", *arguments, *shared, *flags]) == 0
    return folder


def evaluated(capsys, folder, model, *flags):
    """The JSON that dpofast eval prints for a model of these folders."""
    capsys.readouterr()
    code = main(
        ["eval", "--model", str(folder / model), "--data", str(folder / "pairs.jsonl"), "--output", "json", *flags]
    )
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out)


def trainers_numbers(folder, model, output, **options):
    trainer = DPOTrainer(
        model,
        ref_model=AutoModelForCausalLM.from_pretrained(folder / "base"),
        args=DPOConfig(output_dir=str(output), report_to="none", use_cpu=True, disable_tqdm=True, **options),
        eval_dataset=load_preferences(folder / "pairs.jsonl"),
        processing_class=tiny_tokenizer_of(folder),
    )
    return trainer.evaluate()


def tiny_tokenizer_of(folder):
    return type(tiny_tokenizer()).from_pretrained(folder / "base")


@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "sigmoid_norm"])
def test_a_full_checkpoint_has_the_numbers_of_the_trainers_evaluation(folders, capsys, tmp_path, kind):
    found = evaluated(
        capsys, folders, "full", "--ref_model", str(folders / "base"), "--beta", "0.3", "--loss_type", kind
    )
    expected = trainers_numbers(
        folders, AutoModelForCausalLM.from_pretrained(folders / "full"), tmp_path, beta=0.3, loss_type=kind
    )
    metrics = found["metrics"]
    for name, theirs in (
        ("accuracy", "rewards/accuracies"),
        ("margin", "rewards/margins"),
        ("loss", "loss"),
        ("reward_chosen", "rewards/chosen"),
        ("chosen_below_reference", "displacement"),
        ("accuracy_length_balanced", "length/accuracy_balanced"),
        ("longer_response_preferred", "length/longer_preferred"),
    ):
        assert metrics[name]["value"] == pytest.approx(expected[f"eval_{theirs}"], abs=1e-5), name
        assert metrics[name]["low"] <= metrics[name]["value"] <= metrics[name]["high"]
    assert found["length"]["preferred_tokens"] == pytest.approx(expected["eval_lengths/preferred"])
    assert metrics["accuracy"]["count"] == found["data"]["pairs"] == len(ROWS)
    assert abs(metrics["margin"]["value"]) > 0.01


def test_an_adapter_is_measured_against_its_base(folders, capsys):
    found = evaluated(capsys, folders, "adapter")
    named = evaluated(capsys, folders, "adapter", "--ref_model", str(folders / "base"))
    assert found["metrics"]["margin"]["value"] > 0.001
    assert found["metrics"]["margin"] == pytest.approx(named["metrics"]["margin"], abs=1e-6)


def test_reference_log_probs_of_the_data_are_used(folders, capsys, tmp_path):
    data = tmp_path / "scored.jsonl"
    scores = {"ref_chosen_logps": -100.0, "ref_rejected_logps": -1.0}
    data.write_text("".join(json.dumps({**row, **scores}) + "\n" for row in ROWS))
    assert main(["eval", "--model", str(folders / "full"), "--data", str(data), "--output", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["accuracy"]["value"] == 1.0


def test_without_a_reference_rewards_are_log_probs(folders, capsys):
    for model in ("full", "adapter"):
        found = evaluated(capsys, folders, model, "--no_reference", "--loss_type", "simpo", "--beta", "2")
        assert found["metrics"]["reward_chosen"]["value"] < -5 and "chosen_below_reference" not in found["metrics"]


def test_the_table_says_it_for_people(folders, capsys):
    data = str(folders / "pairs.jsonl")
    assert main(["eval", "--model", str(folders / "adapter"), "--data", data, "--bf16"]) == 0
    printed = capsys.readouterr().out
    assert "30 of 30 pairs kept" in printed and "95 % interval" in printed and "accuracy, length-balanced" in printed
    assert "The chosen response is the longer one in" in printed


def test_a_model_against_itself_ties_everywhere(folders, capsys):
    flags = ["--model", str(folders / "base"), "--ref_model", str(folders / "base")]
    assert main(["eval", *flags, "--data", str(folders / "pairs.jsonl")]) == 0
    printed = capsys.readouterr().out
    assert "In 30 of 30 pairs the two rewards tie, which is not accurate: is --ref_model the model itself?" in printed
    assert evaluated(capsys, folders, "base", *flags[2:])["data"]["ties"] == 30
    assert re.search(r"ties +│ +1\.000", printed) and re.search(r"accuracy +│ +0\.000", printed)


def test_one_pair_and_pairs_of_one_sided_lengths_say_what_they_cannot_show(folders, capsys):
    model = ["--model", str(folders / "full"), "--ref_model", str(folders / "base")]
    one = folders / "one.jsonl"
    one.write_text(json.dumps({"prompt": "3 4", "chosen": " 5 6 7", "rejected": " 8"}) + "\n")
    assert main(["eval", *model, "--data", str(one)]) == 0
    printed = capsys.readouterr().out
    assert "A mean over one pair has no interval." in printed and re.search(r"margin +│ +[+-]\d\.\d+ │ +- │", printed)
    assert "No pair's chosen response is the shorter one, so accuracy cannot be told from a preference" in printed


def test_one_pair_has_means_without_an_interval(folders, capsys, tmp_path):
    data = tmp_path / "one.jsonl"
    data.write_text(json.dumps(ROWS[0]))
    assert main(["eval", "--model", str(folders / "adapter"), "--data", str(data), "--output", "json"]) == 0
    margin = json.loads(capsys.readouterr().out)["metrics"]["margin"]
    assert margin["value"] != 0 and margin["low"] is margin["high"] is None
    assert main(["eval", "--model", str(folders / "adapter"), "--data", str(data)]) == 0
    assert "nan" not in capsys.readouterr().out


def test_pairs_of_equal_lengths_have_no_length_to_speak_of(folders, capsys, tmp_path):
    data = tmp_path / "equal.jsonl"
    data.write_text("".join(json.dumps({**row, "chosen": " 6", "rejected": " 7"}) + "\n" for row in ROWS))
    assert main(["eval", "--model", str(folders / "adapter"), "--data", str(data)]) == 0
    printed = capsys.readouterr().out
    assert "nan" not in printed and "longer" not in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "is no adapter, so its reference must be named"),
        (["--ref_model", "BASE", "--beta", "0"], "beta: expected a positive number, got 0"),
        (["--ref_model", "BASE", "--output", "csv"], "output: expected 'table' or 'json', got 'csv'"),
        (["--ref_model", "BASE", "--no_reference"], "no_reference: leave it out"),
        (["--no_reference"], "loss_type: 'sigmoid' has a reference"),
        (["--ref_model", "BASE", "--loss_type", "dop"], "--loss_type: kind: expected one of"),
        (["--ref_model", "BASE", "--dtype", "int8"], "dtype: expected one of"),
        (["--ref_model", "BASE", "--max_tokens", "0"], "max_tokens: expected at least 1"),
        (["--ref_model", "BASE", "--beta", "1", "--beta", "2"], "--beta: given twice"),
        (["--ref_model", "nowhere"], "nowhere (no such folder, so a hub name)"),
        (["--ref_model", "OTHER"], "ref_model: expected the model's vocabulary of 97 tokens, got 64"),
    ],
)
def test_refusals(folders, capsys, tmp_path, flags, message):
    if "OTHER" in flags:
        model = AutoModelForCausalLM.from_pretrained(folders / "base")
        model.resize_token_embeddings(64)
        model.save_pretrained(tmp_path / "other")
    flags = [{"BASE": str(folders / "base"), "OTHER": str(tmp_path / "other")}.get(flag, flag) for flag in flags]
    code = main(["eval", "--model", str(folders / "full"), "--data", str(folders / "pairs.jsonl"), *flags])
    assert code == 2 and message in capsys.readouterr().err


def test_weights_that_are_not_finite_are_named_with_the_row(folders, capsys, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folders / "base")
    flags = ["--data", str(folders / "pairs.jsonl"), "--ref_model", str(folders / "base")]
    tiny_tokenizer_of(folders).save_pretrained(tmp_path)
    model.get_input_embeddings().weight.data[2] = float("nan")  # the third pair is the first with a 2
    model.save_pretrained(tmp_path)
    assert main(["eval", "--model", str(tmp_path), *flags]) == 2
    assert "pairs.jsonl, line 3: its log-probs under" in capsys.readouterr().err
    model.lm_head.weight.data[6] = float("nan")
    model.save_pretrained(tmp_path)
    assert main(["eval", "--model", str(tmp_path), *flags]) == 2
    assert "its own log-probs are not finite on a few random ids" in capsys.readouterr().err


def test_a_damaged_adapter_is_one_message(folders, capsys, tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folders / "adapter" / name).read_bytes())
    data = str(folders / "pairs.jsonl")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x01")
    assert main(["eval", "--model", str(tmp_path), "--data", data]) == 2
    assert "its adapter cannot be loaded" in capsys.readouterr().err
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    assert main(["eval", "--model", str(tmp_path), "--data", data]) == 2
    assert "its weights are pickles (adapter_model.bin)" in capsys.readouterr().err
    (tmp_path / "adapter_model.bin").rename(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    assert main(["eval", "--model", str(tmp_path), "--data", data]) == 2
    assert "expected the adapter's base model as base_model_name_or_path" in capsys.readouterr().err


def test_token_ids_need_no_text(folders, capsys, tmp_path):
    rows = [{"prompt_ids": [3, 4], "chosen_ids": [5, i], "rejected_ids": [6, i]} for i in range(7, 20)]
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "ids"))
    assert main(["eval", "--model", str(folders / "adapter"), "--data", str(tmp_path / "ids"), "--output", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["data"]["pairs"] == 13
