"""Load models, tokenizers and processors for the commands: safetensors only, no code of the model's own unless asked.

A folder that holds a LoRA adapter is its base model with the adapter on it.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dpofast.common.hub import check_hub_name

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_ADAPTER = "adapter_config.json"
_TOKENIZER = ("tokenizer_config.json", "tokenizer.json")
_PROCESSOR = ("processor_config.json", "preprocessor_config.json")


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How models are loaded: dtype (a name in DTYPES), trust_remote_code, quantized to 4 bits or not.

    attn_implementation is transformers'; None is the model's own choice. storage: the dtype whose tensors hold 4-bit
    weights, which FSDP2 gathers as they are; None is dtype. options: further ones of from_pretrained. to_shard: FSDP2
    will shard the model, which is then converted to dtype as shards (an adapter's base model is converted as it loads).
    """

    dtype: str = "float32"
    trust_remote_code: bool = False
    load_in_4bit: bool = False
    storage: torch.dtype | None = None
    attn_implementation: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    to_shard: bool = False

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

    from dpofast.model.load import check_depth

    source = _with_files(name, _TOKENIZER)
    try:
        if not is_adapter(source):
            check_depth(source)  # the tokenizer's class is looked up in the model's config
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # JSON of another shape makes the libraries raise anything
        raise ValueError(f"{named(source)}: no tokenizer can be loaded from it: {one_line(error)}") from error


def load_processing(name: str, tokenizer: Any, columns: Collection[str], *, trust_remote_code: bool) -> Any:
    """Returns the processor of a model that takes images, and of any other model its tokenizer.

    Text needs no processor, nor the packages that one needs: where the data have no images and it cannot be loaded,
    the tokenizer is returned.

    Args:
        name: of the model.
        tokenizer: of load_tokenizer.
        columns: of the data.
        trust_remote_code: whether the model's own code may run.

    Raises:
        ValueError: it cannot be loaded though the data have images, with the reason.
    """
    from dpofast.model.vision.families import family_of
    from dpofast.training.checks.images import columns_with_images

    try:
        if family_of(load_config(name, trust_remote_code=trust_remote_code)) is None:
            return tokenizer
        return load_processor(name, trust_remote_code=trust_remote_code)
    except ValueError:
        if columns_with_images(columns):
            raise
        return tokenizer


def load_processor(name: str, *, trust_remote_code: bool) -> Any:
    """Returns the processor of a model that takes images; for an adapter's folder without one, that of its base model.

    Raises:
        ValueError: none can be loaded, with the reason.
    """
    from transformers import AutoProcessor, ProcessorMixin
    from transformers.utils import is_torchvision_available

    source = _with_files(name, _PROCESSOR)
    if Path(source).is_dir() and not _has(source, _PROCESSOR):
        raise ValueError(
            f"{source}: the data have images, and it has no processor to read them: copy {' and '.join(_PROCESSOR)} "
            "(those that there are) from the model that it was made from"
        )
    try:
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # as above
        reason = one_line(error)
        if "torchvision" in reason.lower() and not is_torchvision_available():
            reason = (
                "it needs torchvision, which is not installed: pip install torchvision (rows without images need none)"
            )
        raise ValueError(f"{named(source)}: no processor can be loaded from it: {reason}") from error
    if not isinstance(processor, ProcessorMixin):  # what AutoProcessor finds where there is none
        raise ValueError(
            f"{named(source)}: expected a processor of text and images, got {type(processor).__name__}: it needs "
            f"{' or '.join(_PROCESSOR)}"
        )
    return processor


def load_config(name: str, *, trust_remote_code: bool) -> Any:
    """Returns the config of a model; of an adapter's folder that of its base model.

    Raises:
        ValueError: none can be loaded, with the reason.
    """
    from transformers import AutoConfig

    from dpofast.model.load import check_depth

    source = _with_files(name, ())
    try:
        check_depth(source)
        return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # as above
        raise ValueError(f"{named(source)}: no config can be loaded from it: {one_line(error)}") from error


def _with_files(name: str, files: tuple[str, ...]) -> str:
    """The folder or hub name where one of the files is looked for: of an adapter without any of them, its base model's.

    Raises:
        ValueError: it has special files, or is neither a folder nor can be on the hub.
    """
    _refuse_special_files(name)
    while is_adapter(name) and not _has(name, files):
        name = base_of(name)
        _refuse_special_files(name)
    check_name(name)
    return name


def _has(folder: str, files: tuple[str, ...]) -> bool:
    return any((Path(folder) / file).exists() for file in files)


def load_model(name: str, loading: Loading) -> Any:
    """Returns a causal language model from a folder or hub name, or a PEFT model from an adapter's folder.

    Raises:
        ValueError: it is none, its weights are no safetensors, or they cannot be read, with the reason.
    """
    from dpofast.model.load import load_causal_lm
    from dpofast.model.parallel.mapped import load_to_shard

    _refuse_special_files(name)
    if is_adapter(name):
        return load_adapter(name, loading).model
    check_name(name)
    _refuse_pickles(name, "pytorch_model*.bin", "*.safetensors")
    options: dict[str, Any] = {"trust_remote_code": loading.trust_remote_code, **loading.options}
    attention = {} if loading.attn_implementation is None else {"attn_implementation": loading.attn_implementation}
    try:
        if loading.load_in_4bit:
            options |= {
                "quantization_config": four_bits(DTYPES[loading.dtype], loading.storage),
                "device_map": {"": device()},
            }
        load = load_to_shard if loading.to_shard else load_causal_lm
        return load(name, dtype=DTYPES[loading.dtype], **options, **attention)
    except Exception as error:  # as above
        reason = one_line(error).removeprefix(f"{name}: ")
        raise ValueError(f"{named(name)}: no causal language model can be loaded from it: {reason}") from error


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
    from dpofast.model import load
    from dpofast.model.adapters import check_adapter, probe_logps, same_weights

    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{folder} is a LoRA adapter, which needs peft: pip install peft") from error
    _refuse_pickles(folder, "adapter_model.bin", "*.safetensors")
    base = load_model(base_of(folder), replace(loading, to_shard=False))
    before = probe_logps(base)
    try:
        model = load.load_adapter(base, folder).eval()
    except Exception as error:  # as above
        reason = one_line(error).removeprefix(f"{folder}: ")
        raise ValueError(f"{folder}: its adapter cannot be loaded: {reason}") from error
    check_adapter(model)
    with model.disable_adapter():
        return Adapter(model, same_weights(probe_logps(model), before))


def is_adapter(name: str) -> bool:
    """Whether a folder contains a PEFT adapter."""
    return (Path(name) / _ADAPTER).is_file()


def base_of(folder: str) -> str:
    """Returns the name of the base model from an adapter's folder; a relative path may begin there.

    Raises:
        ValueError: it names none, or itself, also by way of another adapter, or an absolute path where nothing is.
    """
    base = _base_name(folder)
    seen, further = {Path(folder).resolve()}, base
    while is_adapter(further):
        if Path(further).resolve() in seen:
            raise ValueError(f"{folder}: its adapter's base model is an adapter on itself: {further}")
        seen.add(Path(further).resolve())
        further = _base_name(further)
    return base


def _base_name(folder: str) -> str:
    path = Path(folder) / _ADAPTER
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read: {one_line(error)}") from error
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if not base or not isinstance(base, str):
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


def _refuse_special_files(name: str) -> None:
    """Raise ValueError for a named pipe or a device among a folder's files, which might be read for ever."""
    folder = Path(name)
    if folder.is_dir():
        for path in folder.iterdir():
            if path.exists() and not path.is_file() and not path.is_dir():
                raise ValueError(f"{path}: expected a file of a model, and it is a named pipe or a device")


def _refuse_pickles(name: str, pickles: str, weights: str) -> None:
    """Raise ValueError for pickled weights: reading a pickle runs the code in it."""
    folder = Path(name)
    if folder.is_dir() and any(folder.glob(pickles)) and not any(folder.glob(weights)):
        found = ", ".join(sorted(path.name for path in folder.glob(pickles)))
        code = (
            "from transformers import AutoModelForCausalLM as M; "
            f"M.from_pretrained({name!r}, use_safetensors=False).save_pretrained({name + '-safetensors'!r})"
        )
        way = f"python -c {shlex.quote(code)}"
        if is_adapter(name):
            way = "load the adapter with peft and save_pretrained() it again"
        raise ValueError(
            f"{name}: its weights are pickles ({found}), which run code when they are read, and only safetensors are "
            f"loaded. Where you trust them, convert them once: {way}"
        )


def four_bits(dtype: torch.dtype, storage: torch.dtype | None = None) -> Any:
    """Returns transformers' BitsAndBytesConfig of QLoRA (arXiv 2305.14314): NF4, double quantization, compute in dtype.

    Weights are held in tensors of the dtype storage, by default of dtype, which FSDP2 can shard; bitsandbytes' own
    default, uint8, it cannot.

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
        bnb_4bit_quant_storage=storage or dtype,
    )


def device() -> torch.device:
    """Returns where models run: the accelerator, or the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def check_name(name: str) -> None:
    """Raise ValueError for a model that is neither a folder nor can be on the hub, with the nearest folder's name."""
    if not Path(name).is_dir():
        check_hub_name(name)


def named(model: str) -> str:
    """Returns how a message names a model: one that is no folder is looked for on the hub."""
    return model if Path(model).is_dir() else f"{model} (no such folder, so a hub name)"


def one_line(error: BaseException) -> str:
    """Returns an exception's message without line breaks, at most 400 characters."""
    return " ".join(str(error).split())[:400] or type(error).__name__
