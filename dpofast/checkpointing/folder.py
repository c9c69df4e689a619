"""Checkpoint folders that are complete or absent: written to a staging folder, checksummed, then renamed.

    output_dir/.tmp-checkpoint-40    being written, or left behind by a run that was killed: never read
    output_dir/checkpoint-40         all of its files are on disk, and manifest.json names each with size and SHA-256

The manifest is written last and contains its own checksum, so a folder with a missing, truncated or changed file is
recognized before anything of it is loaded. Files that are added later (a note, an uploader's cache) are ignored.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from itertools import count
from pathlib import Path
from typing import Any

from transformers import TrainerState

from dpofast.common.atomic_files import sync

MANIFEST, STATE = "manifest.json", "trainer_state.json"
LOCK = ".lock"  # of an output folder, while a run writes to it
_FORMAT = 2  # 2: LogWindow.state_dict() in progress*.pt
_ASIDE = ".tmp-"
_NAME = re.compile(r"checkpoint-(\d+)")


class DamagedCheckpoint(ValueError):
    """A checkpoint that cannot be resumed: the message names the folder, the file and what is wrong."""


def staging_folder(folder: Path) -> Path:
    """Returns the folder in which a checkpoint is written: beside it, so that a rename moves it."""
    return folder.with_name(f"{_ASIDE}{folder.name}")


def entries_of(staged: Path, files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Sync files of a folder to disk; returns what a manifest says of each."""
    files = list(files)
    for path in files:
        sync(path)
    return {
        path.relative_to(staged).as_posix(): {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(files, _digests(files), strict=True)
    }


def seal(staged: Path, folder: Path, facts: dict[str, Any], known: Mapping[str, dict[str, Any]] | None = None) -> None:
    """Sync everything in `staged` to disk, write a manifest with the facts (JSON values), and rename it to `folder`.

    An existing folder of that name, a damaged checkpoint for example, is replaced.

    Args:
        staged: all ranks' files.
        folder: of the checkpoint.
        facts: of the run.
        known: entries_of() files that other ranks have written and synced.

    Raises:
        OSError: the disk is full, or cannot be written to, or a known file is not there.
    """
    known = known or {}
    for name, entry in known.items():
        if not (staged / name).is_file() or (staged / name).stat().st_size != entry["bytes"]:
            raise OSError(f"another rank's file {name} is not in {staged}: all ranks need the same output_dir")
    files = sorted(path for path in staged.rglob("*") if path.is_file())
    others = [path for path in files if path.relative_to(staged).as_posix() not in known]
    entries = {**known, **entries_of(staged, others)}
    manifest = staged / MANIFEST
    manifest.write_bytes(_serialized({"format": _FORMAT, **facts, "files": entries}))
    sync(manifest)
    for directory in {staged, *(path.parent for path in files)}:
        sync(directory)
    replaced = _aside(folder, "replaced")
    if folder.exists():
        os.rename(folder, replaced)
    os.rename(staged, folder)
    sync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def verify(folder: str | Path) -> dict[str, Any]:
    """Check that every file of a checkpoint is unchanged; returns its manifest.

    Raises:
        DamagedCheckpoint: a file is missing, truncated or changed, or there is no manifest.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    paths = [folder / name for name in manifest["files"]]
    try:
        for path, entry in zip(paths, manifest["files"].values(), strict=True):
            if not path.is_file():
                raise DamagedCheckpoint(f"{folder}: its file {path.relative_to(folder)} is missing")
            if path.stat().st_size != entry["bytes"]:
                raise DamagedCheckpoint(
                    f"{folder}: its file {path.relative_to(folder)} has {path.stat().st_size} bytes, and "
                    f"{entry['bytes']} were written"
                )
        for path, digest in zip(paths, _digests(paths), strict=True):
            if digest != manifest["files"][path.relative_to(folder).as_posix()]["sha256"]:
                raise DamagedCheckpoint(
                    f"{folder}: its file {path.relative_to(folder)} is damaged: it is not what was written (SHA-256)"
                )
    except OSError as error:  # a disk that fails
        raise DamagedCheckpoint(f"{folder}: {error.filename} cannot be read: {error.strerror}") from error
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns a checkpoint's manifest after comparing it with its own checksum; other files are not read.

    Raises:
        DamagedCheckpoint: it is missing, changed, or of a format that this version does not read.
    """
    try:
        if (folder / MANIFEST).exists() and not (folder / MANIFEST).is_file():  # a named pipe would be read for ever
            raise OSError(0, "it is no regular file")
        raw = (folder / MANIFEST).read_bytes()
    except FileNotFoundError:
        raise DamagedCheckpoint(
            f"{folder}: has no {MANIFEST}, so nobody can say whether it is whole (dpofast writes one last)"
        ) from None
    except OSError as error:
        raise DamagedCheckpoint(f"{folder}: its {MANIFEST} cannot be read: {error.strerror}") from error
    try:
        manifest = json.loads(raw)
        del manifest["checksum"]
        if raw == _serialized(manifest):
            if manifest["format"] != _FORMAT:
                age = "a newer" if manifest["format"] > _FORMAT else "an older"
                raise DamagedCheckpoint(f"{folder}: was written by {age} dpofast: install that to resume from it")
            if _lists_files(manifest["files"]):  # a forged one may have a right checksum too
                return manifest
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        if isinstance(error, DamagedCheckpoint):
            raise
    raise DamagedCheckpoint(f"{folder}: its {MANIFEST} is damaged: it is not what was written (SHA-256)")


def verify_resumable(folder: str | Path) -> dict[str, Any]:
    """Check that a checkpoint is complete and has all that resuming needs; returns its manifest.

    Raises:
        DamagedCheckpoint: it is damaged, has pickled weights, or was written with save_only_model.
    """
    manifest = verify(folder)
    if any(_is_pickled_weights(path.name) for path in Path(folder).iterdir()):
        raise DamagedCheckpoint(f"{folder}: holds weights in a pickle (.bin), and only safetensors are loaded")
    facts = {"step": int, "world_size": int, "run": dict, "save_only_model": bool}
    if not all(isinstance(manifest.get(name), kind) for name, kind in facts.items()):
        raise DamagedCheckpoint(f"{folder}: its {MANIFEST} is not that of a run: expected {', '.join(facts)} in it")
    if manifest["save_only_model"]:
        raise DamagedCheckpoint(
            f"{folder}: was written with save_only_model=True, so it has no optimizer state to go on with: begin a new "
            "run from its weights, with the folder as the model and another output_dir"
        )
    _check_state(Path(folder), manifest["step"])
    return manifest


def resolve_checkpoint(resume: Any, output_dir: str | Path) -> Path:
    """Returns the checkpoint to resume: a folder, or for True or "latest" the newest complete one of output_dir.

    Raises:
        DamagedCheckpoint: the named one cannot be resumed. The message names the newest that can.
        ValueError: there is none, or the name is no folder.
    """
    if resume is True or str(resume).lower() in ("latest", "true"):
        newest, damaged = newest_whole(output_dir)
        if newest is None:
            found = "; ".join(["of those in it none is whole", *damaged]) if damaged else "it has none"
            raise ValueError(f"resume_from_checkpoint: there is no checkpoint to resume from in {output_dir}: {found}")
        if damaged:
            warnings.warn(f"resuming from {newest}; passed over: {'; '.join(damaged)}", stacklevel=2)
        return newest
    folder = Path(resume)
    if not any((folder / name).is_file() for name in (MANIFEST, STATE)):
        raise ValueError(f"resume_from_checkpoint: {folder} is no checkpoint folder (it has no {MANIFEST})")
    try:
        verify_resumable(folder)
    except DamagedCheckpoint as error:
        newest, _ = newest_whole(folder.parent)
        way_on = f"the newest whole checkpoint is {newest}" if newest else "no other checkpoint beside it is whole"
        raise DamagedCheckpoint(f"resume_from_checkpoint: {error}; {way_on}") from error
    later = [path.name for path in checkpoints(folder.parent) if _step(path) > _step(folder)]
    if later and folder.parent.resolve() == Path(output_dir).resolve():
        warnings.warn(
            f"resuming from {folder}: {', '.join(later)} of later steps stay until this run writes them again, and "
            "until then 'latest' means the newest of them that is whole: remove them if this run shall differ",
            stacklevel=2,
        )
    return folder


def newest_whole(output_dir: str | Path) -> tuple[Path | None, list[str]]:
    """Returns the newest checkpoint that can be resumed, or None, and what is wrong with each newer one."""
    damaged = []
    for folder in reversed(checkpoints(output_dir)):
        try:
            verify_resumable(folder)
        except DamagedCheckpoint as error:
            damaged.append(str(error))
        else:
            return folder, damaged
    return None, damaged


def where_to_go_on(output_dir: str | Path) -> str:
    """Returns half a sentence for an error message: which checkpoint of the run can be resumed."""
    newest, _ = newest_whole(output_dir)
    return "there is no checkpoint to resume" if newest is None else f"{newest} is the last checkpoint"


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Returns the folders checkpoint-N, complete or not, sorted by step."""
    found = Path(output_dir).glob("checkpoint-*")
    return sorted((path for path in found if path.is_dir() and _NAME.fullmatch(path.name)), key=_step)


def rotate(output_dir: Path, limit: int | None, keep: Collection[Path]) -> None:
    """Delete the oldest checkpoints down to `limit`, never those in `keep`, the first of which was just written.

    Checkpoints of later steps are left over from before a resume, and are deleted first. One that cannot be deleted (a
    file of it is open elsewhere, on NFS) is warned of, and tried again after the next save.
    """
    if limit is None or limit <= 0:
        return
    newest, kept = _step(next(iter(keep))), {path.resolve() for path in keep}
    others = [path for path in checkpoints(output_dir) if path.resolve() not in kept]
    surplus = max(len(others) + len(kept) - limit, 0)
    for path in sorted(others, key=lambda path: (_step(path) < newest, _step(path)))[:surplus]:
        # Killed in between, it leaves no checkpoint-N with half of its files.
        doomed = _aside(path, "deleted")
        try:
            os.rename(path, doomed)
        except OSError as error:
            warnings.warn(
                f"{path}: cannot be deleted ({error.strerror or error}), so more than save_total_limit={limit} "
                "checkpoints are left until it can",
                stacklevel=2,
            )
        else:
            shutil.rmtree(doomed, ignore_errors=True)


def _lists_files(files: Any) -> bool:
    """Whether each file of a manifest lies in its folder, and has its size and checksum."""
    return isinstance(files, dict) and all(
        isinstance(entry, dict)
        and isinstance(entry.get("bytes"), int)
        and isinstance(entry.get("sha256"), str)
        and Path(name).as_posix() == name
        and not Path(name).is_absolute()
        and ".." not in Path(name).parts
        for name, entry in files.items()
    )


def _aside(folder: Path, why: str) -> Path:
    """Returns a name that is free: an earlier folder of that name may hold files that could not be removed."""
    names = (f"{_ASIDE}{why}-{folder.name}{f'-{number}' if number else ''}" for number in count())
    return next(path for path in map(folder.with_name, names) if not os.path.lexists(path))


def remove_leftovers(output_dir: str | Path) -> None:
    """Remove staging folders and half-deleted checkpoints of killed runs."""
    for path in Path(output_dir).glob(f"{_ASIDE}*checkpoint-*"):
        shutil.rmtree(path, ignore_errors=True)


def check_writable(output_dir: str | Path) -> None:
    """Check that a folder can be created and written to; leaves nothing behind.

    Raises:
        ValueError: with the reason.
    """
    path = Path(output_dir).absolute()
    try:
        existing = next(parent for parent in (path, *path.parents) if parent.exists())
        with tempfile.TemporaryFile(dir=existing) as probe:
            probe.write(bytes(4096))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        raise ValueError(f"output_dir: {path} cannot be written to: {error.strerror}") from error


def _check_state(folder: Path, step: int) -> None:
    """Check that the file is one of transformers' Trainer, of this step.

    Raises:
        DamagedCheckpoint: it is not.
    """
    try:
        state = json.loads((folder / STATE).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{folder}: its {STATE} cannot be read: {error}") from error
    known = {field.name for field in fields(TrainerState)}
    if not isinstance(state, dict) or not state.keys() <= known:
        found = sorted(state.keys() - known) if isinstance(state, dict) else type(state).__name__
        raise DamagedCheckpoint(f"{folder}: its {STATE} is not one of transformers' TrainerState: found {found}")
    logs, callbacks = state.get("log_history"), state.get("stateful_callbacks")
    if state.get("global_step") != step or not _all_objects(logs) or not isinstance(callbacks, dict):
        raise DamagedCheckpoint(
            f"{folder}: its {STATE} is not that of step {step}: expected this global_step, a log_history of objects "
            "and an object stateful_callbacks"
        )


def _all_objects(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, dict) for value in values)


def _serialized(manifest: dict[str, Any]) -> bytes:
    """Returns canonical JSON with a checksum over the rest, so that a manifest can be compared byte by byte."""
    checksum = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return json.dumps({**manifest, "checksum": checksum}, indent=1, sort_keys=True).encode()


def _digests(paths: list[Path]) -> list[str]:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing lets other threads run
        return list(pool.map(_digest, paths))


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _is_pickled_weights(name: str) -> bool:
    return name.endswith(".bin") and name.startswith(("pytorch_model", "adapter_model"))


def _step(folder: Path) -> int:
    name = _NAME.fullmatch(folder.name)
    return int(name[1]) if name else -1
