"""dpofast train and info as a user calls them; everything wrong is one message, exit code 2, and nothing written."""

import json
import math
import re
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM

from dpofast.cli.load_models import four_bits
from dpofast.cli.main import main
from tests.support.tiny import TEXT_ROWS as ROWS
from tests.support.tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.slow(100)


def test_train_leaves_a_model_metrics_and_a_picture(run, tmp_path):
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:4]))
    code, out, err, output = run(
        ROWS[4:], "--eval_data", str(held_out), "--eval_strategy", "epoch", "--num_train_epochs", "2",
        "--learning_rate", "0.01",
    )  # fmt: skip
    assert code == 0, err
    assert AutoModelForCausalLM.from_pretrained(output).config.vocab_size == 97
    entries = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert sum("loss" in entry for entry in entries) == 4
    assert any("eval_rewards/accuracies" in entry for entry in entries)
    assert (output / "training.png").read_bytes().startswith(b"\x89PNG")
    assert "line 1" in (output / "report.html").read_text()
    assert "16 of 16 pairs kept" in out and str(output) in out


def test_the_report_is_written_unless_it_is_declined(run):
    code, out, err, output = run(ROWS, "--no_html_report")
    assert code == 0 and not (output / "report.html").exists() and "report.html" not in out, err


def test_the_saved_config_is_the_loaded_one_and_standard_error_stays_empty(tmp_path, model_dir):
    # In a process of its own: bars and warnings of the libraries go past pytest's capture.
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    options = ["--use_cpu", "--report_to", "none", "--activation_checkpointing", "--save_strategy", "no"]
    arguments = ["--model", model_dir, "--data", data, "--eval_data", data, "--output_dir", tmp_path / "out"]
    ran = subprocess.run(
        [sys.executable, "-m", "dpofast", "train", *map(str, arguments), *options], capture_output=True, text=True
    )
    assert ran.returncode == 0 and ran.stderr == "", ran.stderr
    configs = [json.loads((folder / "config.json").read_text()) for folder in (model_dir, tmp_path / "out")]
    assert configs[0] == configs[1] and configs[0]["use_cache"] is True


def test_a_yaml_file_gives_options_and_flags_win(run, tmp_path):
    config = tmp_path / "train.yaml"
    config.write_text("num_train_epochs: 5\nbeta: 0.5\nmax_tokens: 64\n")
    code, _, err, output = run(ROWS, "--config", str(config), "--num_train_epochs", "1")
    assert code == 0, err
    steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    assert len(steps) == 3


def test_lora_trains_and_saves_an_adapter(run):
    code, _, err, output = run(ROWS, "--lora_r", "2")
    assert code == 0, err
    assert (output / "adapter_model.safetensors").exists()


def test_bad_rows_are_skipped_only_when_asked(run):
    rows = [*ROWS, {"prompt": "3", "chosen": " 4", "rejected": " 4"}, b'{"prompt": "3"\n']
    code, _, err, _ = run(rows)
    assert code == 2 and "pairs.jsonl" in err and ("line 21" in err or "line 22" in err)
    code, out, err, _ = run(rows, "--on_bad_row", "skip")
    assert code == 0, err
    assert "20 of 22 pairs kept" in out


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"prompt": "3 4", "chosen": " 5"}, "line 21.*rejected"),
        ({"prompt": "3 4", "chosen": "", "rejected": " 5"}, "line 21.*chosen"),
        ({"prompt": "3 4", "chosen": " 5", "rejected": " 5"}, "line 21"),
        ({"prompt": "3 " * 40, "chosen": " 5", "rejected": " 6"}, "line 21.*max_length"),
        (b'{"prompt": "3 4", "chosen": " \xff", "rejected": " 5"}\n', "line 21.*UTF-8"),
        (b'{"prompt": "3 4", "chosen": " 5", "rej', "line 21"),
    ],
    ids=["missing-column", "empty-response", "equal", "long-prompt", "non-utf-8", "truncated"],
)
def test_a_bad_row_is_one_message_with_file_and_row(run, bad, message):
    code, out, err, output = run([*ROWS, bad], "--max_length", "32")
    assert code == 2
    (line,) = [line for line in err.splitlines() if line.startswith("dpofast: error:")]
    assert "pairs.jsonl" in line and re.search(message, line), line
    assert "Traceback" not in err and not output.exists()


def test_missing_files_and_models(run, tmp_path, model_dir):
    code, _, err, output = run(None)
    assert code == 2 and "pairs.jsonl" in err and "no such file" in err
    code, _, err, _ = run(ROWS, model=tmp_path / "nowhere")
    assert code == 2 and "nowhere: no such file or folder" in err
    bare = tmp_path / "bare"
    tiny_model().save_pretrained(bare)
    code, _, err, _ = run(ROWS, model=bare)
    assert code == 2 and "bare: no tokenizer can be loaded" in err
    encoder = tmp_path / "encoder"
    BertForMaskedLM(
        BertConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    ).save_pretrained(encoder)
    tiny_tokenizer().save_pretrained(encoder)
    code, _, err, _ = run(ROWS, model=encoder)
    assert code == 2 and "encoder: " in err and "BertForMaskedLM" in err
    assert not output.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--beta", "0"], "beta: expected a positive finite number, got 0"),
        (["--loss_type", "dop"], "loss_type: expected one of"),
        (["--dtype", "int8"], "dtype: expected one of"),
        (["--max_tokens", "0"], "max_tokens: expected at least 1"),
        (["--config", "nowhere.yaml"], "config: nowhere.yaml: cannot be read: No such file"),
        (["--loss_type", "ipo", "--loss_type", "sft"], "--loss_type: given twice (first as --loss_type)"),
        (["--loss_type", "ipo", "--loss_type", "sft"], "give all values to one: --loss_type A B"),
        (["--beta", "0.1", "--beta=0.2"], "--beta=0.2: given twice (first as --beta), and only one can hold"),
        (["--max-length", "9", "--max_length", "8"], "--max_length: given twice (first as --max-length)"),
        (["--lora_r", "-1"], "lora_r: expected 0 (train all weights) or a rank of 1 or more, got -1"),
        (["--lora_r", "2", "--lora_alpha", "0"], "lora_alpha: expected 1 or more, got 0"),
        (["--lora_alpha", "32"], "lora_alpha: 32 has no effect without an adapter"),
        (["--lora_dropout", "0.1"], "lora_dropout: 0.1 has no effect without an adapter: add its rank, --lora_r 16"),
        (["--use_rslora"], "use_rslora: True has no effect without an adapter"),
        (["--lora_target_modules", "q_proj"], "has no effect without an adapter"),
        (["--lora_r", "2", "--lora_dropout", "0.1"], "has no effect while disable_dropout sets every dropout to 0"),
        (["--lora_r", "2", "--lora_dropout", "1"], "lora_dropout: expected a number in [0, 1), got 1.0"),
        (["--lora_r", "2", "--lora_target_modules", "nowhere"], "nowhere"),
        (["--optim", "adamw_8bit"], "bitsandbytes"),
        (["--loss_type", "dpo"], "got ['dpo']; did you mean sigmoid (DPO's own loss)?"),
        (["--loss_type", "sigmod"], "did you mean sigmoid?"),
        (["--resume", "latest"], "out has no run.yaml"),
        (["--load_in_4bit"], "load_in_4bit: 4-bit weights cannot be trained themselves"),
        (["--early_stopping_patience", "2"], "early_stopping_patience: needs held-out pairs"),
        (["--early_stopping_patience", "0", "--eval_data", "x"], "early_stopping_patience: expected 1 or more"),
        (["--ref_model", "nowhere"], "nowhere (no such folder, so a hub name): no causal language model"),
        (["--conf", "nowhere.yaml"], "unknown: --conf nowhere.yaml"),
        (["--fp16"], "fp16: needs a GPU"),
        (["--num_train_epochs", "0"], "num_train_epochs: expected more than 0"),
        (["--max_steps", "0"], "max_steps: expected 1 or more, or -1 for num_train_epochs, got 0"),
        (["--preview", "-1"], "preview: expected a number of rows to print, got -1"),
    ],
)
def test_bad_options(run, flags, message):
    code, _, err, output = run(ROWS, *flags)
    assert code == 2 and message in err and not output.exists()


def test_a_yaml_key_that_stands_twice_is_refused(run, tmp_path):
    config = tmp_path / "train.yaml"
    config.write_text("beta: 0.5\nmax_steps: 3\nbeta: 0.1\n")
    code, _, err, output = run(ROWS, "--config", str(config))
    assert code == 2 and "train.yaml: beta stands there twice" in err and not output.exists()


def test_an_unknown_yaml_key_is_named_with_its_file(run, tmp_path):
    config = tmp_path / "train.yaml"
    config.write_text("betta: 0.5\n")
    code, _, err, output = run(ROWS, "--config", str(config))
    assert code == 2 and f"unknown: --betta 0.5 (from {config})" in err and not output.exists()


def test_an_unknown_best_metric_is_refused_with_those_that_exist(run, tmp_path):
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:4]))
    flags = ("--eval_data", str(held_out), "--load_best_model_at_end", "--save_strategy", "epoch")
    code, _, err, output = run(ROWS, *flags, "--eval_strategy", "epoch", "--metric_for_best_model", "accuracy")
    assert code == 2 and "metric_for_best_model: expected one of displacement, " in err and "got 'accuracy'" in err
    assert "rewards/accuracies" in err and not (output / "model.safetensors").exists()


def test_early_stopping_ends_a_run_that_gets_no_better(run, tmp_path):
    held_out = tmp_path / "held-out.jsonl"  # the opposite of what is trained: its loss only rises
    rows = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in ROWS[:4]]
    held_out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--eval_data", str(held_out), "--eval_strategy", "steps", "--eval_steps", "1", "--learning_rate", "1e-3")
    code, _, err, output = run(ROWS, *flags, "--early_stopping_patience", "2", "--num_train_epochs", "9")
    assert code == 0, err
    steps = [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 3  # the first evaluation is the best, and two in a row are worse


def test_a_reference_of_another_name(run, tmp_path):
    other = tmp_path / "other"
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    model.save_pretrained(other)
    code, _, err, output = run(ROWS, "--ref_model", str(other))
    assert code == 0, err
    first = json.loads((output / "metrics.jsonl").read_text().splitlines()[0])
    assert abs(first["rewards/chosen"]) > 1e-4
    code, _, err, _ = run(ROWS, "--ref_model", str(other), model=other)
    assert code == 2 and "is the model itself, which is the reference by default" in err


def test_pickled_weights_are_refused_with_the_way_to_convert_them(run, tmp_path):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    folder = tmp_path / "pickled"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    code, _, err, output = run(ROWS, model=folder)
    assert code == 2 and not output.exists()
    assert "pickled: its weights are pickles (pytorch_model.bin)" in err and "use_safetensors=False" in err


def test_an_adapter_is_trained_on_and_is_its_own_reference(run, tmp_path, capsys):
    code, _, err, output = run(ROWS, "--lora_r", "2", "--learning_rate", "1e-2")
    assert code == 0, err
    first = output.rename(tmp_path / "first")
    before = load_file(first / "adapter_model.safetensors")
    code, _, err, output = run(ROWS, "--learning_rate", "1e-2", model=first)
    assert code == 0, err
    after = load_file(output / "adapter_model.safetensors")
    assert set(after) == set(before) and all(not after[name].equal(before[name]) for name in before)
    entries = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    # at the first step the policy is its reference, the adapter included
    assert entries[0]["loss"] == pytest.approx(math.log(2), abs=1e-5) and abs(entries[0]["rewards/chosen"]) < 1e-5
    assert json.loads((output / "adapter_config.json").read_text())["r"] == 2
    evaluated = ["eval", "--model", str(output), "--data", str(tmp_path / "pairs.jsonl"), "--output", "json"]
    assert main(evaluated) == 2  # by default it would be compared with the base model
    assert f"trained on from the adapter in {first}: name its reference" in capsys.readouterr().err
    assert main([*evaluated, "--ref_model", str(first)]) == 0
    margin = json.loads(capsys.readouterr().out)["metrics"]["margin"]["value"]
    assert margin > entries[0]["rewards/margins"] + 1e-3
    code, _, err, _ = run(ROWS, "--lora_r", "4", model=first)
    assert code == 2 and "lora_r: " in err and "holds an adapter of its own" in err


def test_the_options_of_an_adapter_reach_it(run):
    flags = ("--lora_r", "2", "--lora_alpha", "8", "--use_rslora", "--lora_target_modules", "q_proj", "v_proj")
    code, _, err, output = run(ROWS, *flags, "--lora_dropout", "0.1", "--no_disable_dropout")
    assert code == 0, err
    saved = json.loads((output / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"], saved["lora_dropout"], saved["use_rslora"]) == (2, 8, 0.1, True)
    assert sorted(saved["target_modules"]) == ["q_proj", "v_proj"]


def test_attention_of_the_models_own_is_chosen_and_an_unknown_one_refused(run):
    code, _, err, _ = run(ROWS, "--attn_implementation", "nonsense")
    assert code == 2 and "nonsense" in err and "Traceback" not in err
    code, _, err, output = run(ROWS, "--attn_implementation", "eager", "--padded")
    assert code == 0, err
    assert yaml.safe_load((output / "run.yaml").read_text())["attn_implementation"] == "eager"


def test_four_bits_need_bitsandbytes(run, monkeypatch):
    monkeypatch.setattr("transformers.utils.is_bitsandbytes_available", lambda: False)
    code, _, err, output = run(ROWS, "--lora_r", "2", "--load_in_4bit")
    assert code == 2 and "load_in_4bit: needs bitsandbytes, which is not installed" in err and not output.exists()
    monkeypatch.setattr("transformers.utils.is_bitsandbytes_available", lambda: True)
    config = four_bits(torch.bfloat16)
    assert config.load_in_4bit and config.bnb_4bit_quant_type == "nf4" and config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_compute_dtype == torch.bfloat16


def test_an_optimizer_whose_package_is_missing_is_one_message_before_anything_is_written(run, monkeypatch):
    def missing(context):
        raise ImportError("You need to install `bitsandbytes`\n")

    monkeypatch.setitem(transformers.trainer._OPTIMIZER_HANDLERS, "adamw_8bit", missing)
    code, _, err, output = run(ROWS, "--optim", "adamw_8bit")
    assert code == 2 and err == "dpofast: error: You need to install `bitsandbytes`\n" and not output.exists()


def test_data_without_a_row_that_can_be_used_counts_the_reasons(run):
    code, _, err, _ = run([b"{\n", b"[1]\n", b"nonsense\n"], "--on_bad_row", "skip")
    assert code == 2 and "no row can be used" in err and "0 of 3 pairs kept" in err
    assert "skipped 2: not valid JSON (line 1, 3)" in err and "skipped 1: not a JSON object (line 2)" in err
    code, _, err, _ = run([{**row, "chosen": row["rejected"]} for row in ROWS], "--on_bad_row", "skip")
    assert code == 2 and "skipped 20: chosen and rejected are equal (line 1, 2" in err


def test_unknown_options_and_commands(run, capsys):
    code, _, err, _ = run(ROWS, "--betta", "1")
    assert code == 2 and "--betta" in err and "--help" in err and "usage" not in err
    assert main(["tarin"]) == 2
    assert "expected a command among train, eval, score, export, tune, demo, info" in capsys.readouterr().err
    assert main([]) == 2 and main(["--help"]) == 0
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0 and {"--max_tokens", "--padded"} <= set(capsys.readouterr().out.split())


def test_the_version(capsys):
    assert main(["--version"]) == 0
    assert re.fullmatch(r"dpofast \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


def test_misspelled_commands_and_flags_name_the_nearest(run, capsys):
    assert main(["trian"]) == 2 and "got 'trian'; did you mean train?" in capsys.readouterr().err
    code, _, err, _ = run(ROWS, "--learning-rat", "1")
    assert code == 2 and "unknown: --learning-rat 1; did you mean --learning_rate?" in err
    code, _, err, _ = run(ROWS, "--dataset_name", "x")
    assert code == 2 and "did you mean --data?" in err
    code, _, err, _ = run(ROWS, "--no_share_prompts")
    assert code == 2 and "did you mean --share?" in err


def test_max_tokens_below_a_pair_and_the_reports_warnings_are_said_in_a_line_each(run):
    long = [{"prompt": f"{i} 4 5", "chosen": " 6 7 8 9" + f" {i}" * 9, "rejected": " 7 8 9"} for i in range(10, 34)]
    code, out, err, output = run(long, "--max_tokens", "8", "--max_length", "10")
    assert code == 0, err
    assert "max_tokens: 8 is less than the 12 positions of a long pair" in err and len(err.splitlines()) == 1
    assert "warnings (what to try is in report.html):\n" in out and "\n  Many responses were cut (truncation)\n" in out


def test_info_names_the_path(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert "backend torch: no GPU" in printed and "hybrids      packed, by tree-recurrence 0.1" in printed
    assert "attention    float32: sdpa: segment by segment; not varlen: it needs an NVIDIA GPU" in printed


def test_held_out_pairs_are_evaluated_without_being_asked(run, tmp_path):
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:4]))
    code, _, err, output = run(ROWS[4:], "--eval_data", str(held_out), "--num_train_epochs", "1")
    assert code == 0 and "eval_loss" in (output / "metrics.jsonl").read_text(), err


def test_names_that_steer_a_terminal_are_printed_escaped(run, tmp_path, model_dir):
    evil = tmp_path / "m\x1b]0;title\x07"
    shutil.copytree(model_dir, evil)
    config = json.loads((evil / "config.json").read_text())
    (evil / "config.json").write_text(json.dumps({**config, "architectures": ["\x1b[2J"]}))
    code, out, err, _ = run(ROWS, model=evil)
    assert code == 2 and r"m\x1b]0;title\x07: no causal" in err and "\x1b" not in out + err
    assert run([{"\x1b[2J": 1}])[0] == 2
