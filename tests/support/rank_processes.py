"""Starts processes as the ranks of a process group, with the environment that torchrun would set."""

import gc
import multiprocessing
import os
import socket

import torch

# Imported once, by the server that the ranks are forked from, instead of in every rank: 6 s of a core each.
PRELOADED = [
    "tests.support.activation_cases",
    "tests.support.command_cases",
    "tests.support.distributed_cases",
    "tests.support.qlora_cases",
    "tests.support.ranks_cases",
    "tests.support.resume_cases",
    "tests.support.sequence_cases",
    "tests.support.sequence_parallel_cases",
    "tests.support.sharded_cases",
    "tests.support.tensor_cases",
    "tests.support.trl_cases",
    "tests.support.vocab_pair_cases",
]


def rank_context():
    """The multiprocessing context to start ranks with: each is forked from a server that has imported PRELOADED.

    The server starts with the first rank and runs nothing else, so a rank starts like a fresh process.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def run_ranks(function, arguments, world):
    """Run function(rank, *arguments) in `world` processes and wait. Raises the exception of the first that fails."""
    rank_context()
    torch.multiprocessing.start_processes(function, arguments, nprocs=world, start_method="forkserver")


def free_port():
    """Return a free local port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def become_rank(rank, world, port):
    """Make this process one rank, with one thread; otherwise accelerate lets each rank use all cores."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in ranks.items()}, OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    gc.freeze()  # as in conftest.py
