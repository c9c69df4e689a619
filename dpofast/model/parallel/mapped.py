"""Models that FSDP2 will shard, loaded in the dtype of their files: no process has a converted copy of a whole one.

safetensors maps a file into memory. A weight that stays in the dtype of its file takes no memory of a process but the
system's cache of the file, which all processes of a machine share; converted, it is a copy in each of them. So weights
are converted as shards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn

from dpofast.model.load import config_of, load_causal_lm

_ASKED = "_dpofast_dtype_of_shards"
_NARROW = {"BF16": torch.bfloat16, "F16": torch.float16}


def load_to_shard(name: str, **options: Any) -> Any:
    """Returns load_causal_lm's model; where float32 is wanted and its files are narrower, in their dtype.

    widened() gives the shards that dtype, and the model is then load_causal_lm's, to the bit. Composite and quantized
    models, and those whose files have several dtypes, are converted as they are loaded.

    Args:
        name: a folder or hub name.
        options: from_pretrained's.

    Raises:
        ValueError: as load_causal_lm.
    """
    stored = _stored_dtype(name, options) if options.get("dtype") == torch.float32 else None
    if stored is None:
        return load_causal_lm(name, **options)
    model = load_causal_lm(name, **{**options, "dtype": stored})
    model.config.dtype = torch.float32
    with init_empty_weights(include_buffers=False):
        wide = type(model)._from_config(model.config, dtype=torch.float32)
    for path, buffer in wide.named_buffers():  # what a model computes for itself is rounded in a narrow dtype
        module, _, key = path.rpartition(".")
        own = model.get_submodule(module)
        if key in own._non_persistent_buffers_set:
            own.register_buffer(key, buffer, persistent=False)
    setattr(model, _ASKED, torch.float32)
    return model


@contextlib.contextmanager
def widened(model: nn.Module) -> Iterator[None]:
    """Inside, FSDP2 shards a model; its shards then get the dtype that load_to_shard was asked for.

    Inside nothing of such a model is trainable: accelerate would convert all that is, before it shards it.
    """
    asked = getattr(model, _ASKED, None)
    if asked is None:
        yield
        return
    trainable = {name for name, weight in model.named_parameters() if weight.requires_grad}
    model.requires_grad_(False)
    yield
    delattr(model, _ASKED)
    model.to(asked)
    for name, weight in model.named_parameters():
        weight.requires_grad_(name in trainable)


def _stored_dtype(name: str, options: dict[str, Any]) -> torch.dtype | None:
    """The one 16-bit dtype of all floating-point weights in a model's files; None where there is no such dtype."""
    if "quantization_config" in options or "distributed_config" in options:
        return None
    try:
        config = config_of(name, **options)
    except OSError:  # load_causal_lm says it
        return None
    if config.get_text_config() is not config or getattr(config, "quantization_config", None) is not None:
        return None
    found = set()
    for file in _weight_files(name, options):
        with safe_open(file, "pt") as opened:
            found |= {opened.get_slice(key).get_dtype() for key in opened.keys()}  # noqa: SIM118
    return _NARROW.get(found.pop()) if len(found) == 1 else None


def _weight_files(name: str, options: dict[str, Any]) -> list[str]:
    """The safetensors files of a model; none where it has others or lies in a place that only from_pretrained finds."""
    from transformers.utils import cached_file
    from transformers.utils.hub import get_checkpoint_shard_files

    access = {key: options[key] for key in ("revision", "token", "cache_dir") if key in options}
    if {"subfolder", "variant", "state_dict", "gguf_file"} & options.keys():
        return []
    with contextlib.suppress(OSError):
        return [cached_file(name, "model.safetensors", **access)]
    with contextlib.suppress(OSError):
        index = cached_file(name, "model.safetensors.index.json", **access)
        return get_checkpoint_shard_files(name, index, **access)[0]
    return []
