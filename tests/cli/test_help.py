"""dpofast train --help: what people use first, then dpofast's other options in groups; --help_all has everything."""

import re
from dataclasses import fields

import pytest
from transformers import TrainingArguments

from dpofast.cli.main import main
from dpofast.cli.train import HELP_GROUPS, TrainArguments
from dpofast.training.config import DPOConfig


@pytest.fixture
def shown(capsys):
    """Runs a command that prints and exits with 0; returns what it printed."""

    def run(*argv):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 0
        return capsys.readouterr().out

    return run


def options(text):
    """The options that have a line of their own, in the order in which they stand there."""
    return re.findall(r"^  --(\w+)", text, re.MULTILINE)


def test_help_begins_with_what_nearly_every_run_sets(shown):
    text = shown("train", "--help")
    assert options(text)[:10] == [
        *("model", "data", "eval_data", "output_dir", "loss_type", "beta", "learning_rate"),
        *("per_device_train_batch_size", "num_train_epochs", "lora_r"),
    ]
    assert text.startswith("usage: dpofast train --model MODEL --data DATA [options]\n")
    assert "0.1)" in text and "(default: sigmoid)" in text and "default: None" not in text
    assert all(len(line) <= 100 for line in text.splitlines() if line.startswith("  --"))


def test_help_has_every_option_of_dpofasts_own_once_and_names_where_the_rest_is(shown):
    text = shown("train", "--help")
    own = {f.name for f in fields(TrainArguments)} | set(DPOConfig.__annotations__)
    assert len(options(text)) == len(set(options(text))) and own <= set(options(text))
    of_transformers = set(options(text)) - own - {"config"}
    assert of_transformers == {"output_dir", "per_device_train_batch_size", "num_train_epochs"}
    titles = re.findall(r"^([a-z ]+):$", text, re.MULTILINE)
    assert titles == list(HELP_GROUPS)
    assert "`dpofast train --help_all` lists them" in " ".join(text.split())


@pytest.mark.parametrize("flag", ["--help_all", "--help-all"])
def test_help_all_lists_every_option(shown, flag):
    found = options(shown("train", flag))
    every = {f.name for owner in (TrainArguments, DPOConfig, TrainingArguments) for f in fields(owner) if f.init}
    assert every | {"config", "help_all"} <= set(found)


@pytest.mark.parametrize("command", ["eval", "score"])
def test_the_help_of_other_commands_has_all_their_options(shown, command):
    found = options(shown(command, "--help"))
    assert {"model", "data", "ref_model", "no_reference", "beta", "max_tokens", "output"} <= set(found)


def test_an_unknown_option_names_where_all_are_listed(capsys):
    assert main(["train", "--model", "m", "--data", "d", "--output_dir", "o", "--betta", "1"]) == 2
    assert (
        "unknown: --betta 1; did you mean --beta?; `dpofast train --help_all` lists every option"
        in capsys.readouterr().err
    )
