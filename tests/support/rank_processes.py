"""Ranks that a test starts by itself: what torchrun would set for each."""

import os
import socket

import torch


def free_port():
    """A port of this machine that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def become_rank(rank, world, port):
    """Make this process one rank of several, of one thread: else accelerate lets each use all cores."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in ranks.items()}, OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
