"""--config files: what they may hold, and those that are refused before they are read or expanded."""

import os

import pytest

from dpofast import DPOConfig
from dpofast.cli.arguments import _yaml_flags, parse, read_yaml
from dpofast.cli.train import TrainArguments

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 10))


@pytest.fixture
def written(tmp_path):
    def write(text):
        path = tmp_path / "run.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


def test_values_become_flags(written):
    text = "beta: 0.5\nuse_cpu: true\neval_strategy: no\nloss_type: [sigmoid, sft]\nseed:\nx: {a: [1]}\n"
    assert _yaml_flags(written(text)) == [
        *("--beta", "0.5", "--use_cpu", "True", "--eval_strategy", "no", "--loss_type", "sigmoid", "sft"),
        *("--x", '{"a": [1]}'),
    ]


@pytest.mark.parametrize(
    ("text", "flags", "share"),
    [
        ("", [], "prefix"),
        ("share: prompt\n", [], "prompt"),
        ("share: prompt\n", ["--share", "none"], "none"),
        ("share_prompts: true\n", [], "prompt"),  # of a run of before share was an option
        ("share_prompts: false\n", [], "none"),
        ("share_prompts: false\n", ["--share_prompts"], "prompt"),
    ],
)
def test_share_is_read_under_its_earlier_name_too(written, tmp_path, text, flags, share):
    given = f"model: m\ndata: d\noutput_dir: {tmp_path}\nuse_cpu: true\n" + text
    _, config, options = parse(
        (TrainArguments, DPOConfig), ["--config", written(given), *flags], prog="", description=""
    )
    assert config.share == share
    assert {"share", "share_prompts"} >= set(options) - {"model", "data", "output_dir", "use_cpu", "config"}


def test_an_alias_that_is_used_as_meant_is_read(written):
    assert read_yaml(written("a: &lr 1.0e-4\nb: *lr\n")) == {"a": 1e-4, "b": 1e-4}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "expected at most 10,000 values, and aliases make it more"),
        (MERGES, "expected at most 10,000 values, and aliases make it more"),
        ("a: &a [*a, *a]\n", "expected at most 10,000 values, and aliases make it more"),
        ("a: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
        ("#" * (1 << 20) + "\na: 1\n", "expected at most 1,048,576 bytes"),
        (b"a: \xff\n", "not a YAML file"),
        ("a: [\n", "not a YAML file"),
        ("[1]\n", "expected a mapping of option names to values, got list"),
        ("", "expected a mapping of option names to values, got NoneType"),
        ("1: 2\n", "expected option names, got 1"),
        ("null: 2\n", "expected option names, got None"),
        ("fsdp_config: {a: 2020-01-01}\n", "fsdp_config: Object of type date is not JSON"),
    ],
    ids=["laughs", "merges", "endless", "deep", "large", "bytes", "broken", "list", "empty", "number", "null", "date"],
)
def test_what_is_no_config_is_refused(written, text, message):
    with pytest.raises(ValueError, match=f"config: .*run.yaml: .*{message}"):
        _yaml_flags(written(text))


def test_a_named_pipe_or_a_device_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    os.symlink("/dev/zero", tmp_path / "zero.yaml")
    for name in ("pipe.yaml", "zero.yaml"):
        with pytest.raises(ValueError, match=f"{name}: expected a file, and it is none"):
            read_yaml(str(tmp_path / name))
