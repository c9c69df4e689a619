"""`dpofast` commands on several processes, as torchrun would start them."""

import contextlib
import io
import os
import signal

import torch

from dpofast.cli.main import main
from dpofast.scoring.score_file import PartialScores
from tests.support.rank_processes import become_rank, free_port, run_ranks


def command_main(rank, ports, folder, world, commands, killed):
    """Run commands, one after another, and write each one's code and output. The first process may be killed."""
    if killed and rank == 0:
        append, calls = PartialScores.append, []

        def deadly(self, scores):
            append(self, scores)
            calls.append(self)
            if len(calls) == killed:
                os.kill(os.getpid(), signal.SIGKILL)

        PartialScores.append = deadly
    results = []
    for argv, port in zip(commands, ports, strict=True):
        become_rank(rank, world, port)
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main([str(flag) for flag in argv])
        results.append((code, out.getvalue(), err.getvalue()))
    torch.save(results, f"{folder}/command-{rank}.pt")


def on_processes(folder, *commands, world=2, killed=0):
    """Returns for each process (exit code, stdout, stderr) of each command."""
    ports = [free_port() for _ in commands]  # a store that is closing may still answer at the one before
    run_ranks(command_main, (ports, str(folder), world, commands, killed), world)
    return [torch.load(folder / f"command-{rank}.pt", weights_only=False) for rank in range(world)]
