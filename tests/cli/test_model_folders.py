"""Folders of models and adapters whose files are not what they should be: one message each, never a traceback."""

import json
import os
import shutil
import subprocess

import pytest
from transformers import AutoModelForCausalLM

from dpofast.cli.load_models import Loading, base_of, load_model, load_tokenizer
from tests.support.tiny import save_tiny, tiny_model

pytestmark = pytest.mark.slow(5)

SHAPES = {"list": "[1]", "text": '"x"', "null": "null", "deep": "[" * 100_000 + "]" * 100_000, "empty": "", "no": "{"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base"))


@pytest.fixture
def folder(base, tmp_path):
    return shutil.copytree(base, tmp_path / "model")


@pytest.mark.parametrize("shape", SHAPES)
def test_a_config_of_another_shape(folder, shape):
    (folder / "config.json").write_text(SHAPES[shape])
    with pytest.raises(ValueError, match=r"\S+model: no causal language model can be loaded from it: ."):
        load_model(str(folder), Loading())


@pytest.mark.parametrize("shape", SHAPES)
def test_a_tokenizer_of_another_shape(folder, shape):
    (folder / "tokenizer.json").write_text(SHAPES[shape])
    with pytest.raises(ValueError, match=r"\S+model: no tokenizer can be loaded from it: ."):
        load_tokenizer(str(folder), trust_remote_code=False)


@pytest.mark.parametrize("name", ["num_attention_heads", "hidden_size", "vocab_size", "num_hidden_layers"])
@pytest.mark.parametrize("value", ["x", [1], {"a": 1}])
def test_a_value_of_another_kind_in_a_config(folder, name, value):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, name: value}))
    with pytest.raises(ValueError, match="no causal language model can be loaded from it: ."):
        load_model(str(folder), Loading())


@pytest.mark.parametrize("shape", SHAPES)
def test_an_adapter_of_another_shape(tmp_path, shape):
    (tmp_path / "adapter_config.json").write_text(SHAPES[shape])
    with pytest.raises(ValueError, match=r"adapter_config.json: (cannot be read: .|expected the adapter's base model)"):
        base_of(str(tmp_path))


@pytest.mark.parametrize("named", [[1], {"a": 1}, 3, "", None])
def test_a_base_that_is_no_name(tmp_path, named):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": named}))
    with pytest.raises(ValueError, match="expected the adapter's base model as base_model_name_or_path"):
        base_of(str(tmp_path))


@pytest.mark.parametrize("length", [1, 2])
def test_adapters_on_themselves(tmp_path, length):
    folders = [tmp_path / str(number) for number in range(length)]
    for folder, other in zip(folders, folders[1:] + folders[:1], strict=True):
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(other)}))
    with pytest.raises(ValueError, match="its adapter's base model is an adapter on itself"):
        base_of(str(folders[0]))


def test_a_named_pipe_among_the_files_is_not_read(folder):
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    for load in (
        lambda: load_model(str(folder), Loading()),
        lambda: load_tokenizer(str(folder), trust_remote_code=False),
    ):
        with pytest.raises(ValueError, match="config.json: expected a file of a model, and it is a named pipe"):
            load()


def test_a_read_only_folder_is_read(folder):
    for path in (*folder.iterdir(), folder):
        path.chmod(path.stat().st_mode & ~0o222)
    before = sorted(folder.iterdir())
    assert load_tokenizer(str(folder), trust_remote_code=False) and load_model(str(folder), Loading())
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("name", ["model", 'm"; touch pwned #', "m'; touch pwned #", "$(touch pwned)"])
def test_the_command_that_converts_pickles_does_that_and_nothing_else(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="its weights are pickles") as refused:
        load_model(str(folder), Loading())
    command = str(refused.value).partition("convert them once: ")[2]
    # What a shell makes of it, in place of an interpreter that would load the model.
    shown = subprocess.run(
        ["sh", "-c", command.replace("python -c", "printf %s", 1)], cwd=tmp_path, capture_output=True, text=True
    )
    calls = []

    class Model:
        @staticmethod
        def from_pretrained(*arguments, **options):
            calls.append((*arguments, options))
            return Model

        @staticmethod
        def save_pretrained(*arguments):
            calls.append(arguments)

    exec(shown.stdout.removeprefix("from transformers import AutoModelForCausalLM as M; "), {"M": Model})
    assert calls == [(str(folder), {"use_safetensors": False}), (f"{folder}-safetensors",)]
    assert not (tmp_path / "pwned").exists()


def test_a_folder_that_is_right_is_loaded(base):
    loaded = load_model(str(base), Loading()).state_dict()
    expected = AutoModelForCausalLM.from_pretrained(base).state_dict()
    assert loaded.keys() == expected.keys() == tiny_model().state_dict().keys()
    assert all((loaded[name] == expected[name]).all() for name in loaded)
