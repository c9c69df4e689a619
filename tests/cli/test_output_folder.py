"""The folder of a run: named, locked, refused where another run is in it, and gone on with."""

import json
import re
from pathlib import Path

import pytest
import yaml

from dpofast.cli.main import main
from tests.support.tiny import TEXT_ROWS as ROWS

pytestmark = pytest.mark.slow(30)


def test_a_run_that_was_killed_before_its_first_step_is_just_started_again(run, monkeypatch):
    from dpofast.training.trainer import DPOTrainer

    def killed(self, *args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(DPOTrainer, "train", killed)
        code, _, _, output = run(ROWS)
    assert code == 130 and {entry.name for entry in output.iterdir()} == {"reference"}
    (shard,) = output.glob("reference/*/*.safetensors")
    written = shard.stat().st_ino
    code, _, err, output = run(ROWS)
    assert code == 0, err
    assert shard.stat().st_ino == written


def test_a_run_without_a_folder_to_write_to_is_refused(model_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--model", str(model_dir), "--data", "x.jsonl"]) == 2
    assert "output_dir: name the folder that the run is written to" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("way", ["folder", "checkpoint", "latest"])
def test_a_run_is_gone_on_with_by_its_own_options(run, way, tmp_path, capsys, monkeypatch):
    flags = ("--save_strategy", "steps", "--save_steps", "2", "--learning_rate", "1e-2", "--loss_type", "ipo", "sft")
    code, _, err, output = run(ROWS, *flags, "--max_steps", "2", "--hub_token", "secret")
    assert code == 0, err
    kept = yaml.safe_load((output / "run.yaml").read_text())
    assert kept["loss_type"] == ["ipo", "sft"] and kept["learning_rate"] == 0.01 and "hub_token" not in kept
    assert kept["data"] == str(tmp_path / "pairs.jsonl") and "output_dir" not in kept
    monkeypatch.chdir(tmp_path)
    named = {"folder": ["out"], "checkpoint": ["out/checkpoint-2"], "latest": ["latest", "--output_dir", "out"]}
    assert main(["train", "--resume", *named[way], "--max_steps", "4"]) == 0
    err = capsys.readouterr().err
    assert re.fullmatch(r"dpofast: warning: resuming .*checkpoint-2 as a run of another length: .*\n", err), err
    steps = [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and max(steps) == 4
    assert yaml.safe_load((output / "run.yaml").read_text())["max_steps"] == 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--resume", "latest"], "resume: latest is the newest checkpoint of --output_dir, which is missing"),
        (["--resume", "nowhere"], "has no run.yaml, the options of a run"),
        (["--resume", "latest", "--output_dir", "o", "--config", "c.yaml"], "leave --config out"),
        (["--resume", "o", "--resume_from_checkpoint", "latest"], "leave --resume_from_checkpoint out"),
    ],
)
def test_what_cannot_be_resumed(flags, message, capsys):
    assert main(["train", *flags]) == 2 and message in capsys.readouterr().err


def test_held_out_pairs_that_a_resumed_run_did_not_have_are_said(run, tmp_path):
    flags = ("--save_strategy", "steps", "--save_steps", "2", "--max_steps", "2")
    code, _, err, output = run(ROWS, *flags)
    assert code == 0, err
    (tmp_path / "held-out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:4]))
    code, _, err, _ = run(
        ROWS, *flags, "--eval_data", str(tmp_path / "held-out.jsonl"), "--resume_from_checkpoint", "latest"
    )
    assert code == 0 and "with an eval_dataset, which the run did not have before" in err, err
    assert all(line.startswith("dpofast: ") for line in err.splitlines()), err


def test_a_used_output_folder_is_refused_and_resumed_on_request(run, tmp_path):
    flags = ("--save_strategy", "steps", "--save_steps", "2")
    code, _, err, output = run(ROWS, *flags, "--max_steps", "4")
    assert code == 0, err
    metrics = (output / "metrics.jsonl").read_text()
    code, _, err, _ = run(ROWS, *flags)
    assert code == 2 and "out is not empty" in err and (output / "metrics.jsonl").read_text() == metrics
    code, _, err, _ = run(ROWS, *flags, "--max_steps", "6", "--resume_from_checkpoint", "latest")
    assert code == 0, err
    code, _, err, _ = run(ROWS, "--resume_from_checkpoint", str(tmp_path))
    assert code == 2 and "is no checkpoint folder" in err


def test_a_run_that_came_meanwhile_is_not_mixed_with(run, monkeypatch):
    from dpofast.training.trainer import DPOTrainer

    real = DPOTrainer.output_locked

    def after_another(self):
        Path(self.args.output_dir, "model.safetensors").write_text("theirs")
        return real(self)

    monkeypatch.setattr(DPOTrainer, "output_locked", after_another)
    code, _, err, output = run(ROWS)
    assert code == 2 and "is not empty" in err
    assert (output / "model.safetensors").read_text() == "theirs" and not (output / "metrics.jsonl").exists()


def test_pictures_that_cannot_be_written_do_not_fail_a_run_whose_model_is(run, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dpofast.report.training_plot.plot_training", full)
    code, out, err, output = run(ROWS)
    assert re.search("warning: .*training.png could not be written: .*No space left on device", err)
    assert code == 0 and "model, metrics.jsonl, report.html are in" in out, err
    assert (output / "model.safetensors").exists()


def test_a_resume_that_is_refused_leaves_the_runs_options_alone(run, capsys):
    code, _, err, output = run(ROWS, "--save_strategy", "steps", "--save_steps", "1", "--num_train_epochs", "1")
    assert code == 0, err
    before = (output / "run.yaml").read_bytes()
    assert main(["train", "--resume", str(output), "--beta", "0.5"]) == 2
    assert "beta was 0.1, is 0.5" in capsys.readouterr().err
    assert (output / "run.yaml").read_bytes() == before
    assert main(["train", "--resume", str(output)]) == 0
