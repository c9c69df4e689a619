"""Resuming on the processes that wrote a checkpoint, or on another number: sums since the last log, random states.

Every process writes its sums to a file of its own, and reads them again where the processes are as many. On another
number the sums are added up, those of processes that share their data once, and the first rank continues with the
total: the next log is over the same pairs. Random states begin anew there, on every rank.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import set_seed

from dpofast.common.ranks import Ranks


class Written(NamedTuple):
    """How many processes wrote a checkpoint.

    Attributes:
        processes: all of them.
        data_ranks: how many shares of the data they had; consecutive processes share.
    """

    processes: int
    data_ranks: int

    @classmethod
    def by(cls, manifest: dict[str, Any]) -> Written:
        """Read it from a checkpoint's manifest."""
        return cls(manifest["world_size"], manifest.get("data_ranks", manifest["world_size"]))

    def equals(self, ranks: Ranks) -> bool:
        """Whether these processes are as many, and share data alike."""
        return self == (ranks.processes, ranks.size)


class Resumed(NamedTuple):
    """A checkpoint that is to be resumed.

    Attributes:
        folder: of the checkpoint.
        written: by how many processes.
        same_length: the run has the length that it had then.
    """

    folder: str
    written: Written
    same_length: bool


class Progress(NamedTuple):
    """What a process continues with.

    Attributes:
        tr_loss: 0-d, the sum of losses since the last log, averaged over ranks when they log.
        last_logged: step of the last log.
        stopped: a callback ended the run at this checkpoint.
        subclass: what merges into a subclass's state.
    """

    tr_loss: torch.Tensor
    last_logged: int
    stopped: bool
    subclass: dict[str, Any]


def progress_file(folder: str | Path, process: int, processes: int) -> Path:
    """Returns the path of a process's file."""
    return Path(folder, f"progress{f'_{process}' if processes > 1 else ''}.pt")


def read_progress(
    folder: str | Path,
    written: Written,
    ranks: Ranks,
    device: torch.device | str,
    merged: Callable[[list[dict[str, Any]], bool], dict[str, Any]],
) -> Progress:
    """Read this process's file, or merge all of them where the number of processes is another.

    Args:
        folder: the checkpoint.
        written: by how many.
        ranks: these processes, as their data is shared.
        device: where tensors are read to.
        merged: makes one state of all ranks' subclass states, for the first rank (True) or another one.
    """

    def read(process: int) -> Progress:
        path = progress_file(folder, process, written.processes)
        found = torch.load(path, map_location=device, weights_only=True)
        return Progress(**{name: found[name] for name in Progress._fields})

    if written.equals(ranks):
        return read(ranks.process)
    theirs = [read(first) for first in range(0, written.processes, written.processes // written.data_ranks)]
    return Progress(
        tr_loss=torch.stack([each.tr_loss for each in theirs]).mean(),
        last_logged=theirs[0].last_logged,
        stopped=theirs[0].stopped,
        subclass=merged([each.subclass for each in theirs], ranks.rank == 0),
    )


def seed_anew(seed: int, step: int, rank: int) -> None:
    """Seed this process's random states for a rank that continues at a step without a state of its own."""
    text = f"{seed} {step} {rank}".encode()
    set_seed(int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "big"))


def check_other_ranks(written: Written, ranks: Ranks, folder: Path, *, is_zero: bool) -> None:
    """Warn that a checkpoint is resumed on another number of processes.

    Raises:
        ValueError: DeepSpeed's ZeRO, whose shards can be read by as many processes only.
    """
    if is_zero:
        raise ValueError(
            f"resume_from_checkpoint: {folder} was written by {written.processes} processes under DeepSpeed, each with "
            f"its own part of the optimizer's state, and these are {ranks.processes}: start as many as then"
        )
    sharing = "" if written.processes != ranks.processes else ", which divide the data otherwise"
    warnings.warn(
        f"resuming {folder}, written by {written.processes} processes, on {ranks.processes}{sharing}: losses are the "
        "same but for the rounding of sums, and random states (of dropout) begin anew",
        stacklevel=2,
    )
