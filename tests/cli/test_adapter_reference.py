"""dpofast score and eval of an adapter: the reference is its base model, whatever loading the adapter does to it."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from dpofast import reference
from dpofast.cli.main import main
from tests.support.tiny import save_tiny, tiny_pairs, tiny_tokenizer


def adapter_of(base, folder, **options):
    """Saves an adapter with random trained weights."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "bias" in name:
                parameter.normal_()
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)
    model = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


@pytest.mark.parametrize(
    "options", [{}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, {"bias": "all"}]
)
def test_the_reference_of_an_adapter_is_its_base_model(tmp_path, options, capsys):
    base = save_tiny(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attention_bias=True)  # has biases to train
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(base)
    adapter_of(base, tmp_path / "adapter", **options)
    examples = tiny_pairs(6)
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, examples)))
    command = ["--model", str(tmp_path / "adapter"), "--data", str(tmp_path / "data.jsonl")]
    assert main(["score", *command, "--output", str(tmp_path / "scored.jsonl")]) == 0

    rows = [(e["prompt_ids"], e["chosen_ids"]) for e in examples]
    cu = torch.tensor([0, *torch.tensor([len(response) for _, response in rows]).cumsum(0)])
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with torch.no_grad():
        logps = reference.sequence_logprobs(reference.padded_logprobs(plain, **reference.padded_rows(rows)), cu)
    scored = [json.loads(line) for line in (tmp_path / "scored.jsonl").read_text().splitlines()]
    assert [row["ref_chosen_logps"] for row in scored] == pytest.approx(logps.tolist(), abs=1e-3)
    assert abs(scored[0]["chosen_logps"] - scored[0]["ref_chosen_logps"]) > 1e-2

    own = [{**example, "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0} for example in examples]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, own)))
    assert main(["score", *command, "--output", str(tmp_path / "own.jsonl")]) == 0  # the rows' own reference goes first
    kept = [json.loads(line) for line in (tmp_path / "own.jsonl").read_text().splitlines()]
    assert {row["ref_chosen_logps"] for row in kept} == {-1.0}
    assert [row["chosen_logps"] for row in kept] == [row["chosen_logps"] for row in scored]


def test_a_base_model_that_was_moved(tmp_path, capsys):
    base = save_tiny(tmp_path / "base")
    adapter_of(base, tmp_path / "adapter")
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, tiny_pairs(3))))
    command = ["score", "--model", str(tmp_path / "adapter"), "--data", str(tmp_path / "data.jsonl"), "--output"]
    (tmp_path / "base").rename(tmp_path / "moved")
    assert main([*command, str(tmp_path / "a.jsonl")]) == 2
    assert "base is not there: write where it is now as base_model_name_or_path" in capsys.readouterr().err
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "base_model_name_or_path": "../moved"}))
    assert main([*command, str(tmp_path / "b.jsonl")]) == 0
