"""Reference log-probs on disk: a folder of shards that a killed run resumes from and that detects damaged files.

    <key>/manifest.json                                    what the log-probs belong to: tokens, model, dtype, version
    <key>/0000000000-0000000256.<fingerprint>.safetensors  one shard: rows 0 to 255 in the order of prompts
        logps       (N,) float32     every response token, nats
        cu_targets  (S + 1,) int32   response s owns logps[cu_targets[s]:cu_targets[s + 1]]
        pairs       (rows, K) int32  the responses of every row: chosen and rejected, or a list's, filled with −1

<key> is a fingerprint of the manifest's identity: other tokens, weights or dtypes have another folder, and runs that
differ in beta or loss share one. A shard is written to a temporary file, flushed and renamed, so that a file under its
name is whole. Its name holds a fingerprint of its content, keyed by the identity: a flipped byte, a truncated file or a
shard of another cache does not match, is removed with a warning that names it, and its rows are computed again. The
manifest is for people to read, and is compared where a cache itself is named and not the folder above it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import uuid
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.numpy
import torch

from dpofast.common.atomic_files import put
from dpofast.scoring.responses import ResponseLogps

_ARRAYS = {"logps": "logps", "cu_targets": "cu_targets", "rows": "pairs"}  # ResponseLogps' fields, names in a shard
_MANIFEST, _SUFFIX, _ASIDE = "manifest.json", ".safetensors", ".tmp-"
_FORMAT = "dpofast reference log-probs, format 1"
# Writing a shard takes seconds: a temporary file of an hour ago was left by a killed run.
_ABANDONED_SECONDS = 3600.0


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What reference log-probs belong to; the names are those in manifest.json.

    Attributes:
        tokens: fingerprint of the token ids of all rows.
        model: fingerprint of the reference model.
        dtype: how it computes: dtype, device, autocast, packed or padded rows.
        version: of the engine's numerics and of dpofast.
    """

    tokens: str
    model: str
    dtype: str
    version: str

    @property
    def key(self) -> str:
        """The cache's folder name: 32 hex digits."""
        return hashlib.blake2b(json.dumps(asdict(self), sort_keys=True).encode(), digest_size=16).hexdigest()


class ReferenceStore:
    """The shards of one identity. Several processes may read and write the same folder at once."""

    def __init__(self, root: str | os.PathLike[str], identity: Identity) -> None:
        """Find the cache in `root`: a folder of caches, or one cache (a folder with a manifest). Writes nothing.

        Raises:
            ValueError: root is a cache of another identity, or its manifest is damaged.
        """
        self.identity = identity
        root = Path(root).expanduser()
        is_cache = (root / _MANIFEST).exists()
        self.folder = root if is_cache else root / identity.key
        if is_cache:
            self._check_manifest()
        self._prepared = False
        self._shards: dict[str, list[Path]] = {}
        if self.folder.is_dir():
            for path in sorted(self.folder.glob(f"*{_SUFFIX}")):
                rows, _, _ = path.name.partition(".")
                self._shards.setdefault(rows, []).append(path)

    def read(self, start: int, stop: int) -> ResponseLogps | None:
        """The shard of rows start to stop − 1, or None where there is none that is whole; warns of damaged ones."""
        for path in self._shards.get(_rows(start, stop), []):
            try:
                content = path.read_bytes()
            except FileNotFoundError:  # another process found it damaged first
                continue
            except OSError as error:
                self._warn(f"{path}: cannot be read ({error.strerror or error})", start, stop)
                continue
            if path.name == self._name(start, stop, content):
                shard = safetensors.numpy.load(content)
                return ResponseLogps(**{name: torch.from_numpy(shard[stored]) for name, stored in _ARRAYS.items()})
            self._warn(f"{path}: damaged, its checksum does not match", start, stop)
            with contextlib.suppress(OSError):
                path.unlink()
        return None

    def write(self, start: int, stop: int, shard: ResponseLogps) -> None:
        """Store the shard of rows start to stop − 1.

        Raises:
            OSError: it cannot be written; nothing that looks like a shard is left.
        """
        if not self._prepared:
            self._prepare()
        content = safetensors.numpy.save({stored: getattr(shard, name).numpy() for name, stored in _ARRAYS.items()})
        _write_whole(self.folder / self._name(start, stop, content), content)

    def _check_manifest(self) -> None:
        way_on = "name the folder above it, where every reference has a cache of its own, or another folder"
        recorded = _read_manifest(self.folder)
        if recorded is None:
            raise ValueError(f"{self.folder}: its {_MANIFEST} is damaged, so what it belongs to is unknown: {way_on}")
        asked = asdict(self.identity)
        other = [name for name in asked if recorded.get(name) != asked[name]]
        if other:
            values = "; ".join(f"{name}: {recorded.get(name)} there, {asked[name]} here" for name in other)
            raise ValueError(
                f"{self.folder}: its reference log-probs belong to another {', '.join(other)} ({values}): {way_on}"
            )

    def _prepare(self) -> None:
        """Make the folder and its manifest, and remove the temporary files of killed runs."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob(f"{_ASIDE}*"):
            with contextlib.suppress(OSError):  # its writer, or another cleaner, was faster
                if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                    path.unlink()
        manifest = {"format": _FORMAT, **asdict(self.identity)}
        if _read_manifest(self.folder) != manifest:
            _write_whole(self.folder / _MANIFEST, json.dumps(manifest, indent=1).encode() + b"\n")
        self._prepared = True

    def _name(self, start: int, stop: int, content: bytes) -> str:
        fingerprint = hashlib.blake2b(content, digest_size=16, key=self.identity.key.encode()).hexdigest()
        return f"{_rows(start, stop)}.{fingerprint}{_SUFFIX}"

    @staticmethod
    def _warn(message: str, start: int, stop: int) -> None:
        warnings.warn(f"{message}; its {stop - start} rows are computed again", stacklevel=4)


def _rows(start: int, stop: int) -> str:
    """Return the prefix of a shard's file name."""
    return f"{start:010d}-{stop:010d}"


def _read_manifest(folder: Path) -> dict[str, str] | None:
    """The manifest, or None where there is none or it cannot be read."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_bytes())
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) else None


def _write_whole(path: Path, content: bytes) -> None:
    """Write a file atomically, through a temporary one."""
    aside = path.with_name(_ASIDE + uuid.uuid4().hex)
    try:
        aside.write_bytes(content)
        put(aside, path)
    except OSError:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise
