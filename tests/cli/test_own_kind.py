"""--loss_type module:function: trained, resumed and evaluated from the folder of the module; what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dpofast.cli.main import main
from examples import own_kind
from tests.support.tiny import TEXT_ROWS as ROWS

pytestmark = pytest.mark.slow(20)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with the example and other losses as a user's module."""
    here = tmp_path / "here"
    here.mkdir()
    shutil.copy(own_kind.__file__, here / "users_losses.py")
    (here / "users_other.py").write_text(
        "import torch\nfrom torch.nn.functional import logsigmoid\n"
        "def dpo(pairs, loss):\n    return -logsigmoid(pairs.beta * (pairs.chosen - pairs.rejected))\n"
        "def averaged(pairs, loss):\n    return dpo(pairs, loss).mean()\n"
    )
    monkeypatch.chdir(here)
    return here


def steps_of(output):
    entries = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in entries if "loss" in entry]


def test_train_resume_and_evaluate(run, folder, tmp_path, model_dir, capsys):
    name = "users_losses:squared_hinge"
    flags = ["--save_strategy", "steps", "--save_steps", "1", "--no_html_report", "--learning_rate", "0.01"]
    code, _, err, output = run(ROWS, "--loss_type", name, *flags)
    assert code == 0, err
    assert steps_of(output)[0] == pytest.approx(1.0) and steps_of(output)[-1] < 1
    assert f"loss_type:\n- {name}" in (output / "run.yaml").read_text()
    trained = load_file(output / "model.safetensors")
    assert main(["train", "--resume", str(output / "checkpoint-1")]) == 0, capsys.readouterr().err
    again = load_file(output / "model.safetensors")
    assert all(torch.equal(trained[key], again[key]) for key in trained)
    capsys.readouterr()
    data = str(tmp_path / "pairs.jsonl")
    evaluate = ["eval", "--model", str(output), "--ref_model", str(model_dir), "--data", data, "--output", "json"]
    losses = {}
    for kind in ("users_other:dpo", "sigmoid", name):
        assert main([*evaluate, "--loss_type", kind]) == 0, capsys.readouterr().err
        losses[kind] = json.loads(capsys.readouterr().out)["metrics"]["loss"]["value"]
    assert losses["users_other:dpo"] == losses["sigmoid"] != losses[name]


def test_a_mix_from_a_file(run, folder, tmp_path):
    config = tmp_path / "mix.yaml"
    config.write_text("loss_type: [sigmoid, 'users_losses:squared_hinge']\nloss_weights: [1.0, 0.5]\n")
    code, _, err, output = run(ROWS, "--config", str(config), "--no_html_report")
    assert code == 0, err
    assert steps_of(output)[0] == pytest.approx(0.6931 + 0.5, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("users_losses:square_hinge", "did you mean squared_hinge?"),
        (
            "no_such_module:loss",
            "there is no module 'no_such_module' where Python looks for modules (sys.path), nor in",
        ),
        ("users_other:averaged", "kind: users_other:averaged: expected one loss a row, shape (4,), got ()"),
    ],
)
def test_what_is_refused_is_one_message(run, folder, name, message):
    code, out, err, output = run(ROWS, "--loss_type", name)
    assert code == 2 and message in err and err.count("\n") == 1, err
    assert not output.exists()


def test_a_folder_like_a_package_that_is_not_installed_does_not_pass_for_it(run, folder):
    """The current folder is looked in for losses only: reporters leave a folder of their name there."""
    Path("no_such_reporter").mkdir()
    code, _, err, _ = run(ROWS, "--loss_type", "users_losses:squared_hinge", "--no_html_report")
    assert code == 0, err
    with pytest.raises(ModuleNotFoundError):
        import no_such_reporter  # noqa: F401
