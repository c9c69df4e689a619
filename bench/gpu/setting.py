"""Shapes and repetitions that the parts of bench.gpu share, chosen for the device, and interleaved timing of calls."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bench.timing import Paired, launch_seconds, spread, timed

# The shapes of the goals need about 50 GiB, most of it for the plain code and the float32 truth.
LARGE_BYTES = 60 << 30


@dataclass(frozen=True)
class HeadShape:
    """Hidden size and vocabulary of a head."""

    d: int
    v: int


# Those of Llama 3.1 8B (the goals'), Llama 3.2 1B and Qwen2.5 0.5B.
HEADS = (HeadShape(4096, 128_256), HeadShape(2048, 128_256), HeadShape(896, 151_936))


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Shapes and repetitions.

    Attributes:
        n, pairs: targets and pairs of the head (bench.head).
        heads: its shapes, the most important first.
        rows: rows of logits that a row kernel gets.
        ragged: a vocabulary that 16 does not divide.
        layers, prompt, response: the model of the training step, and the longest prompt and response of its pairs.
        heads_q, heads_kv, width, groups: heads of attention and their width, and the pairs of a packed batch.
        peers, few_peers: contenders of the head beside dpofast's own, at the first shape and at the others.
        rounds: timed samples of every contender.
    """

    device: torch.device
    dtype: torch.dtype
    n: int
    pairs: int
    heads: tuple[HeadShape, ...]
    rows: int
    ragged: int
    layers: int
    prompt: int
    response: int
    heads_q: int
    heads_kv: int
    width: int
    groups: int
    peers: tuple[str, ...]
    few_peers: tuple[str, ...]
    rounds: int

    @property
    def d(self) -> int:
        """Hidden size of the first head."""
        return self.heads[0].d

    @property
    def v(self) -> int:
        """Vocabulary of the first head."""
        return self.heads[0].v

    @staticmethod
    def make(dry: bool) -> "Setting":
        """Llama 3's head on a GPU, with fewer targets where memory is short; a toy on the CPU for a dry run.

        Raises:
            RuntimeError: no dry run, and no CUDA device.
        """
        if dry:
            return Setting(
                device=torch.device("cpu"),
                dtype=torch.float32,
                n=24,
                pairs=3,
                heads=(HeadShape(32, 96), HeadShape(16, 91)),
                rows=4,
                ragged=91,
                layers=2,
                prompt=12,
                response=8,
                heads_q=4,
                heads_kv=2,
                width=16,
                groups=3,
                peers=("naive", "torch chunked", "trl"),
                few_peers=("naive",),
                rounds=2,
            )
        if not torch.cuda.is_available():
            raise RuntimeError("torch sees no CUDA device; python -m bench.gpu --dry tries the code on the CPU")
        device = torch.device("cuda", torch.cuda.current_device())
        large = torch.cuda.get_device_properties(device).total_memory >= LARGE_BYTES
        return Setting(
            device=device,
            dtype=torch.bfloat16,
            n=8192 if large else 2048,
            pairs=16,
            heads=HEADS,
            rows=2048,
            ragged=50_257,
            layers=8,
            prompt=600,
            response=400,
            heads_q=32,
            heads_kv=8,
            width=128,
            groups=20,
            peers=("naive", "naive compiled", "torch chunked", "trl", "liger", "cce"),
            few_peers=("naive", "torch chunked"),
            rounds=15,
        )


def measure(
    functions: dict[str, Callable[[], Any]],
    setting: Setting,
    baseline: str,
    calls: int = 1,
) -> dict[str, dict[str, Any]]:
    """Seconds of one call: median, p20 and p80 over the setting's rounds, the functions taking turns.

    `ratio` is the same of a call's time over the baseline's, which is measured right before it. Each function runs
    three times before, untimed. Buffers of less than the L2 cache are found there: give large ones.

    Args:
        functions: what is measured, by name.
        setting: device and rounds.
        baseline: the name of one of them.
        calls: a sample is the mean of so many calls in a row.
    """
    for function in itertools.chain(functions.values(), functions.values()):
        function()
    ahead = {name: launch_seconds(function, setting.device, calls) for name, function in functions.items()}
    paired = {name: Paired() for name in functions}
    for _ in range(setting.rounds):
        for name, function in functions.items():
            base = timed(functions[baseline], setting.device, calls, ahead[baseline])
            own = base if name == baseline else timed(function, setting.device, calls, ahead[name])
            paired[name].add(base, own)
    return {name: {**spread(pairs.seconds), "ratio": pairs.ratio()} for name, pairs in paired.items()}
