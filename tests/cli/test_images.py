"""dpofast train, eval and score on prompts with images: the model's processor, what is shown, what is refused."""

import json
import re
import shutil

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

from dpofast.cli.load_models import load_config, load_processing, load_processor, load_tokenizer
from dpofast.cli.main import main
from tests.support.tiny import save_tiny
from tests.support.vision_models import vision_model
from tests.support.vision_processors import picture, processor_of

pytestmark = pytest.mark.slow(60)

ALLOWED = {"trust_remote_code": False}


def saved(folder, family):
    """A folder with a tiny model of the family and its processor."""
    vision_model(family).save_pretrained(folder)
    processor_of(family).save_pretrained(folder)
    return folder


def rows(count=8):
    """Conversations with none, one and two images in turn."""
    return [
        {
            "prompt": [
                {
                    "role": "user",
                    "content": [{"type": "image"}] * (i % 3) + [{"type": "text", "text": f"what is {i}?"}],
                }
            ],
            "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "it is " + "ab" * (i % 4)}]}],
            "rejected": [{"role": "assistant", "content": [{"type": "text", "text": f"no {i}"}]}],
            "images": [f"{(i + k) % 4}.png" for k in range(i % 3)],
        }
        for i in range(count)
    ]


def written(folder, lines, name="pairs.jsonl"):
    """A JSON lines file beside the pictures that it names."""
    for i in range(4):
        picture(i, 12 + 4 * i, 30 - 2 * i).save(folder / f"{i}.png")
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in lines))
    return folder / name


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """LLaVA and data with images, a run on all weights with held-out pairs, and one of an adapter."""
    folder = tmp_path_factory.mktemp("images")
    saved(folder / "base", "llava")
    data = written(folder, rows())
    shared = ["--model", folder / "base", "--data", data, "--learning_rate", "3e-3", "--max_steps", "3"]
    assert trained(*shared, "--eval_data", data, "--output_dir", folder / "full", "--save_steps", "2") == 0
    assert trained(*shared, "--lora_r", "4", "--output_dir", folder / "adapter", "--no_html_report") == 0
    return folder


def trained(*flags):
    common = ["--use_cpu", "--report_to", "none", "--logging_steps", "1", "--per_device_train_batch_size", "4"]
    return main(["train", *common, *map(str, flags)])


@torch.no_grad()
def own_logps(model, processor, row, side):
    """Log-prob of a response by the model's own forward over what its own processor makes of prompt and response."""
    from PIL import Image

    turns = [*row["prompt"], *row[side]]
    texts = [
        processor.apply_chat_template(each, tokenize=False, add_generation_prompt=len(each) == 1)
        for each in (turns[:1], turns)
    ]
    images = [Image.open(path) for path in row["images"]] or None
    options = {"images": images and [images], "add_special_tokens": False, "return_tensors": "pt"}
    prompt, whole = (processor(text=[text], **options) for text in texts)
    start, ids = prompt["input_ids"].shape[1], whole["input_ids"][0]
    logits = model(**whole).logits[0, start - 1 : -1].log_softmax(-1)
    return float(logits.gather(1, ids[start:, None]).sum())


def of_file(path, folder):
    """The rows of a scored file, with whole paths."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{**row, "images": [folder / name for name in row["images"]]} for row in lines]


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_scores_are_the_models_own_log_probs(work, kind, capsys):
    reference = ["--ref_model", str(work / "base")] if kind == "full" else []
    output = work / f"{kind}.jsonl"
    arguments = ["--model", str(work / kind), "--data", str(work / "pairs.jsonl"), *reference]
    assert main(["score", *arguments, "--output", str(output)]) == 0
    base = AutoModelForImageTextToText.from_pretrained(work / "base").eval()
    if kind == "full":
        policy = AutoModelForImageTextToText.from_pretrained(work / "full").eval()
    else:
        policy = PeftModel.from_pretrained(vision_model("llava"), work / "adapter").eval()
    processor = AutoProcessor.from_pretrained(work / kind)
    found = of_file(output, work)
    assert len(found) == 8
    for row in found:
        for side in ("chosen", "rejected"):
            ours = own_logps(policy, processor, row, side), own_logps(base, processor, row, side)
            assert (row[f"{side}_logps"], row[f"ref_{side}_logps"]) == pytest.approx(ours, abs=1e-3)
    assert max(abs(row["margins"]) for row in found) > 0.01
    capsys.readouterr()
    assert main(["eval", *arguments, "--output", "json"]) == 0
    margin = json.loads(capsys.readouterr().out)["metrics"]["margin"]["value"]
    assert margin == pytest.approx(sum(row["margins"] for row in found) / 8, abs=1e-5)


def test_evaluation_in_training_has_the_numbers_of_dpofast_eval(work, capsys):
    arguments = ["--model", str(work / "full"), "--ref_model", str(work / "base"), "--data", str(work / "pairs.jsonl")]
    assert main(["eval", *arguments, "--output", "json"]) == 0
    found = json.loads(capsys.readouterr().out)["metrics"]
    logs = [json.loads(line) for line in (work / "full" / "metrics.jsonl").read_text().splitlines()]
    last = [entry for entry in logs if "eval_loss" in entry][-1]
    assert found["margin"]["value"] == pytest.approx(last["eval_rewards/margins"], abs=1e-4)
    assert found["loss"]["value"] == pytest.approx(last["eval_loss"], abs=1e-4)


def test_the_report_shows_the_images_of_its_pairs(work):
    page = (work / "full" / "report.html").read_text("utf-8")
    names = re.findall(r'<img alt="(image \d of \d: \d.png, \d+ x \d+ pixels)"[^>]*src="data:image/jpeg;base64', page)
    assert "image 2 of 2: 3.png, 24 x 24 pixels" in names and "image 1 of 1: 1.png, 28 x 16 pixels" in names
    prompts = re.findall(r'<p class="prompt">(.*?)</p>', page, re.DOTALL)
    assert "user: [image][image]what is 2?\nassistant:" in prompts and "user: what is 0?\nassistant:" in prompts
    assert "&lt;image&gt;" not in page
    assert len(names) == sum(prompt.count("[image]") for prompt in prompts)


def test_a_new_adapter_is_on_the_language_model_unless_layers_are_named(work, tmp_path, capsys):
    config = json.loads((work / "adapter" / "adapter_config.json").read_text())
    names = {name for name, _ in vision_model("llava").named_modules()}
    assert len(config["target_modules"]) == 14 and set(config["target_modules"]) <= names
    assert all(".language_model.layers." in name for name in config["target_modules"])
    arguments = ["--model", work / "base", "--data", work / "pairs.jsonl", "--max_steps", "1", "--lora_r", "2"]
    assert trained(*arguments, "--output_dir", tmp_path / "again") == 0
    assert "the adapter is on the 14 linear layers of the language model" in capsys.readouterr().err
    for chosen in (["q_proj", "linear_1"], ["all-linear"]):
        output = tmp_path / chosen[0]
        assert trained(*arguments, "--lora_target_modules", *chosen, "--output_dir", output) == 0
        assert "linear layers of the language model" not in capsys.readouterr().err
        model = PeftModel.from_pretrained(vision_model("llava"), output)
        adapted = [name for name, _ in model.named_parameters() if ".lora_A." in name]
        assert all(any(part in name for name in adapted) for part in ("vision_tower", "multi_modal_projector"))


def test_a_text_model_gets_the_adapter_that_it_always_got(tmp_path, capsys):
    save_tiny(tmp_path / "base")
    (tmp_path / "data.jsonl").write_text(json.dumps({"prompt": "3 4", "chosen": " 5 6", "rejected": " 7"}) + "\n")
    arguments = ["--model", tmp_path / "base", "--data", tmp_path / "data.jsonl", "--max_steps", "1", "--lora_r", "2"]
    assert trained(*arguments, "--output_dir", tmp_path / "out") == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert "q_proj" in config["target_modules"] and "language model" not in capsys.readouterr().err


def test_a_killed_run_goes_on_as_if_it_had_not_been(work, tmp_path):
    folder = shutil.copytree(work / "full", tmp_path / "run")
    for name in ("model.safetensors", "checkpoint-3"):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert main(["train", "--resume", str(folder)]) == 0
    before, after = (AutoModelForImageTextToText.from_pretrained(path) for path in (work / "full", folder))
    for (name, ours), theirs in zip(after.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_the_preview_names_images_in_place_of_their_placeholders(work, tmp_path, capsys):
    for model in ("base", "adapter"):
        arguments = ["train", "--model", str(work / model), "--data", str(work / "pairs.jsonl"), "--preview", "3"]
        assert main(arguments) == 0
        shown = capsys.readouterr().out
        assert "line 3, tokens: prompt 36, chosen 12, rejected 6" in shown
        assert "  prompt    user: <image 1: 26x20, 4 tokens><image 2: 24x24, 4 tokens>what is 2?\\n\n" in shown
        assert "<image>" not in shown and "  prompt    user: what is 0?\\n" in shown
    saved(tmp_path / "tiled", "idefics3")
    assert main(["train", "--model", str(tmp_path / "tiled"), *arguments[3:]]) == 0
    shown = capsys.readouterr().out
    assert "  images    26x20, 24x24\n" in shown and "<row_1_col_2><tile 2: 4 tokens>" in shown
    assert "<tile 10: 4 tokens><fake_token_around_image>what is 2?" in shown


def test_a_broken_image_is_named_with_its_row_or_skipped_and_counted(work, tmp_path, capsys):
    data = written(tmp_path, rows(4))
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:60])  # of line 3 alone
    arguments = ["--model", work / "base", "--data", data, "--max_steps", "1"]
    assert trained(*arguments, "--output_dir", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "line 3: an image" in said and "2.png" in said and not (tmp_path / "out").exists()
    assert trained(*arguments, "--output_dir", tmp_path / "out", "--on_bad_row", "skip") == 0
    printed = capsys.readouterr().out
    assert "3 of 4 pairs kept" in printed and re.search(r"skipped 1: an image .*\(line 3\)", printed)
    scoring = ["--model", str(tmp_path / "out"), "--ref_model", str(work / "base"), "--data", str(data)]
    assert main(["eval", *scoring]) == 2 and "line 3: an image" in capsys.readouterr().err
    assert main(["eval", *scoring, "--on_bad_row", "skip"]) == 0 and "3 of 4 pairs kept" in capsys.readouterr().out


def test_models_that_take_no_images_say_why(work, tmp_path, capsys):
    save_tiny(tmp_path / "text")
    saved(tmp_path / "gemma", "gemma3")
    for model, reason in (("text", ""), ("gemma", "packed rows with images are not supported, as it attends")):
        flags = ["--model", str(tmp_path / model), "--data", str(work / "pairs.jsonl")]
        assert trained(*flags, "--output_dir", tmp_path / "out") == 2
        said = capsys.readouterr().err
        assert "images" in said and reason in said and "Traceback" not in said, said
        assert main(["eval", *flags, "--ref_model", str(tmp_path / model)]) == 2
        said = capsys.readouterr().err
        assert "images" in said and reason in said, said
    assert trained(*flags, "--padded", "--output_dir", tmp_path / "out", "--max_steps", "1") == 0


def test_a_reference_of_another_family_is_refused(work, tmp_path, capsys):
    saved(tmp_path / "other", "llava_next")
    flags = ["--model", str(work / "base"), "--data", str(work / "pairs.jsonl"), "--ref_model", str(tmp_path / "other")]
    assert main(["eval", *flags]) == 2
    assert "expected a model of the policy's type llava" in capsys.readouterr().err


def test_a_processor_is_loaded_where_the_model_has_one(work, tmp_path):
    name, tokenizer = str(work / "base"), load_tokenizer(str(work / "base"), **ALLOWED)
    for columns in (["prompt"], ["prompt", "image"], ["prompt_ids", "image_keys"]):
        assert hasattr(load_processing(name, tokenizer, columns, **ALLOWED), "image_processor")
    broken = shutil.copytree(work / "base", tmp_path / "broken")
    (broken / "processor_config.json").write_text("{")
    assert load_processing(str(broken), tokenizer, ["prompt"], **ALLOWED) is tokenizer
    with pytest.raises(ValueError, match="no processor can be loaded"):
        load_processing(str(broken), tokenizer, ["prompt", "images"], **ALLOWED)
    text = str(save_tiny(tmp_path / "text"))
    assert load_processing(text, tokenizer, ["images"], **ALLOWED) is tokenizer
    assert load_config(str(work / "adapter"), **ALLOWED).model_type == "llava"


def test_an_adapter_has_its_own_processor_or_that_of_its_base_model(work, tmp_path):
    own = shutil.copytree(work / "adapter", tmp_path / "own")
    settings = json.loads((own / "processor_config.json").read_text())
    (own / "processor_config.json").write_text(json.dumps({**settings, "patch_size": 2}))
    assert load_processor(str(own), **ALLOWED).patch_size == 2
    (own / "processor_config.json").unlink()
    assert load_processor(str(own), **ALLOWED).patch_size == 4


@pytest.mark.parametrize("text", ["{", "[1]", "[" * 100_000, '{"processor_class": 3}', '{"processor_class": "Nope"}'])
def test_a_processor_file_of_another_shape_is_one_message(work, tmp_path, text):
    folder = shutil.copytree(work / "base", tmp_path / "model")
    (folder / "processor_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"\S+model: (no processor can be loaded|expected a processor of text and im)"):
        load_processor(str(folder), **ALLOWED)


def test_what_a_processor_lacks_is_said(work, tmp_path, capsys):
    folder = shutil.copytree(work / "base", tmp_path / "model")
    (folder / "processor_config.json").unlink()
    flags = ["--model", folder, "--data", work / "pairs.jsonl", "--output_dir", tmp_path / "out"]
    assert trained(*flags) == 2
    assert "it has no processor to read them: copy processor_config.json and pre" in capsys.readouterr().err
    assert main(["train", "--model", str(folder), "--data", str(work / "pairs.jsonl"), "--preview", "1"]) == 2


def test_qwens_processor_needs_torchvision_and_text_does_not(tmp_path, capsys, monkeypatch):
    folder, processor = tmp_path / "qwen", processor_of("qwen2_vl")
    vision_model("qwen2_vl").save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)

    def without(*arguments, **options):
        raise ImportError("Qwen2VLVideoProcessor requires the Torchvision library but it was not found")

    monkeypatch.setattr(AutoProcessor, "from_pretrained", without)
    monkeypatch.setattr("transformers.utils.is_torchvision_available", lambda: False)
    flags = ["--model", folder, "--max_steps", "1", "--output_dir", tmp_path / "out"]
    assert trained(*flags, "--data", written(tmp_path, rows(3))) == 2
    assert "it needs torchvision, which is not installed: pip install torchvision (rows" in capsys.readouterr().err
    (tmp_path / "text.jsonl").write_text(json.dumps({"prompt": "what", "chosen": " is it", "rejected": " no"}) + "\n")
    assert trained(*flags, "--data", tmp_path / "text.jsonl") == 0
