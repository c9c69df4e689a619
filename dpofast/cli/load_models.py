"""Load models and tokenizers for the commands: safetensors only, and no code of the model's own unless asked.

A folder that holds a LoRA adapter is its base model with the adapter on it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_ADAPTER = "adapter_config.json"


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How models are loaded: dtype (a name in DTYPES), trust_remote_code, and quantized to 4 bits or not."""

    dtype: str = "float32"
    trust_remote_code: bool = False
    load_in_4bit: bool = False

    def __post_init__(self) -> None:
        """Check the dtype's name."""
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {sorted(DTYPES)}, got {self.dtype!r}")


def load_tokenizer(name: str, *, trust_remote_code: bool) -> Any:
    """Returns the tokenizer of a model; for an adapter's folder without one, that of its base model.

    Raises:
        ValueError: none can be loaded, with the reason.
    """
    from transformers import AutoTokenizer

    source = name
    if is_adapter(name) and not any((Path(name) / f).exists() for f in ("tokenizer_config.json", "tokenizer.json")):
        source = base_of(name)
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{named(source)}: no tokenizer can be loaded from it: {one_line(error)}") from error


def load_model(name: str, loading: Loading) -> Any:
    """Returns a causal language model from a folder or hub name, or a PEFT model from an adapter's folder.

    Raises:
        ValueError: it is none, its weights are no safetensors, or they cannot be read, with the reason.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM

    if is_adapter(name):
        return load_adapter(name, loading).model
    _refuse_pickles(name, "pytorch_model*.bin", "*.safetensors")
    options: dict[str, Any] = {"trust_remote_code": loading.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(name, **options)
        if not any(kind.endswith(("ForCausalLM", "LMHeadModel")) for kind in config.architectures or ["ForCausalLM"]):
            raise ValueError(
                f"its architecture is {config.architectures}, and a decoder-only causal language model is needed"
            )
        if loading.load_in_4bit:
            options |= {"quantization_config": four_bits(DTYPES[loading.dtype]), "device_map": {"": device()}}
        return AutoModelForCausalLM.from_pretrained(name, dtype=DTYPES[loading.dtype], use_safetensors=True, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{named(name)}: no causal language model can be loaded from it: {one_line(error)}") from error


class Adapter(NamedTuple):
    """A PEFT model from an adapter's folder, and whether without its adapter it is its base model.

    It is not where loading the adapter wrote into the base weights: trained biases, PiSSA and its like.
    """

    model: Any
    keeps_base: bool


def load_adapter(folder: str, loading: Loading) -> Adapter:
    """Returns the base model that an adapter's folder names, with the adapter on it.

    Raises:
        ValueError: as load_model.
    """
    from safetensors import SafetensorError

    from dpofast.model.adapters import check_adapter, probe_logps, same_weights

    try:
        from peft import PeftModel
    except ImportError as error:
        raise ValueError(f"{folder} is a LoRA adapter, which needs peft: pip install peft") from error
    _refuse_pickles(folder, "adapter_model.bin", "*.safetensors")
    base = load_model(base_of(folder), loading)
    before = probe_logps(base)
    try:
        model = PeftModel.from_pretrained(base, folder).eval()
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder}: its adapter cannot be loaded: {one_line(error)}") from error
    check_adapter(model)
    with model.disable_adapter():
        return Adapter(model, same_weights(probe_logps(model), before))


def is_adapter(name: str) -> bool:
    """Whether a folder contains a PEFT adapter."""
    return (Path(name) / _ADAPTER).is_file()


def base_of(folder: str) -> str:
    """Returns the name of the base model from an adapter's folder; a relative path may begin there.

    Raises:
        ValueError: it names none, or an absolute path where nothing is.
    """
    path = Path(folder) / _ADAPTER
    try:
        base = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read: {one_line(error)}") from error
    if not base:
        raise ValueError(f"{path}: expected the adapter's base model as base_model_name_or_path, and it names none")
    beside = Path(folder) / base
    if not Path(base).is_dir() and (beside.is_dir() or Path(base).is_absolute()):
        if not beside.is_dir():
            raise ValueError(
                f"{path}: its base model {base} is not there: write where it is now as base_model_name_or_path (a path "
                "may be relative to the adapter's folder)"
            )
        return str(beside)
    return base


def _refuse_pickles(name: str, pickles: str, weights: str) -> None:
    """Raise ValueError for pickled weights: reading a pickle runs the code in it."""
    folder = Path(name)
    if folder.is_dir() and any(folder.glob(pickles)) and not any(folder.glob(weights)):
        found = ", ".join(sorted(path.name for path in folder.glob(pickles)))
        way = (
            'python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{name}', use_safetensors=False).save_pretrained('{name}-safetensors')\""
        )
        if is_adapter(name):
            way = "load the adapter with peft and save_pretrained() it again"
        raise ValueError(
            f"{name}: its weights are pickles ({found}), which run code when they are read, and only safetensors are "
            f"loaded. Where you trust them, convert them once: {way}"
        )


def lora(rank: int, alpha: int | None) -> Any:
    """Returns peft's LoraConfig on every linear layer but the LM head, with alpha 16 for None; or None for rank 0.

    Raises:
        ValueError: a rank below 0, an alpha below 1 or without a rank, or no peft.
    """
    if rank < 0:
        raise ValueError(f"lora_r: expected 0 (train all weights) or a rank of 1 or more, got {rank}")
    if rank == 0:
        if alpha is not None:
            raise ValueError(f"lora_alpha: {alpha} has no effect without an adapter: add its rank, --lora_r 16")
        return None
    alpha = 16 if alpha is None else alpha
    if alpha < 1:
        raise ValueError(f"lora_alpha: expected 1 or more, got {alpha}")
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ValueError("lora_r: LoRA needs peft: pip install peft") from error
    # Dropout would make results depend on how pairs are packed, and the policy differ from its reference at step 0.
    return LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def four_bits(dtype: torch.dtype) -> Any:
    """Returns transformers' BitsAndBytesConfig of QLoRA (arXiv 2305.14314): NF4, double quantization, compute in dtype.

    Raises:
        ValueError: bitsandbytes is not installed.
    """
    from transformers import BitsAndBytesConfig
    from transformers.utils import is_bitsandbytes_available

    if not is_bitsandbytes_available():
        raise ValueError(
            "load_in_4bit: needs bitsandbytes, which is not installed (pip install bitsandbytes) or finds no device "
            "that it supports; without it, train a LoRA adapter on 16-bit weights: --dtype bfloat16"
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def device() -> torch.device:
    """Returns where models run: the accelerator, or the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def named(model: str) -> str:
    """Returns how a message names a model: one that is no folder is looked for on the hub."""
    return model if Path(model).is_dir() else f"{model} (no such folder, so a hub name)"


def one_line(error: BaseException) -> str:
    """Returns an exception's message without line breaks, at most 400 characters."""
    return " ".join(str(error).split())[:400] or type(error).__name__
