"""Shapes and repetitions that the parts of bench.gpu share, chosen for the device, and interleaved timing of calls."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bench.timing import interleave, spread, timed

# The shapes of the goals need about 50 GiB, most of it for the plain code and the float32 truth.
LARGE_BYTES = 60 << 30


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Shapes and repetitions.

    Attributes:
        n, d, v, pairs: targets, hidden size, vocabulary and pairs of the head (bench.head).
        rows: rows of logits that a row kernel gets.
        ragged: a vocabulary that 16 does not divide.
        layers, prompt, response: the model of the training step, and the longest prompt and response of its pairs.
        peers: contenders of the head beside dpofast's own.
        rounds: timed samples of every contender.
    """

    device: torch.device
    dtype: torch.dtype
    n: int
    d: int
    v: int
    pairs: int
    rows: int
    ragged: int
    layers: int
    prompt: int
    response: int
    peers: tuple[str, ...]
    rounds: int

    @staticmethod
    def make(dry: bool) -> "Setting":
        """Llama 3's head on a GPU, with fewer targets where memory is short; a toy on the CPU for a dry run.

        Raises:
            RuntimeError: no dry run, and no CUDA device.
        """
        if dry:
            shapes = {"n": 24, "d": 32, "v": 96, "pairs": 3, "rows": 4, "ragged": 91}
            model = {"layers": 2, "prompt": 12, "response": 8}
            peers = ("naive", "torch chunked", "trl")
            return Setting(device=torch.device("cpu"), dtype=torch.float32, **shapes, **model, peers=peers, rounds=2)
        if not torch.cuda.is_available():
            raise RuntimeError("torch sees no CUDA device; python -m bench.gpu --dry tries the code on the CPU")
        device = torch.device("cuda", torch.cuda.current_device())
        large = torch.cuda.get_device_properties(device).total_memory >= LARGE_BYTES
        return Setting(
            device=device,
            dtype=torch.bfloat16,
            n=8192 if large else 2048,
            d=4096,
            v=128_256,
            pairs=16,
            rows=2048,
            ragged=50_257,
            layers=8,
            prompt=600,
            response=400,
            peers=("naive", "naive compiled", "torch chunked", "trl", "liger", "cce"),
            rounds=15,
        )


def measure(functions: dict[str, Callable[[], Any]], setting: Setting, calls: int = 1) -> dict[str, dict[str, float]]:
    """Seconds of one call: median, p20 and p80 over the setting's rounds, the functions taking turns.

    Each function runs twice before, untimed. Buffers of less than the L2 cache are found there: give large ones.
    """
    for function in itertools.chain(functions.values(), functions.values()):
        function()
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for name in interleave(list(functions), setting.rounds):
        samples[name].append(timed(functions[name], setting.device, calls))
    return {name: spread(values) for name, values in samples.items()}


def one_line(error: BaseException) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
