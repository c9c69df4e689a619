"""Fingerprints (BLAKE2b) of what log-probs depend on: the model's weights and settings, token ids and images."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn

from dpofast.checkpointing.fsdp import gathered, without_wrappers
from dpofast.checkpointing.zero import whole_shape
from dpofast.data.arrow import chunk_bounds, read_chunks
from dpofast.data.token_rows import RowTokens, has_lists, image_columns, token_columns, weight_columns
from dpofast.model.parts import base_causal_lm

# blake2b hashes 1 GB/s a thread, outside of Python's lock. The digest depends on this size: keep it.
_CHUNK_BYTES = 1 << 22
# The attributes in which PEFT's wrappers hold the layer that they wrap.
_PLAIN = ("base_layer", "original_module")
_ROWS = 1024
# Settings that change no log-prob: names, paths, and what only generation reads.
_NO_EFFECT = {
    *("_name_or_path", "name_or_path", "base_model_name_or_path", "revision", "transformers_version"),
    *("architectures", "use_cache", "dtype", "torch_dtype", "inference_mode"),
}


def model_fingerprint(model: Any, dtype: torch.dtype | None = None) -> str:
    """64 hex digits over the model's class, settings, weights and buffers: about a second for 0.5 GB on one core.

    Weights that bitsandbytes has quantized count with their scales, which are neither parameters nor buffers.

    Of a PEFT model only the active adapters count, with their settings: inside `disable_adapter()` its fingerprint is
    that of its base model. Sharded tensors are gathered, one at a time, a collective: all ranks call this together, and
    the result is that of the whole model.

    Args:
        model: the model.
        dtype: floating-point parameters count as they are in this dtype, in which FSDP2 gathers them; None: their own.
    """
    base = base_causal_lm(model)
    settings = {
        "class": own_class(base).__name__,
        "config": _plain(base.config.to_dict()),
        "adapters": {name: _plain(model.peft_config[name].to_dict()) for name in _adapters(model)},
    }
    total = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=32)
    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
        for name, tensor in _weights(model, dtype):
            total.update(f"{name} {tensor.dtype} {tuple(whole_shape(tensor))}".encode())
            for digest in pool.map(_chunk_digest, _chunks(tensor)):
                total.update(digest)
    return total.hexdigest()


def own_class(model: Any) -> type:
    """The class of a model; of one that FSDP2 has sharded, whose class is a subclass, the one beneath."""
    from torch.distributed.fsdp import FSDPModule

    return next(each for each in type(model).__mro__ if not issubclass(each, FSDPModule))


def _adapters(model: Any) -> list[str]:
    """Names of the active adapters."""
    return sorted({name for active in _wrappers(model).values() for name in active})


def _wrappers(model: Any) -> dict[str, list[str]]:
    """The adapters that each of PEFT's wrappers around layers uses now, by the wrapper's name."""
    return {
        f"{name}.": [] if module.disable_adapters else list(module.active_adapters)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "disable_adapters", None), bool)  # transformers' models have a method so named
    }


def _weights(model: Any, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    """The parameters (floating-point ones in this dtype), buffers and scales in use, named as without wrappers."""
    wrappers = _wrappers(model)
    for named in (model.named_parameters(), model.named_buffers(), _scales(model)):
        for name, tensor in named:
            if dtype is not None and isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
                tensor = tensor.to(dtype)
            # <wrapper>.base_layer.weight, <wrapper>.lora_A.<adapter>.weight, <wrapper>.modules_to_save.<adapter>.weight
            inside = [name.removeprefix(wrapper).split(".") for wrapper in wrappers if name.startswith(wrapper)]
            used = [active for wrapper, active in wrappers.items() if name.startswith(wrapper)]
            if all(parts[0] in _PLAIN or parts[1] in active for parts, active in zip(inside, used, strict=True)):
                for plain in _PLAIN:
                    name = name.replace(f".{plain}.", ".")
                yield without_wrappers(name).removeprefix("base_model.model."), tensor


def _scales(model: Any) -> Iterator[tuple[str, Tensor]]:
    """What bitsandbytes keeps beside its quantized weights: of 4 bits the QuantState, of 8 bits the scales of rows.

    A layer has it, or its weight; sharded weights have nothing, and every process all of it.
    """
    for name, module in model.named_modules():
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        state: Any = getattr(weight, "quant_state", None) or getattr(module, "quant_state", None)
        if hasattr(state, "as_dict"):
            for key, tensor in state.as_dict(packed=True).items():
                yield f"{name}.weight.{key}", tensor
        scales = getattr(weight, "SCB", None)
        scales = getattr(getattr(module, "state", None), "SCB", None) if scales is None else scales  # after a forward
        if isinstance(scales, Tensor):
            yield f"{name}.weight.SCB", scales


def _chunks(tensor: Any) -> list[Tensor]:
    flat = gathered(tensor).detach().contiguous().reshape(-1)
    return list(flat.split(max(1, _CHUNK_BYTES // flat.element_size()))) if flat.numel() else []


def _chunk_digest(chunk: Tensor) -> bytes:
    return hashlib.blake2b(chunk.cpu().view(torch.uint8).numpy().data, digest_size=32).digest()


def _plain(settings: Any) -> Any:
    """Settings as JSON can hold them, in a fixed order, without those in _NO_EFFECT."""
    if isinstance(settings, dict):
        kept = {str(name): value for name, value in settings.items() if name not in _NO_EFFECT}
        return {name: _plain(value) for name, value in kept.items() if not name.endswith("_token_id")}
    if isinstance(settings, (set, frozenset)):
        return sorted(map(str, settings))
    if isinstance(settings, (list, tuple)):
        return [_plain(value) for value in settings]
    return settings if isinstance(settings, (str, int, float, bool, type(None))) else str(settings)


@dataclass(frozen=True, eq=False)
class ResponseFingerprints:
    """What tells the R responses of n rows apart, numbered row by row, in a list best first.

    Attributes:
        bounds: (n + 1,) int64; row i has the responses bounds[i] to bounds[i + 1] − 1.
        tokens: (R, 2) uint64, 128 bits of each response with its prompt and the prompt's images.
        weights: (R,) uint64 of the weights of its tokens; None where the rows bring none.
        lists: the rows are lists, not pairs.
    """

    bounds: np.ndarray
    tokens: np.ndarray
    weights: np.ndarray | None
    lists: bool

    @classmethod
    def of(cls, dataset: Dataset) -> ResponseFingerprints:
        """Computes them for a token-level dataset."""
        columns = dataset.column_names
        names = (*token_columns(columns), *image_columns(columns), *weight_columns(columns))
        counts, digests, weights = [np.zeros(1, np.int64)], [b""], list[np.ndarray]()
        for table in read_chunks(dataset, names, chunk_bounds(len(dataset), _ROWS)):
            rows = RowTokens.of(table)
            counts.append(np.diff(rows.bounds))
            digests += _token_digests(rows)
            if weight_columns(names):
                weights.append(_weight_digests(rows))
        tokens = np.frombuffer(b"".join(digests), np.uint64).reshape(-1, 2)
        of_weights = np.concatenate(weights) if weights else None
        return cls(np.concatenate(counts).cumsum(), tokens, of_weights, has_lists(names))

    def digest(self) -> str:
        """64 hex digits over the tokens and images of all rows, whatever stands beside them (weights, ranks, beta)."""
        total = hashlib.blake2b(self.tokens.tobytes(), digest_size=32)
        if self.lists:  # which responses belong together
            total.update(b"lists" + self.bounds.tobytes())
        return total.hexdigest()

    def first_equal(self) -> np.ndarray:
        """(R,) int64, the first response that equals each in its prompt and images, its tokens and their weights."""
        parts = [self.tokens] if self.weights is None else [self.tokens, self.weights[:, None]]
        return first_equal(np.concatenate(parts, axis=1))


def _token_digests(rows: RowTokens) -> Iterator[bytes]:
    """16 bytes of each response with its prompt and the prompt's images."""
    (prompts, starts), images = rows.prompts, rows.images
    responses = rows.responses()
    for index, count in enumerate(np.diff(rows.bounds).tolist()):
        prompt = prompts[starts[index] : starts[index + 1]]
        # The length in front marks where the prompt ends.
        common = hashlib.blake2b(len(prompt).to_bytes(8, "little"), digest_size=16)
        common.update(prompt.data)
        if images is not None and images.token_ids[index] >= 0:  # virtual ids are 30 bits of a key alone
            own = slice(images.bounds[index], images.bounds[index + 1])
            common.update(len(images.keys[own]).to_bytes(8, "little") + images.keys[own].tobytes())
            common.update(images.num_tokens[own].tobytes())
        for tokens in islice(responses, count):
            digest = common.copy()
            digest.update(tokens.data)
            yield digest.digest()


def _weight_digests(rows: RowTokens) -> np.ndarray:
    """(R,) uint64 of the weights of each response's tokens."""
    weights = rows.weights()
    weights = np.ones(rows.lengths.sum(), np.float32) if weights is None else weights
    ends = np.cumsum(rows.lengths).tolist()
    parts = (weights[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True))
    return np.frombuffer(b"".join(hashlib.blake2b(part.tobytes(), digest_size=8).digest() for part in parts), np.uint64)


def first_equal(fingerprints: np.ndarray) -> np.ndarray:
    """The index of the first row that equals each of the m rows (m, columns) uint64: (m,) int64."""
    order = np.lexsort(fingerprints.T)  # stable: equal rows stay in order
    in_order = fingerprints[order]
    new = np.ones(len(order), bool)
    new[1:] = (in_order[1:] != in_order[:-1]).any(1)
    first = np.empty(len(order), np.int64)
    first[order] = order[np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))]
    return first
