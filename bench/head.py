"""The head alone, hidden states to log-probs to gradients: dpofast, plain PyTorch and the public peers.

    pip install -e '.[bench]' && pip install --no-deps liger-kernel==0.8.5 cut-cross-entropy==25.1.1
    python -m bench.head --n 512 --d 576 --v 49152

Every contender gets the same tensors and computes DPO's loss over the same pairs, without a reference: from per-token
log-probs where it gives them, by its own loss where it is one. Modes: `trained` (gradients to hidden states and head),
`frozen` (to hidden states only) and `forward` (none).

Contenders alternate in one process, after a first run that is not timed: it warms up, compiles, counts GEMMs and bytes
and is checked against the plain code in float32: `off by` is the largest difference of a log-prob, in nats. `x floor`
is the least time of a contender over the least time of the mode's bare products in the same rounds: torch.mm of h·Wᵀ,
of E·W, of Eᵀ·h. Bytes are the peak beyond inputs and returned gradients, counted (bench/cost.py) and, beside that,
seen: resident memory on a CPU, the allocator's on a GPU. The plain code needs about five float32 tensors of (N, V).
"""

import argparse
import functools
import gc
import math
import os
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import dpofast
from bench.cases import RESULTS, SEED
from bench.cost import Cost
from bench.timing import PeakMemory, interleave, spread, write_record

BETA = 0.1
LOGPS_TOLERANCE = 1e-3
# Of a gradient's norm; a 16-bit gradient is allowed its dtype's epsilon where that is more.
GRAD_TOLERANCE = 1e-3
# Rows of a chunk, of those that let us choose: enough for a GEMM's full speed.
CHUNK_ROWS = 512
# A contender this many times slower than the fastest is timed once.
HOPELESS = 6.0
BUSY_LOAD = 1.0
FLOOR = "floor"
MODES = {"trained": ("hidden", "weight"), "frozen": ("hidden",), "forward": ()}
PACKAGES = ("torch", "triton", "trl", "liger-kernel", "cut-cross-entropy", "dpofast")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One call of the head: hidden (N, D), weight (V, D), targets (N,) int64, of as many pairs as `pairs` says.

    Chosen and rejected sequences alternate, and all have one length, so that a padded peer pads nothing.
    """

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    pairs: int

    @staticmethod
    def make(n: int, d: int, v: int, pairs: int, dtype: torch.dtype, device: torch.device) -> "Problem":
        """Random tensors whose logits have a standard deviation of 2."""
        random: dict[str, Any] = {"generator": torch.Generator(device).manual_seed(SEED), "device": device}
        hidden = torch.randn(n, d, **random).to(dtype)
        weight = torch.randn(v, d, **random).mul_(2 / d**0.5).to(dtype)
        targets = torch.randint(0, v, (n,), **random)
        return Problem(hidden=hidden, weight=weight, targets=targets, pairs=pairs)

    def loss(self, logps: Tensor) -> Tensor:
        """DPO's loss of per-token log-probs (N,)."""
        chosen, rejected = logps.view(self.pairs, 2, -1).sum(2).unbind(1)
        return -F.logsigmoid(BETA * (chosen - rejected)).mean()


# hidden, weight -> log-probs, (N,) of tokens or (S,) of sequences, and the loss
Head = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def per_token(problem: Problem, logps: Callable[[Tensor, Tensor], Tensor]) -> Head:
    """A contender that ends at per-token log-probs."""

    def head(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        values = logps(hidden, weight)
        return values, problem.loss(values)

    return head


def plain_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """What everyone writes first."""
    logits = (hidden @ weight.t()).float()
    return logits.log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1)


def dpofast_logprobs(problem: Problem) -> Head:
    """dpofast.linear_logprobs: gradients of any function of the log-probs."""
    return per_token(problem, lambda h, w: dpofast.linear_logprobs(h, w, problem.targets).logps)


def dpofast_preference(problem: Problem) -> Head:
    """dpofast.linear_preference_loss: the pairs are known."""
    pairs = torch.arange(2 * problem.pairs, dtype=torch.int32).view(-1, 2)
    cu_targets = torch.arange(pairs.numel() + 1, dtype=torch.int32) * (len(problem.targets) // pairs.numel())
    no_reference = torch.zeros(pairs.numel(), device=problem.hidden.device)
    step = (problem.targets, cu_targets, pairs, no_reference)
    loss = dpofast.PreferenceLoss(beta=BETA)

    def head(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        output = dpofast.linear_preference_loss(hidden, weight, *step, loss=loss)
        return output.logps, output.loss

    return head


def naive(problem: Problem) -> Head:
    """All logits, their log-softmax, a gather."""
    return per_token(problem, lambda h, w: plain_logps(h, w, problem.targets))


def compiled_naive(problem: Problem) -> Head:
    """The same through torch.compile."""
    compiled = torch.compile(plain_logps, dynamic=False)
    return per_token(problem, lambda h, w: compiled(h, w, problem.targets))


def torch_chunked(problem: Problem) -> Head:
    """PyTorch's own linear_cross_entropy; its default chunks are of a few rows, and tens of times slower than these."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK_ROWS)

    def logps(hidden: Tensor, weight: Tensor) -> Tensor:
        return -F.linear_cross_entropy(hidden, weight, problem.targets, reduction="none", options=options)

    return per_token(problem, logps)


def trl_chunked(problem: Problem) -> Head:
    """What trl's trainer calls, with its chunk size, but without the statistics that it always asks for."""
    from trl.trainer import utils

    chunk, function = utils._CHUNKED_LOGPROB_CHUNK_SIZE, utils._ChunkedLogProbFunction
    return per_token(problem, lambda h, w: function.apply(h, w, None, problem.targets, 1.0, chunk, None, 1.0, ())[0])


def liger_dpo(problem: Problem) -> Head:
    """Liger's fused DPO loss without a reference model; its torch.compile, on by default, makes it slower on a CPU."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=False, compiled=problem.hidden.is_cuda)

    def chosen_first(x: Tensor) -> Tensor:
        """(N, ...) -> (sequences, length, ...): a copy, nothing beside the products."""
        return x.view(problem.pairs, 2, -1, *x.shape[1:]).transpose(0, 1).flatten(0, 1)

    targets = chosen_first(problem.targets)

    def head(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        value, (chosen, rejected, *_) = loss(weight, chosen_first(hidden), targets)
        return torch.stack((chosen, rejected), dim=1).flatten(), value

    return head


def apple_cce(problem: Problem) -> Head:
    """cut-cross-entropy: its Triton kernels on a GPU, its torch.compile variant elsewhere."""
    from cut_cross_entropy import linear_cross_entropy

    impl = "cce" if problem.hidden.is_cuda else "torch_compile"
    return per_token(problem, lambda h, w: -linear_cross_entropy(h, w, problem.targets, reduction="none", impl=impl))


OURS = {"dpofast": dpofast_logprobs, "dpofast pairs": dpofast_preference}
PEERS = {
    "naive": naive,
    "naive compiled": compiled_naive,
    "torch chunked": torch_chunked,
    "trl": trl_chunked,
    "liger": liger_dpo,
    "cce": apple_cce,
}
# Under the dispatch mode that counts, these would run other code than the code that is timed; on a GPU liger as well.
COMPILED = {"naive compiled", "cce"}


@dataclass
class Entry:
    """One contender in one mode.

    Attributes:
        errors: of logps and gradients, as Truth.errors gives them.
        wrong: what fails the gate, in words; empty where nothing does.
        gemm_units, counted_bytes: exact; None where compiled code runs.
        seen_bytes: by the system; None where it cannot tell.
        seconds: one value a round.
    """

    errors: dict[str, float | None]
    wrong: str
    gemm_units: float | None = None
    counted_bytes: int | None = None
    seen_bytes: int | None = None
    seconds: list[float] = field(default_factory=list)


def run(head: Head, problem: Problem, mode: str) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Forward and the mode's gradients: logps, gradients."""
    names = MODES[mode]
    hidden = problem.hidden.detach().requires_grad_("hidden" in names)
    weight = problem.weight.detach().requires_grad_("weight" in names)
    with torch.set_grad_enabled(bool(names)):
        logps, loss = head(hidden, weight)
    leaves = [leaf for leaf in (hidden, weight) if leaf.requires_grad]
    return logps.detach(), torch.autograd.grad(loss, leaves) if leaves else ()


def timed(function: Callable[[], Any], device: torch.device, calls: int = 1) -> float:
    """Seconds of one call, the mean of `calls` in a row; on a GPU its own time, by events.

    A GPU first spins, about 0.1 ms a call and 1 ms at least, so that the launches are queued before their turn comes:
    in training, too, the host runs ahead.
    """
    if device.type == "cuda":
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(200_000 * max(calls, 10))
        start.record()
        for _ in range(calls):
            function()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1000 / calls
    begin = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - begin) / calls


def seen(function: Callable[[], Any], device: torch.device) -> tuple[Any, int | None]:
    """The function's result, and the peak increase of memory while it ran; None where the system cannot tell."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = function()
        torch.cuda.synchronize()
        return result, torch.cuda.max_memory_allocated() - before
    try:
        memory = PeakMemory()
    except RuntimeError:
        return function(), None
    return function(), memory.increase()


@dataclass(frozen=True)
class Truth:
    """Log-probs (N,), dh (N, D) and dW (V, D) of the plain code in float32.

    own: log-probs from the product of the 16-bit tensors with a float32 result, where the device has it (CUDA). Tensor
    cores may cut a sum to float32 at every few terms, always towards zero; what that costs is no contender's fault.
    """

    logps: Tensor
    grads: tuple[Tensor, ...]
    own: Tensor | None = None

    @staticmethod
    def of(problem: Problem) -> "Truth":
        """Upcast what is 16-bit and run the plain code."""
        wide = Problem(
            hidden=problem.hidden.float(),
            weight=problem.weight.float(),
            targets=problem.targets,
            pairs=problem.pairs,
        )
        own = None
        if problem.hidden.is_cuda and problem.hidden.dtype != torch.float32:
            logits = torch.mm(problem.hidden, problem.weight.t(), out_dtype=torch.float32)
            own = logits.log_softmax(-1).gather(1, problem.targets.unsqueeze(1)).squeeze(1)
            del logits
        return Truth(*run(naive(wide), wide, "trained"), own)

    def difference(self, logps: Tensor) -> float:
        """The largest of log-probs (N,) of tokens or (S,) of sequences."""
        expected = self.logps.double()
        if len(logps) < len(expected):
            expected = expected.view(len(logps), -1).sum(1)
        return float((logps.double() - expected).abs().max())

    def limit(self, count: int) -> float:
        """The largest difference that `count` log-probs may have: twice that of `own` beyond LOGPS_TOLERANCE."""
        if self.own is None:
            return LOGPS_TOLERANCE
        return LOGPS_TOLERANCE + 2 * self.difference(self.own.double().view(count, -1).sum(1))

    def errors(self, logps: Tensor, grads: tuple[Tensor, ...]) -> dict[str, float | None]:
        """Largest difference of logps; the norm of each gradient's difference over its norm; None: no finite number."""
        found = {"logps": self.difference(logps)}
        for name, grad, true in zip(("dh", "dW"), grads, self.grads, strict=False):
            found[name] = float((grad.float() - true).norm() / true.norm())
        return {name: error if math.isfinite(error) else None for name, error in found.items()}


def gate(errors: dict[str, float | None], dtype: torch.dtype, logps_limit: float = LOGPS_TOLERANCE) -> str:
    """Which errors are too large."""
    limits = dict.fromkeys(("dh", "dW"), max(GRAD_TOLERANCE, torch.finfo(dtype).eps)) | {"logps": logps_limit}
    wrong = []
    for name, error in errors.items():
        if error is None:
            wrong.append(f"{name} not finite")
        elif error > limits[name]:
            wrong.append(f"{name} off by {error:.1e}")
    return ", ".join(wrong)


def first_run(name: str, head: Head, problem: Problem, truth: Truth, mode: str) -> Entry:
    """Warm up, check, and count."""
    device = problem.hidden.device

    def attempt() -> tuple[Tensor, tuple[Tensor, ...]]:
        return run(head, problem, mode)

    cost = None
    if name in COMPILED or (name == "liger" and device.type == "cuda"):
        attempt()
        (logps, grads), peak = seen(attempt, device)
    else:
        with Cost() as cost:
            (logps, grads), peak = seen(attempt, device)
    errors = truth.errors(logps, grads)
    entry = Entry(errors, gate(errors, problem.hidden.dtype, truth.limit(len(logps))))
    returned = sum(grad.untyped_storage().nbytes() for grad in grads)
    entry.seen_bytes = None if peak is None else max(0, peak - returned)
    if cost is not None:
        entry.gemm_units = cost.gemm_units(*problem.hidden.shape, len(problem.weight))
        entry.counted_bytes = cost.peak_bytes_beyond(*grads)
    return entry


class Floor:
    """The mode's bare products, each torch.mm into a buffer that is warm."""

    def __init__(self, problem: Problem) -> None:
        """Allocate and touch the (N, V) and the two result buffers."""
        self.hidden, self.weight = problem.hidden, problem.weight
        self.e = torch.zeros(len(self.hidden), len(self.weight), dtype=self.hidden.dtype, device=self.hidden.device)
        self.dh, self.dw = torch.zeros_like(self.hidden), torch.zeros_like(self.weight)

    def __call__(self, mode: str) -> None:
        """One product for the log-probs, one more for each gradient."""
        torch.mm(self.hidden, self.weight.t(), out=self.e)
        if "hidden" in MODES[mode]:
            torch.mm(self.e, self.weight, out=self.dh)
        if "weight" in MODES[mode]:
            torch.mm(self.e.t(), self.hidden, out=self.dw)


def compare(problem: Problem, heads: dict[str, Head], truth: Truth, mode: str, rounds: int) -> dict[str, Any]:
    """Figures of every contender in one mode, and of the floor.

    Raises:
        ValueError: dpofast itself is wrong.
    """
    device = problem.hidden.device
    entries: dict[str, Entry] = {}
    failed: dict[str, str] = {}
    for name, head in heads.items():
        print(f"{mode}: {name}", flush=True)
        try:
            entries[name] = first_run(name, head, problem, truth, mode)
        except Exception as error:  # a peer may raise anything; it is shown with what it said
            if name in OURS:
                raise
            failed[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        else:
            if name in OURS and entries[name].wrong:
                raise ValueError(f"{name}, {mode}: {entries[name].wrong}; nothing is recorded")
    floor = Floor(problem)
    floor(mode)
    times: list[float] = []
    # What exists by now is no garbage: collecting before each run then takes no time.
    gc.collect()
    gc.freeze()
    for name in interleave([FLOOR, *entries], rounds):
        gc.collect()
        if name == FLOOR:
            times.append(timed(lambda: floor(mode), device))
            continue
        best = min((min(entry.seconds) for entry in entries.values() if entry.seconds), default=float("inf"))
        seconds = entries[name].seconds
        if not seconds or min(seconds) < HOPELESS * best:
            seconds.append(timed(functools.partial(run, heads[name], problem, mode), device))
    least = min(times)
    figures = {name: {**vars(entry), "floors": min(entry.seconds) / least} for name, entry in entries.items()}
    return {"floor_s": times, "contenders": figures, "failed": failed}


def table(mode: str, result: dict[str, Any]) -> str:
    """One mode's figures as text."""

    def mib(count: int | None) -> str:
        return "-" if count is None else f"{count / 2**20:.0f}"

    floor = spread(result["floor_s"])
    lines = [
        f"{mode:18}{'x floor':>9}{'least s':>9}{'median':>9}{'p20':>9}{'p80':>9}{'GEMMs':>8}{'MiB':>8}{'seen MiB':>10}"
        f"{'off by':>9}",
        f"{FLOOR:18}{1:9.2f}{min(result['floor_s']):9.4f}{floor['median']:9.4f}{floor['p20']:9.4f}{floor['p80']:9.4f}"
        f"{1 + len(MODES[mode]):8.2f}",
    ]
    for name, row in result["contenders"].items():
        step = spread(row["seconds"])
        units = "-" if row["gemm_units"] is None else f"{row['gemm_units']:.2f}"
        off = "-" if row["errors"]["logps"] is None else f"{row['errors']['logps']:.0e}"
        lines.append(
            f"{name:18}{row['floors']:9.2f}{min(row['seconds']):9.4f}{step['median']:9.4f}{step['p20']:9.4f}"
            f"{step['p80']:9.4f}{units:>8}{mib(row['counted_bytes']):>8}{mib(row['seen_bytes']):>10}{off:>9}"
            + (f"  WRONG: {row['wrong']}" if row["wrong"] else "")
        )
    return "\n".join(lines + [f"{name:18} did not run: {reason}" for name, reason in result["failed"].items()])


def build(problem: Problem, names: list[str]) -> tuple[dict[str, Head], dict[str, str]]:
    """The contenders, and those that are not installed here, with the reason."""
    heads, absent = {}, {}
    for name in names:
        try:
            heads[name] = (OURS | PEERS)[name](problem)
        except (ImportError, AttributeError) as error:
            if name in OURS:
                raise
            absent[name] = str(error)
    return heads, absent


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Time and memory of the head, against PyTorch and the public peers.")
    parser.add_argument("--n", type=int, default=2048, help="targets")
    parser.add_argument("--d", type=int, default=1024, help="hidden size")
    parser.add_argument("--v", type=int, default=151936, help="vocabulary")
    parser.add_argument("--pairs", type=int, default=8, help="all sequences have the same length")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="auto", help="auto: the GPU where there is one")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of every contender")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS), help="compare with these only")
    parser.add_argument("--results", type=Path, default=RESULTS / "head.jsonl", help="file the record is appended to")
    args = parser.parse_args()
    if args.pairs < 1 or args.n < 1 or args.n % (2 * args.pairs) or args.rounds < 1:
        parser.error(
            f"expected --pairs and --rounds of at least 1 and --n a multiple of twice the pairs, "
            f"got {args.pairs}, {args.rounds} and {args.n}"
        )
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


def main() -> int:
    """Command line entry; 0 when recorded, 1 when dpofast is wrong."""
    args = parse()
    device = torch.device(args.device)
    load = os.getloadavg()[0]
    if load > BUSY_LOAD:
        print(f"warning: the machine is busy (load {load:.1f}), so times mean little", file=sys.stderr, flush=True)
    problem = Problem.make(args.n, args.d, args.v, args.pairs, getattr(torch, args.dtype), device)
    heads, absent = build(problem, [*OURS, *args.peers])
    truth = Truth.of(problem)
    try:
        results = {mode: compare(problem, heads, truth, mode, args.rounds) for mode in args.modes}
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    figures = {
        "shape": {"n": args.n, "d": args.d, "v": args.v, "pairs": args.pairs},
        "dtype": args.dtype,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "rounds": args.rounds,
        "load_at_start": load,
        "absent": absent,
        "modes": results,
    }
    command = shlex.join(["python", "-m", "bench.head", *sys.argv[1:]])
    write_record(args.results, "head", figures, command=command, packages=PACKAGES)
    print(f"\nN {args.n}, D {args.d}, V {args.v}, {args.dtype}, {figures['device']}; recorded in {args.results}")
    for name, reason in absent.items():
        print(f"{name} is not installed and left out: {reason}")
    for mode, result in results.items():
        print("\n" + table(mode, result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
