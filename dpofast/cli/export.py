"""`dpofast export CHECKPOINT OUTPUT`: make a model's folder of a sharded checkpoint, in one process and without GPUs.

The checkpoint is checked against its manifest first. OUTPUT gets the weights as safetensors by the names that
save_pretrained writes, with config, tokenizer and generation config, or an adapter's folder where an adapter was
trained: what save_model() would have written at that step, to the last bit. It appears complete or not at all, and
takes the memory of one model. A checkpoint of whole weights is a model's folder as it is.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, takewhile
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from dpofast.checkpointing.folder import MANIFEST, STATE, DamagedCheckpoint, checkpoints, verify
from dpofast.checkpointing.sharded import SHARDS, is_sharded_checkpoint, whole_weights
from dpofast.checkpointing.weights import saved_once
from dpofast.cli.arguments import parse, quiet
from dpofast.common.atomic_files import sync
from dpofast.common.locks import WriteLock
from dpofast.common.printable import printable
from dpofast.model.load import ADAPTER_FILE, config_of

_CONFIGS = ("config.json", ADAPTER_FILE)
# Of a checkpoint's files: what only resuming needs, by name or suffix.
_OF_TRAINING = (MANIFEST, STATE, SHARDS, ".pt", ".pth", ".bin", ".safetensors")


@dataclass(kw_only=True)
class ExportArguments:
    """Options of `dpofast export`."""

    checkpoint: str = field(metadata={"help": "The folder of a sharded checkpoint; the first word without a flag."})
    output: str = field(metadata={"help": "The folder to write; the second word without a flag."})
    dtype: Literal["float32", "bfloat16", "float16"] | None = field(
        default=None, metadata={"help": "Round the weights to this dtype; by default they stay what they are."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Write over a model's folder that exists."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the model's own code, which lies in the checkpoint."}
    )

    def __post_init__(self) -> None:
        """Check what is cheap to check."""
        folder = Path(self.checkpoint)
        inside = checkpoints(folder) if folder.is_dir() and not (folder / MANIFEST).exists() else []
        if inside:
            raise ValueError(
                f"checkpoint: {folder} is a run's folder: name one of its checkpoints, such as {inside[-1]}"
            )
        if not folder.is_dir():
            raise ValueError(f"checkpoint: expected the folder of a checkpoint, got {self.checkpoint!r}")
        if not is_sharded_checkpoint(folder):
            if any(folder.glob("*.safetensors")):
                raise ValueError(
                    f"checkpoint: {folder} holds whole weights, so it is a model's folder as it is: load it by its name"
                )
            raise ValueError(f"checkpoint: expected a sharded checkpoint, got {folder}, which has no folder {SHARDS}")
        self.check_output()

    def check_output(self) -> None:
        """Refuse an output that exists, and always one that is no model's folder."""
        path = Path(self.output)
        if not os.path.lexists(path):
            return
        if not self.overwrite:
            raise ValueError(f"output: {path} exists already: name another, or pass --overwrite")
        if not any((path / name).is_file() for name in _CONFIGS) or (path / MANIFEST).exists() or checkpoints(path):
            raise ValueError(
                f"output: --overwrite replaces a model's folder, and {path} is none, or has checkpoints: name another"
            )


def main(argv: Sequence[str]) -> int:
    """Export, and return 0.

    Raises:
        ValueError: no sharded checkpoint, a damaged one, a model that transformers does not have, or an output that
            exists or that another process writes.
        OSError: the output cannot be written (a full disk).
    """
    words = list(argv)
    named = list(takewhile(lambda word: not word.startswith("-"), words))[:2]
    flags = chain(*zip(("--checkpoint", "--output"), named, strict=False))
    words = [*flags, *words[len(named) :]]
    arguments, _ = parse((ExportArguments,), words, prog="dpofast export", description=__doc__)
    quiet(False)
    folder, output = Path(arguments.checkpoint), Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with WriteLock(output, output.with_name(f".{output.name}.lock")):
        arguments.check_output()  # another run may have written it since the first look
        try:
            verify(folder)
        except DamagedCheckpoint as error:
            raise ValueError(f"checkpoint: {error}") from error
        weights = whole_weights(folder)
        if arguments.dtype is not None:
            for name, weight in weights.items():
                if weight.is_floating_point():
                    weights[name] = weight.to(getattr(torch, arguments.dtype))
        size = sum(weight.nbytes for weight in weights.values())
        aside = output.with_name(f".tmp-{output.name}")
        shutil.rmtree(aside, ignore_errors=True)
        try:
            _write(folder, aside, weights, arguments)
            _put(aside, output)
        except OSError as error:
            raise OSError(f"output: {output} cannot be written: {error.strerror or error}") from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    print(printable(f"{len(weights)} weights of {size / 1e6:,.1f} MB are in {output}"))
    return 0


def _write(folder: Path, aside: Path, weights: dict[str, Tensor], arguments: ExportArguments) -> None:
    aside.mkdir(parents=True)
    if (folder / ADAPTER_FILE).is_file():
        save_file(weights, aside / "adapter_model.safetensors", metadata={"format": "pt"})
    else:
        model = _empty_model(folder, trust_remote_code=arguments.trust_remote_code)
        _check_names(folder, model, weights)
        model.save_pretrained(aside, state_dict=dict(weights))
    for path in folder.iterdir():  # as they were written beside the shards
        if path.is_file() and not path.name.endswith(_OF_TRAINING):
            shutil.copyfile(path, aside / path.name)
    config = aside / "config.json"
    if arguments.dtype is not None and config.is_file():
        changed = _with_dtype(json.loads(config.read_bytes()), arguments.dtype)
        config.write_text(json.dumps(changed, indent=2, sort_keys=True) + "\n")


def _empty_model(folder: Path, *, trust_remote_code: bool) -> Any:
    """The checkpoint's model without memory for weights."""
    import transformers

    config = config_of(str(folder), trust_remote_code=trust_remote_code)
    name = (config.architectures or ["None"])[0]
    kind = getattr(transformers, name, None)
    with torch.device("meta"):
        if kind is not None:
            return kind(config)
        if trust_remote_code:
            return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    raise ValueError(
        f"checkpoint: {folder} is of a {name}, which transformers does not have: pass --trust_remote_code if its own "
        "code shall run"
    )


def _check_names(folder: Path, model: Any, weights: dict[str, Tensor]) -> None:
    own = saved_once(model, model.state_dict())
    unlike = sorted(own.keys() ^ weights.keys())
    if unlike:
        raise ValueError(
            f"checkpoint: {folder} has other weights than {type(model).__name__} by its config.json: not in both: "
            f"{', '.join(unlike[:3])}"
        )


def _with_dtype(config: Any, dtype: str) -> Any:
    """A config with this dtype wherever it names one, in parts of a composite model too."""
    if not isinstance(config, dict):
        return config
    return {name: dtype if name == "dtype" else _with_dtype(value, dtype) for name, value in config.items()}


def _put(aside: Path, output: Path) -> None:
    """Sync a complete folder to disk and rename it; a folder in its place is deleted afterwards."""
    for path in aside.rglob("*"):
        sync(path)
    sync(aside)
    replaced = output.with_name(f".tmp-replaced-{output.name}")
    shutil.rmtree(replaced, ignore_errors=True)
    if output.exists():
        os.rename(output, replaced)
    os.rename(aside, output)
    sync(output.parent)
    shutil.rmtree(replaced, ignore_errors=True)
