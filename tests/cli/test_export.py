"""dpofast export: a sharded checkpoint as a model's folder, equal to what save_model writes at that step.

One process writes the shards here; those of two ranks are exported in tests/checkpointing/test_sharded.py.
"""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpofast.checkpointing.model_files import ModelFiles
from dpofast.cli.main import main
from tests.support.tiny import tiny_model
from tests.support.tiny_training import SAVING, make_trainer

pytestmark = pytest.mark.slow(60)

CASES = {
    "full": {},
    "tied": {"family": "llama-tied"},
    "experts": {"family": "mixtral"},
    "lora": {"lora": True},
}


def write(folder, *, family="llama", lora=False):
    """Train six steps with sharded checkpoints, and write the model beside them."""
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
    trainer = make_trainer(folder, model=tiny_model(family), peft_config=config, **SAVING)
    trainer.train()
    trainer.save_model(str(folder / "whole"))
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    done = {}

    def of(case):
        if case not in done:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(ModelFiles, "writes_shards", True)
                done[case] = write(tmp_path_factory.mktemp(case), **CASES[case])
        return done[case]

    return of


def weights(folder):
    return {name: tensor for path in Path(folder).glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("case", CASES)
def test_the_folder_is_what_save_model_writes(written, tmp_path, capsys, case):
    folder = written(case)
    assert main(["export", str(folder / "checkpoint-6"), str(tmp_path / "out")]) == 0, capsys.readouterr().err
    assert f"are in {tmp_path / 'out'}" in capsys.readouterr().out
    expected, found = weights(folder / "whole"), weights(tmp_path / "out")
    assert expected.keys() == found.keys() and len(expected) > 5
    assert all(found[name].dtype == w.dtype and torch.equal(found[name], w) for name, w in expected.items())
    theirs = {path.name: path.read_bytes() for path in (folder / "whole").iterdir()}
    ours = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert ours.keys() == theirs.keys() - {"training_args.bin"}
    assert all(ours[name] == theirs[name] for name in ours if not name.endswith((".safetensors", ".md")))
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_it_loads(written, tmp_path):
    ids = torch.tensor([[3, 4, 5]])
    for case in ("tied", "lora"):
        main(["export", "--checkpoint", str(written(case) / "checkpoint-6"), "--output", str(tmp_path / case)])
    model, saved = (AutoModelForCausalLM.from_pretrained(f) for f in (tmp_path / "tied", written("tied") / "whole"))
    assert torch.equal(model(ids).logits, saved(ids).logits)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "tied")) == 97
    adapted, expected = (
        PeftModel.from_pretrained(tiny_model(), folder)(ids).logits
        for folder in (tmp_path / "lora", written("lora") / "whole")
    )
    assert torch.equal(adapted, expected) and not torch.equal(adapted, tiny_model()(ids).logits)


def test_another_dtype(written, tmp_path):
    folder = written("full")
    assert main(["export", str(folder / "checkpoint-6"), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    expected, found = weights(folder / "whole"), weights(tmp_path / "out")
    assert all(torch.equal(found[name], weight.bfloat16()) for name, weight in expected.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


def refused(capsys, *words):
    assert main(["export", *map(str, words)]) == 2
    return capsys.readouterr().err


def test_what_exists_is_left_alone(written, tmp_path, capsys):
    source, out = written("full") / "checkpoint-6", tmp_path / "out"
    out.mkdir()
    (out / "note").write_text("mine")
    assert f"output: {out} exists already: name another, or pass --overwrite" in refused(capsys, source, out)
    err = refused(capsys, source, out, "--overwrite")
    assert f"--overwrite replaces a model's folder, and {out} is none, or has checkpoints" in err
    assert (out / "note").read_text() == "mine" and list(tmp_path.iterdir()) == [out]
    for _ in range(2):
        assert main(["export", str(source), str(tmp_path / "new"), "--overwrite"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "out"]


def test_what_is_no_sharded_checkpoint(written, tmp_path, capsys):
    run = written("full")
    assert "is a run's folder: name one of its checkpoints, such as" in refused(capsys, run, tmp_path / "o")
    assert "expected the folder of a checkpoint, got 'nowhere'" in refused(capsys, "nowhere", tmp_path / "o")
    assert "holds whole weights, so it is a model's folder as it is" in refused(capsys, run / "whole", tmp_path / "o")
    assert "which has no folder sharded" in refused(capsys, tmp_path, tmp_path / "o")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_one_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ModelFiles, "writes_shards", True)
    folder = write(tmp_path / "run") / "checkpoint-6"
    (shard,) = folder.glob("sharded/*.distcp")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    err = refused(capsys, folder, tmp_path / "out")
    assert "sharded/__0_0.distcp is damaged: it is not what was written (SHA-256)" in err
    shard.unlink()
    assert "sharded/__0_0.distcp is missing" in refused(capsys, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
