"""The identity of a run: what must be equal in the run that wrote a checkpoint and the one that resumes it.

Data, tokenizers and models are compared by fingerprints, options by their values. The states of optimizer and schedule
come from the checkpoint whatever the options of the resuming run say, so a changed option would silently do nothing.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from torch import Tensor, nn

from dpofast.checkpointing.fsdp import gathered, without_wrappers
from dpofast.checkpointing.zero import whole_shape

# Of transformers.TrainingArguments.
_OPTIONS = (
    "seed data_seed train_sampling_strategy dataloader_drop_last optim optim_args learning_rate weight_decay "
    "adam_beta1 adam_beta2 adam_epsilon max_grad_norm lr_scheduler_type lr_scheduler_kwargs warmup_steps bf16 fp16 "
    "neftune_noise_alpha"
).split()
# These may be changed on purpose.
_LENGTH = ("num_train_epochs", "max_steps")
_PARAMETERS, _PER_STEP = "trainable parameters", "examples per step"
_WAYS = {
    "tokenizer": "pass the tokenizer that the run began with: it lies in the checkpoint",
    "train_dataset": "the data, or the way it becomes tokens, changed between the runs: pass the data as it was",
    "eval_dataset": "a run's evaluations are compared with each other, so pass the held-out data as it was",
    "frozen weights": "the checkpoint has only what is trained: load the base model that the run began with",
    "reference weights": "the model that a run begins from is its reference: pass that model and not a checkpoint",
}


def options_identity(args: Any, data_ranks: int) -> dict[str, Any]:
    """Returns the options of a TrainingArguments that determine a step on so many ranks, and the length of the run."""
    pairs = args.per_device_train_batch_size * args.gradient_accumulation_steps * data_ranks
    return {_PER_STEP: pairs, **{name: getattr(args, name) for name in (*_OPTIONS, *_LENGTH)}}


def parameters_identity(model: nn.Module) -> dict[str, Any]:
    """Returns names, shapes and dtypes of trained parameters, and a fingerprint of frozen ones."""
    named = list(model.named_parameters())
    trained = {
        without_wrappers(name): f"{str(p.dtype).removeprefix('torch.')} {'×'.join(map(str, whole_shape(p)))}"
        for name, p in named
        if p.requires_grad
    }
    frozen = [(name, p) for name, p in named if not p.requires_grad]
    return {_PARAMETERS: trained, **({"frozen weights": weights_fingerprint(frozen)} if frozen else {})}


def weights_fingerprint(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """Returns a hash over 64 evenly spaced values of each tensor: training changes nearly all values.

    Sharded ones are gathered, one at a time, a collective; the result is that of whole ones.
    """
    digest = _digest()
    for name, parameter in parameters:
        flat = gathered(parameter).detach().reshape(-1)
        digest.update(f"{without_wrappers(name)} {tuple(whole_shape(parameter))}".encode())
        digest.update(flat[:: max(1, len(flat) // 64)][:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def reference_identity(model: nn.Module, ref_model: nn.Module | None) -> dict[str, str]:
    """Returns the fingerprint of the first reference; an adapter's base model is in parameters_identity already."""
    if ref_model is None and hasattr(model, "disable_adapter"):
        return {}
    return {"reference weights": weights_fingerprint((ref_model or model).named_parameters())}


def tokenizer_identity(tokenizer: Any) -> str:
    """Returns size and fingerprint of the vocabulary, added tokens included."""
    digest = _digest()
    vocab = tokenizer.get_vocab()
    digest.update(json.dumps(sorted(vocab.items(), key=lambda item: item[1])).encode())
    return f"{len(vocab)} tokens with checksum {digest.hexdigest()}"


def dataset_identity(dataset: Any, columns: Sequence[str] | None = None) -> str:
    """Returns the number of rows and, for a datasets.Dataset, a fingerprint of its values in these columns (None: all).

    Names that the dataset does not have are passed over.
    For a dict of datasets, the identity of each.
    """
    if isinstance(dataset, dict):
        return ", ".join(f"{name}: {dataset_identity(part, columns)}" for name, part in dataset.items())
    if not isinstance(dataset, Dataset):
        return f"{len(dataset)} rows" if hasattr(dataset, "__len__") else type(dataset).__name__
    names = sorted(dataset.column_names if columns is None else set(columns).intersection(dataset.column_names))
    digest = _digest()
    for table in dataset.select_columns(names).with_format("arrow").iter(batch_size=1000):
        for name in names:
            _update(digest, table.column(name).combine_chunks())
    return f"{len(dataset)} rows with checksum {digest.hexdigest()}"


def check_same_run(then: Mapping[str, Any], now: Mapping[str, Any], folder: Any, data_ranks: int) -> bool:
    """Compare two identities in the entries that both have; returns whether the run's length is the same.

    Args:
        then: of the run that wrote the checkpoint.
        now: of this one.
        folder: the checkpoint.
        data_ranks: among how many a step's examples are divided now.

    Raises:
        ValueError: they differ; the message has each name, its value then and now, and what to do.
    """
    now = json.loads(json.dumps(now, default=str))
    different = [name for name in now if name in then and then[name] != now[name]]
    length = [name for name in different if name in _LENGTH]
    if len(different) > len(length):
        texts = [_difference(name, then[name], now[name]) for name in different if name not in length]
        ways = [_WAYS[name] for name in different if name in _WAYS]
        if _PER_STEP in different and isinstance(then[_PER_STEP], int):
            ways.append(_way_to_keep(then[_PER_STEP], data_ranks))
        raise ValueError(
            f"resume_from_checkpoint: {folder} was written by another run: {'; '.join(texts)}. "
            + "".join(f"{way[0].upper()}{way[1:]}. " for way in ways)
            + "Go on with what the run began with, or begin a new run: with this folder as the model, and another "
            "output_dir"
        )
    if length:
        texts = [_difference(name, then[name], now[name]) for name in length]
        warnings.warn(
            f"resuming {folder} as a run of another length: {'; '.join(texts)}. From here the learning rate follows "
            "the new length, so the result is not that of a run which had it from the start",
            stacklevel=2,
        )
    if "eval_dataset" in now and "eval_dataset" not in then:
        warnings.warn(
            f"resuming {folder} with an eval_dataset, which the run did not have before: its evaluations begin here",
            stacklevel=2,
        )
    return not length


def _way_to_keep(examples: int, data_ranks: int) -> str:
    """How a step keeps its examples on so many ranks."""
    each, rest = divmod(examples, data_ranks)
    if rest or not each:
        fitting = [str(number) for number in range(1, examples + 1) if examples % number == 0]
        return (
            f"steps of {examples} examples cannot be divided evenly among {data_ranks} ranks: start one of "
            f"{', '.join(fitting)}"
        )
    pairs = [(size, each // size) for size in range(each, 0, -1) if each % size == 0]
    ways = " or ".join(f"{size} and {accumulation}" for size, accumulation in pairs[:4])
    return (
        f"for {examples} examples a step on {data_ranks} ranks set per_device_train_batch_size and "
        f"gradient_accumulation_steps to {ways}"
    )


def _difference(name: str, then: Any, now: Any) -> str:
    if name == _PARAMETERS:
        names = [key for key in {**then, **now} if then.get(key) != now.get(key)]
        texts = [f"{key} was {then.get(key, 'not trained')}, is {now.get(key, 'not trained')}" for key in names[:3]]
        return f"{name}: {', '.join(texts)}{f', and {len(names) - 3} more' if len(names) > 3 else ''}"
    return f"{name} was {then}, is {now}"


def _update(digest: Any, array: pa.Array) -> None:
    """Add values independent of their layout: equal rows may have other integer widths or chunks."""
    kind = array.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        _update(digest, array.value_lengths())
        _update(digest, array.flatten())
    elif pa.types.is_integer(kind) and array.null_count == 0:
        digest.update(array.to_numpy(zero_copy_only=False).astype(np.int64).tobytes())
    elif pa.types.is_floating(kind):
        digest.update(array.to_numpy(zero_copy_only=False).astype(np.float64).tobytes())
    else:
        digest.update(json.dumps(array.to_pylist(), default=str).encode())


def _digest() -> Any:
    return hashlib.blake2b(digest_size=8)
