"""Models and adapters are loaded whole or refused: no tensor keeps a random start value that no file had."""

import json
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dpofast import DPOConfig, DPOTrainer
from dpofast.cli.main import main
from dpofast.model.load import load_adapter, load_causal_lm
from tests.support.composites import tiny_composite
from tests.support.tiny import VOCAB, save_tiny, tiny_dataset, tiny_model

HEAD = "lm_head.weight"


def edited(folder, edit, name="model.safetensors"):
    """The folder, its tensors after edit(tensors)."""
    tensors = load_file(folder / name)
    edit(tensors)
    save_file(tensors, folder / name, metadata={"format": "pt"})
    return str(folder)


def configured(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return str(folder)


@pytest.fixture
def folder(tmp_path):
    save_tiny(tmp_path / "model")
    return tmp_path / "model"


def test_a_whole_model_is_loaded(folder):
    loaded, plain = load_causal_lm(str(folder)), AutoModelForCausalLM.from_pretrained(folder)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: edited(f, lambda t: t.pop(HEAD)), "its weights lack lm_head.weight: fetch or save it anew"),
        (
            lambda f: edited(f, lambda t: [t.pop(k) for k in list(t) if ".layers.1." in k]),
            r"its weights lack model.layers.1.input_layernorm.weight, .* and 4 more",
        ),
        (
            lambda f: edited(f, lambda t: [t.update({f"other.{k}": t.pop(k)}) for k in list(t)]),
            "its weights lack lm_head.weight, model.embed_tokens.weight, ",
        ),
        (lambda f: configured(f, num_hidden_layers=9), "its weights lack model.layers.3.input_layernorm.weight"),
        (lambda f: configured(f, num_hidden_layers=1), "its config has no place for model.layers.1.input_layernorm"),
        (
            lambda f: configured(f, vocab_size=VOCAB + 1),
            r"other shapes than its config: lm_head.weight \(97, 32\) for \(98, 32\), model.embed_tokens",
        ),
        (lambda f: configured(f, architectures=["BertModel"]), r"its architecture is \['BertModel'\]"),
    ],
    ids=["head", "layer", "names", "more-layers", "fewer-layers", "vocabulary", "architecture"],
)
def test_weights_that_no_file_has_are_refused_by_name(damage, message, folder, tmp_path, capsys):
    name = damage(folder)
    with pytest.raises(ValueError, match=message):
        load_causal_lm(name)
    args = DPOConfig(output_dir=str(tmp_path / "run"), report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match=message):
        DPOTrainer(model=name, args=args, train_dataset=tiny_dataset(4))
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"prompt": "3 4", "chosen": " 5", "rejected": " 6"}\n')
    common = ["--model", name, "--data", str(data)]
    alone = ["--no_reference", "--loss_type", "simpo"]
    for command in (["train", *common, "--output_dir", str(tmp_path / "run")], ["eval", *common, *alone]):
        assert main(command) == 2
        assert "no causal language model can be loaded from it: its" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "key"),
    [({"num_hidden_layers": 10**12}, "num_hidden_layers"), ({"part": {"n_layer": 10**12}}, r"part\.n_layer")],
)
def test_more_layers_than_can_be_built_are_refused_before_one_is(changes, key, folder, tmp_path, capsys):
    name = configured(folder, **changes)
    message = f"its config has {key}=1,000,000,000,000, and models of at most 10,000 layers are loaded"
    with pytest.raises(ValueError, match=message):
        load_causal_lm(name)
    assert main(["train", "--model", name, "--data", "pairs.jsonl", "--output_dir", str(tmp_path / "run")]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_pickles_are_not_read_by_the_trainer(folder, tmp_path):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    args = DPOConfig(output_dir=str(tmp_path / "run"), report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match="its weights cannot be loaded from safetensors: .*model.safetensors"):
        DPOTrainer(model=str(folder), args=args, train_dataset=tiny_dataset(4))


@pytest.mark.parametrize("family", ["gemma3", "gemma4", "mistral3", "qwen2_vl", "llava"])
def test_a_composite_is_opened_as_what_it_is_and_its_text_class_is_refused(family, tmp_path):
    model = tiny_composite(family)
    model.save_pretrained(tmp_path)
    loaded = load_causal_lm(str(tmp_path))
    assert type(loaded) is type(model)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    text = model.config.get_text_config()
    (tmp_path / "config.json").write_text(json.dumps({**text.to_dict(), "architectures": ["AnyForCausalLM"]}))
    with pytest.raises(ValueError, match="its weights lack|Unrecognized"):  # Qwen2-VL's text has no class of its own
        load_causal_lm(str(tmp_path))


def lora(model, **options):
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False, **options)
    return get_peft_model(model, config)


def test_an_adapter_is_loaded_whole_or_refused(tmp_path, folder):
    trained = lora(tiny_model(), modules_to_save=["embed_tokens"])
    trained.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(3, 9)[None]
    loaded = load_adapter(load_causal_lm(str(folder)), str(tmp_path / "adapter")).eval()
    assert torch.equal(loaded(ids).logits, trained.eval()(ids).logits)
    name = "adapter_model.safetensors"
    foreign = {"base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": torch.ones(2, 32)}
    edited(tmp_path / "adapter", lambda t: t.update(foreign), name)
    with pytest.raises(ValueError, match=r"the base model has no place for .*layers.7.mlp.up_proj.lora_A"):
        load_adapter(tiny_model(), str(tmp_path / "adapter"))
    edited(tmp_path / "adapter", lambda t: [t.pop(k) for k in list(t) if "layers.1.mlp" in k or "layers.7" in k], name)
    with pytest.raises(ValueError, match=r"its weights do not fit the adapter's config: .*layers.1.mlp"):
        load_adapter(tiny_model(), str(tmp_path / "adapter"))
