"""Checks that a reference pass killed at any moment resumes and gives the same numbers. Run by test_ref_cache.py.

Runs in a separate process with one thread, so that it can fork: every run is a fork.
"""

import os
import random
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

import numpy as np
import torch

from dpofast import attach_logprob_head
from dpofast.data.formats import REF_COLUMNS
from dpofast.scoring.ref_cache import add_reference_columns
from dpofast.scoring.score import Forward
from tests.support.tiny import tiny_dataset, tiny_model

torch.set_num_threads(1)
DATA, MODEL, WINDOW, KILLS = tiny_dataset(26), attach_logprob_head(tiny_model()), 4, 20
FORWARD = Forward(max_tokens=64, device=torch.device("cpu"))


def run(folder: Path) -> None:
    result = add_reference_columns(DATA, MODEL, FORWARD, cache_dir=folder, window=WINDOW)
    np.save(folder / "result.npy", np.stack([result[name] for name in REF_COLUMNS]))


def fork(folder: Path, before=lambda: None) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            before()
            run(folder)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return pid


def finish(folder: Path) -> np.ndarray:
    """Run to the end without a kill and return the result."""
    assert os.waitpid(fork(folder), 0)[1] == 0
    return np.load(folder / "result.npy")


def shards(folder: Path) -> dict[str, int]:
    """Return the inode of every shard by name; a file that was rewritten has another inode."""
    return {path.name: path.stat().st_ino for path in folder.glob("*/*.safetensors")}


def check_after_kill(folder: Path, expected: np.ndarray) -> int:
    """Check that existing shards are complete and reused and that the rest is computed. Returns how many existed."""
    before = shards(folder)
    assert np.array_equal(finish(folder), expected)
    after = shards(folder)
    assert before.items() <= after.items(), "a whole shard was computed again"
    assert len(after) == -(-len(DATA) // WINDOW)
    return len(before)


def kill_in(name: str, call: int, after: bool):
    """Kill this process at its call-th call of os.<name>."""

    def patch() -> None:
        plain, count = getattr(os, name), 0

        def deadly(*args):
            nonlocal count
            count += 1
            if count == call and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = plain(*args)
            if count == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(os, name, deadly)

    return patch


def main(root: Path) -> None:
    warnings.simplefilter("error")  # a damaged file would be one
    (root / "whole").mkdir()
    started = time.perf_counter()
    expected = finish(root / "whole")
    seconds = time.perf_counter() - started
    draw = random.Random(0)
    found = []
    for kill in range(KILLS):
        folder = root / f"random-{kill}"
        folder.mkdir()
        pid = fork(folder)
        time.sleep(draw.uniform(0, 0.8 * seconds))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        found.append(check_after_kill(folder, expected))
    assert len(set(found)) > 2, f"the kills fell on too few moments: {found}"
    # The manifest takes the first two calls of fsync, file and folder, and the first of replace.
    for name in ("fsync", "replace"):
        for call in range(1, 6):
            for after in (False, True):
                folder = root / f"{name}-{call}-{after}"
                folder.mkdir()
                pid = fork(folder, kill_in(name, call, after))
                assert os.waitpid(pid, 0)[1] == signal.SIGKILL
                check_after_kill(folder, expected)
    # One run, killed in every window.
    folder = root / "often"
    folder.mkdir()
    for _ in range(len(DATA)):
        pid = fork(folder, kill_in("replace", 2, True))
        if os.waitpid(pid, 0)[1] == 0:
            break
    assert check_after_kill(folder, expected) == -(-len(DATA) // WINDOW)
    print(f"shards at the moments of the random kills: {found}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
