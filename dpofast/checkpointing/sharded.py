"""Sharded checkpoints: every rank writes its own shards of weights and optimizer state, and nothing is gathered.

    checkpoint-40/sharded/            written by torch.distributed.checkpoint: tensors, by the names
        .metadata, __0_0.distcp ...       model/<name of a weight>, optimizer/<key>/<name of a weight>
    checkpoint-40/optimizer_groups.pt the optimizer's options, and those of its states that are no tensors
    checkpoint-40/config.json ...     what lies beside the weights in a model's folder, or an adapter's

It works for every model whose weights are DTensors, whatever sharded them (FSDP2, tensor parallelism). Shards are read
into whatever the resumed run has: shards over another number of devices, or whole weights.

    save_sharded(model, optimizer, folder)              a collective
    load_sharded_weights(model, folder)                 each rank by itself
    load_sharded_optimizer(model, optimizer, folder)    each rank by itself, after the weights

Weights have the names that save_pretrained writes for an adapter, and the model's own otherwise; tied ones are there
once. Of an adapter's model only the adapter is written. A weight that no gradient has reached has no optimizer state,
before and after.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, load, save
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from dpofast.checkpointing.fsdp import check_groups, group_names, load_named
from dpofast.checkpointing.weights import stored_names
from dpofast.checkpointing.write_errors import as_os_errors

SHARDS, GROUPS = "sharded", "optimizer_groups.pt"
_MODEL, _OPTIMIZER = "model/", "optimizer/"
# What torch pickles in .metadata.
_READ = {
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "ChunkStorageMetadata"),
        *("BytesStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size", "device", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
    "collections": {"OrderedDict"},
}


def is_sharded_checkpoint(folder: str | Path) -> bool:
    """Whether the weights of a checkpoint are shards."""
    return Path(folder, SHARDS).is_dir()


def save_sharded(model: nn.Module, optimizer: Any, folder: str | Path) -> None:
    """Write this rank's shards of a model and its optimizer; the first rank writes the options. A collective.

    Args:
        model: its weights are DTensors; whole ones among them are written once.
        optimizer: of the model's parameters.
        folder: of the checkpoint; it exists.

    Raises:
        ValueError: the optimizer keeps whole, or differently shaped, states of a sharded weight.
        OSError: the disk is full, on any rank.
    """
    own = model.state_dict()
    tensors = {f"{_MODEL}{name}": own[key] for name, key in stored_names(model).items()}
    groups: list[dict[str, Any]] = []
    values: dict[str, dict[str, Any]] = {}
    for names, group in zip(group_names(model, optimizer), optimizer.param_groups, strict=True):
        groups.append({**{key: value for key, value in group.items() if key != "params"}, "params": names})
        for name, weight in zip(names, group["params"], strict=True):
            for key, state in optimizer.state.get(weight, {}).items():
                if isinstance(state, Tensor):
                    _check_state(name, weight, key, state, optimizer)
                    tensors[f"{_OPTIMIZER}{key}/{name}"] = state
                else:
                    values.setdefault(name, {})[key] = state
    try:
        save(tensors, storage_writer=FileSystemWriter(Path(folder, SHARDS)))
    except CheckpointException as error:  # no Exception, so nobody would catch it
        raise _first_failure(error) from error
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        torch.save({"groups": groups, "values": values}, Path(folder, GROUPS))


def load_sharded_weights(model: nn.Module, folder: str | Path) -> None:
    """Read weights into a model, in place: into this rank's shards, or whole ones.

    Raises:
        ValueError: weights are missing, or the model does not have them, or in another shape.
    """
    sizes = stored_sizes(folder)
    found, names = set(sizes), stored_names(model)
    missing, unknown = sorted(names.keys() - found), sorted(found - names.keys())
    if missing or unknown:
        raise ValueError(
            f"{folder}: expected the weights of {type(model).__name__} in its shards, {len(missing)} are missing "
            f"{missing[:3]} and {len(unknown)} unknown {unknown[:3]}"
        )
    own = model.state_dict()
    for name, (size, _) in sizes.items():
        if own[names[name]].shape != size:
            raise ValueError(
                f"{folder}: expected {name} in the shape {tuple(own[names[name]].shape)}, got {tuple(size)}"
            )
    read_tensors({f"{_MODEL}{name}": own[key] for name, key in names.items()}, folder)


def load_sharded_optimizer(model: nn.Module, optimizer: Any, folder: str | Path) -> None:
    """Read the optimizer's state into shards like those of the weights, or whole tensors.

    Raises:
        ValueError: it is of an optimizer of other weights.
    """
    stored = torch.load(Path(folder, GROUPS), map_location="cpu", weights_only=True)
    here = list(group_names(model, optimizer))
    check_groups(Path(folder, GROUPS), [group["params"] for group in stored["groups"]], here)
    weights = {
        name: weight
        for names, group in zip(here, optimizer.param_groups, strict=True)
        for name, weight in zip(names, group["params"], strict=True)
    }
    tensors = {}
    for path, entry in _metadata(folder).state_dict_metadata.items():
        if not path.startswith(_OPTIMIZER) or not isinstance(entry, TensorStorageMetadata):
            continue
        weight = weights[path.removeprefix(_OPTIMIZER).split("/", 1)[1]].detach()
        like, dtype = entry.size == weight.shape, entry.properties.dtype
        tensors[path] = torch.empty_like(weight, dtype=dtype) if like else torch.empty(entry.size, dtype=dtype)
    read_tensors(tensors, folder)
    states: dict[str, dict[str, Any]] = {name: dict(values) for name, values in stored["values"].items()}
    for path, tensor in tensors.items():
        key, name = path.removeprefix(_OPTIMIZER).split("/", 1)
        states.setdefault(name, {})[key] = tensor
    load_named(model, optimizer, stored["groups"], states, Path(folder, GROUPS))


def stored_sizes(folder: str | Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Returns shape and dtype of every weight of a sharded checkpoint."""
    return {
        path.removeprefix(_MODEL): (entry.size, entry.properties.dtype)
        for path, entry in _metadata(folder).state_dict_metadata.items()
        if path.startswith(_MODEL) and isinstance(entry, TensorStorageMetadata)
    }


def whole_weights(folder: str | Path) -> dict[str, Tensor]:
    """Returns the weights of a sharded checkpoint, each whole and on the CPU, by name: one model's memory."""
    weights = {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in stored_sizes(folder).items()}
    read_tensors({f"{_MODEL}{name}": weight for name, weight in weights.items()}, folder)
    return weights


def read_tensors(tensors: dict[str, Tensor], folder: str | Path) -> None:
    """Read tensors in place, by the names of the module's docstring, or those shards of them that this rank has."""
    if not tensors:
        return
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # it is not needed
            load(dict(tensors), storage_reader=_Reader(Path(folder, SHARDS)), no_dist=True)
    except CheckpointException as error:
        raise _first_failure(error) from error


def own_shard_files(folder: Path, rank: int) -> list[Path]:
    """Returns the files that a rank has written into the folder of a checkpoint's shards."""
    return sorted(folder.joinpath(SHARDS).glob(f"__{rank}_*"))


def without_weights(model: Any, folder: str, save: Callable[..., None]) -> None:
    """Write what lies beside a model's or adapter's weights: its config, the tokenizer, the model card.

    Args:
        model: as it is trained.
        folder: of the checkpoint.
        save: writes a model's folder from state_dict.
    """
    # PEFT picks an adapter's weights out of what it gets, and fails where there are none.
    adapter = hasattr(model, "peft_config")
    save(state_dict={name: torch.empty(0) for name in model.state_dict()} if adapter else {})
    for path in Path(folder).rglob("*.safetensors*"):
        path.unlink(missing_ok=True)  # another rank of a divided model may have come first


def _check_state(name: str, weight: Tensor, key: str, state: Tensor, optimizer: Any) -> None:
    if state.dim() and (state.shape != weight.shape or hasattr(weight, "device_mesh") != hasattr(state, "device_mesh")):
        kind = type(getattr(optimizer, "optimizer", optimizer)).__name__
        raise ValueError(
            f"optim: {kind} keeps {key} {tuple(state.shape)} of {name} {tuple(weight.shape)}, which is not sharded as "
            "the weight is, so shards of it cannot be written: expected an optimizer whose states are as large as the "
            "weights (adamw_torch)"
        )


class _Reader(FileSystemReader):
    """torch's, which unpickles what lies beside the tensors: here nothing but descriptions of tensors."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return _metadata(self.path.parent)  # type: ignore[union-attr]


def _metadata(folder: str | Path) -> Metadata:
    path = Path(folder, SHARDS, ".metadata")
    with open(path, "rb") as file:
        try:
            found = _Unpickler(file).load()
        except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}: expected descriptions of tensors by torch {torch.__version__}: {error}"
            ) from error
    if not isinstance(found, Metadata):
        raise ValueError(f"{path}: expected descriptions of tensors, got {type(found).__name__}")
    return found


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _READ.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not describe a tensor")


def _first_failure(error: CheckpointException) -> Exception:
    """The first rank's error, as an OSError where it is one of writing or reading files."""
    causes: Iterable[tuple[int, Any]] = sorted(error.failures.items())
    rank, (cause, _) = next(iter(causes))
    try:
        with as_os_errors():
            raise cause
    except OSError as found:
        return OSError(f"rank {rank}: {found}")
    except Exception as found:
        return RuntimeError(f"rank {rank}: {type(found).__name__}: {found}")
