"""The parts "syncs" and "graphs" of bench.gpu: no device path waits for the GPU; CUDA graphs can capture the head."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import dpofast
from bench.gpu.lines import one_line
from bench.gpu.setting import Setting
from bench.head import problem as head
from bench.head.peers import OURS, dpofast_logprobs
from bench.head.problem import MODES, Problem
from dpofast.losses.functional import token_preference_loss

# Of the norm: the same kernels run, but cuBLAS may choose others.
REPLAY_TOLERANCE = 1e-3


def small_problem(setting: Setting) -> Problem:
    """The head's problem with an eighth of its targets and vocabulary, so that launches weigh as much as work."""
    n = setting.n // 8 // (2 * setting.pairs) * 2 * setting.pairs or 2 * setting.pairs
    return Problem.make(n, setting.d, setting.v // 8, setting.pairs, setting.dtype, setting.device)


def device_paths(problem: Problem) -> dict[str, Callable[[], Any]]:
    """Every public function, forward and backward, by name."""
    targets = problem.targets[:64]
    logits = torch.randn(len(targets), len(problem.weight), device=targets.device).to(problem.hidden.dtype)
    sequences = 2 * problem.pairs
    cu_targets = torch.arange(sequences + 1, dtype=torch.int32) * (len(problem.targets) // sequences)
    pairs = torch.arange(sequences, dtype=torch.int32).view(-1, 2)
    ref_logps = torch.zeros(sequences, device=problem.hidden.device)
    token_logps = torch.zeros(len(problem.targets), device=problem.hidden.device)

    def from_logits() -> Tensor:
        leaf = logits.detach().requires_grad_()
        (grad,) = torch.autograd.grad(dpofast.logprobs(leaf, targets).sum(), leaf)
        return grad

    def from_tokens() -> Tensor:
        leaf = token_logps.detach().requires_grad_()
        (grad,) = torch.autograd.grad(token_preference_loss(leaf, cu_targets, pairs, ref_logps).loss, leaf)
        return grad

    paths: dict[str, Callable[[], Any]] = {"logprobs": from_logits, "token_preference_loss": from_tokens}
    for name, make in OURS.items():
        for mode in MODES:
            paths[f"{name}, {mode}"] = functools.partial(head.run, make(problem), problem, mode)
    return paths


@contextlib.contextmanager
def no_sync(device: torch.device) -> Iterator[None]:
    """Every call that would wait for the GPU raises RuntimeError; on the CPU nothing changes."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def syncs(setting: Setting, left: Callable[[], float]) -> Iterator[tuple[str, Any]]:
    """Run each path once to compile it, then once more where waiting is an error.

    Raises:
        RuntimeError: at the end, a path waits.
    """
    wrong = []
    for name, path in device_paths(small_problem(setting)).items():
        reason = None
        try:
            path()
            with no_sync(setting.device):
                path()
        except Exception as error:
            reason = one_line(error)
            wrong.append(f"{name}: {reason}")
        yield name, reason
    if wrong:
        raise RuntimeError("; ".join(wrong))


def syncs_table(pieces: dict[str, Any]) -> str:
    """One line a path."""
    return "\n".join(["host syncs", *(f"  {name:34} {reason or 'none'}" for name, reason in pieces.items())])


def wall(function: Callable[[], Any], device: torch.device, calls: int) -> float:
    """Seconds of one call as the host sees it, its launches included."""
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / calls


def graphs(setting: Setting, left: Callable[[], float]) -> Iterator[tuple[str, Any]]:
    """Capture dpofast.linear_logprobs, forward and with a frozen head; replay on other inputs and compare.

    On the CPU the same calls run twice without a capture.
    """
    problem = small_problem(setting)
    run = dpofast_logprobs(problem)
    other = problem.hidden.flip(0) * 0.5
    for mode in ("forward", "frozen"):
        inputs = problem.hidden.clone()
        static = Problem(hidden=inputs, weight=problem.weight, targets=problem.targets, pairs=problem.pairs)

        def eager(static: Problem = static, mode: str = mode) -> list[Tensor]:
            logps, grads = head.run(run, static, mode)
            return [logps, *grads]

        replay, outputs = _captured(eager, setting.device)
        inputs.copy_(other)
        replay()
        got = [output.clone() for output in outputs()]
        for value, expected in zip(got, eager(), strict=True):
            off = float((value.float() - expected.float()).norm() / expected.float().norm())
            if not off <= REPLAY_TOLERANCE:
                raise ValueError(f"{mode}: what a graph replays on other inputs is off by {off:.1e} of its norm")
        yield mode, {"eager": wall(eager, setting.device, 20), "graph": wall(replay, setting.device, 20)}


def _captured(function: Callable[[], list[Tensor]], device: torch.device) -> tuple[Callable[[], Any], Callable]:
    """Replay the function, and what it wrote last. PyTorch asks for warm-up runs on another stream."""
    if device.type != "cuda":
        results: list[list[Tensor]] = []
        return lambda: results.append(function()), lambda: results[-1]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function()
    return graph.replay, lambda: outputs


def graphs_table(pieces: dict[str, Any]) -> str:
    """Milliseconds as the host sees them."""
    lines = [f"{'CUDA graph of linear_logprobs':36}{'eager ms':>10}{'graph ms':>10}"]
    for mode, seconds in pieces.items():
        lines.append(f"{mode:36}{1e3 * seconds['eager']:10.3f}{1e3 * seconds['graph']:10.3f}")
    return "\n".join(lines)
