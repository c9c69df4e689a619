"""The parts "rows", "linear" and "sigmoid" of bench.gpu: kernels against copy bandwidth and torch.mm, tile sweeps.

Bandwidth is computed from the bytes that a kernel moves, as its docstring counts them, and compared with that of a copy
that reads and writes 1 GiB right before it.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.cases import SEED
from bench.gpu.lines import one_line
from bench.gpu.setting import Setting, measure
from bench.head.problem import Problem
from dpofast.kernels import exp_gemm, exp_rows, linear_tiles, preference, row_parts, tiles, token_logprobs
from dpofast.kernels.row_parts import TokenLogprobs
from dpofast.losses.config import PreferenceLoss
from dpofast.losses.functional import token_preference_loss

COPY = "copy"
# What training in bfloat16 runs, and what a gradient of given logits runs: their tiles are swept.
EXP_ROWS, GRADIENT = "exp_rows, E", "gradient of 16 bits"
SWEPT = (EXP_ROWS, GRADIENT)
# Seconds that must be left to try another tile.
LEAST_S = 8
NO_TIME = "no time left"
GOAL_OF_COPY = 0.90
# Columns a step and warps; the table in tiles.py has one entry for all vocabularies of more than 256.
ROW_TILES = ((1024, 4), (1024, 8), (2048, 4), (2048, 8), (2048, 16), (4096, 8), (4096, 16), (8192, 16))
# Rows, columns, depth, warps, stages.
LINEAR_TILES = (
    (128, 256, 64, 8, 3),
    (128, 256, 64, 8, 4),
    (256, 128, 64, 8, 3),
    (256, 128, 64, 8, 4),
    (128, 256, 128, 8, 2),
    (256, 128, 128, 8, 2),
    (128, 128, 64, 8, 4),
    (128, 128, 64, 4, 4),
    (128, 128, 128, 8, 3),
    (64, 256, 64, 4, 4),
)
SPLITS = (1, 2, 4, 6, 8, 12, 16, 33)
DRY_LINEAR_TILES = ((16, 32, 16, 4, 2),)
# Nats, and the norm of E's and the gradient's difference over its norm.
LOGPS_TOLERANCE, ROW_TOLERANCE = 1e-3, 2.0**-7


def _rows(setting: Setting, v: int) -> tuple[Tensor, Tensor]:
    """Logits (rows, v) in float32 of a standard deviation of 2, and targets (rows,)."""
    random: dict[str, Any] = {
        "generator": torch.Generator(setting.device).manual_seed(SEED),
        "device": setting.device,
    }
    return torch.randn(setting.rows, v, **random).mul_(2), torch.randint(0, v, (setting.rows,), **random)


def _check_rows(name: str, logits: Tensor, targets: Tensor, sums: TokenLogprobs, exp: Tensor) -> None:
    """Compare log-probs and E / S, which no choice of the shift changes, with float64 on the first 32 rows.

    Raises:
        ValueError: they are off.
    """
    x, y = logits[:32].double(), targets[:32]
    exact = x.log_softmax(1)
    expected = exact.exp()
    expected.scatter_add_(1, y[:, None], -torch.ones_like(expected[:, :1]))
    off = float((sums.logps[:32] - exact.gather(1, y[:, None]).squeeze(1)).abs().max())
    got = exp[:32].double() / sums.sum_exp[:32, None].double()
    norm = float((got - expected).norm() / expected.norm())
    if not (off <= LOGPS_TOLERANCE and norm <= ROW_TOLERANCE):
        raise ValueError(f"{name}: log-probs are off by {off:.1e} nats, E by {norm:.1e} of its norm")


def _calls(setting: Setting) -> int:
    """The number of consecutive calls per sample, which hide the launch overhead; 1 in the interpreter."""
    return 4 if setting.device.type == "cuda" else 1


def rows(setting: Setting, left: Callable[[], float]) -> Iterator[tuple[str, Any]]:
    """Row kernels against a copy at two vocabularies, then a sweep over the tiles of the two that training runs."""
    size = 1 << 30 if setting.device.type == "cuda" else 1 << 20
    source = torch.zeros(size, dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    copy = Case(2 * size, lambda: target.copy_(source))
    for v in (setting.v, setting.ragged):
        cases = {COPY: copy, **_row_cases(setting, v)}
        times = measure({name: case.run for name, case in cases.items()}, setting, COPY, _calls(setting))
        for name, case in cases.items():
            times[name]["bytes"] = case.bytes
        yield f"V {v}", {"rows": setting.rows, "v": v, "times": times}
        if v == setting.v:
            for name in SWEPT:
                yield f"tiles of {name}", {"v": v, "sweep": _sweep_rows(cases[name].run, setting, left)}


@dataclasses.dataclass(frozen=True)
class Case:
    """What is timed, and the bytes that it must move."""

    bytes: int
    run: Callable[[], Any]


def _row_cases(setting: Setting, v: int) -> dict[str, Case]:
    """The launches of the row kernels; the bytes are those of each kernel's docstring, of a row read as often as it is.

    Raises:
        ValueError: a kernel is wrong.
    """
    narrow = torch.bfloat16
    wide, targets = _rows(setting, v)
    half, exp, out = wide.to(narrow), torch.empty_like(wide, dtype=narrow), torch.empty_like(wide, dtype=narrow)
    for name, kernel in (("exp_rows", exp_rows.exp_rows), ("token_logprobs", token_logprobs.token_logprobs)):
        sums = kernel(wide, targets, exp_out=exp)
        _check_rows(f"{name}, V {v}", wide, targets, sums, exp)
    upstream, count = torch.ones_like(sums.logps), wide.numel()

    def gradient() -> None:
        token_logprobs.token_logprobs_grad(half, targets, sums.row_max, sums.sum_exp, upstream, out=out)

    return {
        EXP_ROWS: Case(6 * count, lambda: exp_rows.exp_rows(wide, targets, exp_out=exp)),
        "token_logprobs, E": Case(10 * count, lambda: token_logprobs.token_logprobs(wide, targets, exp_out=exp)),
        "token_logprobs": Case(4 * count, lambda: token_logprobs.token_logprobs(wide, targets)),
        "token_logprobs, statistics": Case(
            4 * count, lambda: token_logprobs.token_logprobs(wide, targets, stats=row_parts.STATS)
        ),
        "token_logprobs of 16 bits": Case(2 * count, lambda: token_logprobs.token_logprobs(half, targets)),
        GRADIENT: Case(4 * count, gradient),
    }


def _sweep_rows(function: Callable[[], Any], setting: Setting, left: Callable[[], float]) -> dict[str, Any]:
    """By tile: its time over that of the tile we choose, or why it did not run."""
    chosen = tiles.row_tile(setting.v)
    results: dict[str, Any] = {}
    for block_v, num_warps in ROW_TILES if setting.device.type == "cuda" else ROW_TILES[:1]:
        tile = dataclasses.replace(chosen, BLOCK_V=block_v, num_warps=num_warps)
        name = f"{block_v} x {num_warps} warps" + (" (ours)" if tile == chosen else "")

        def with_tile(tile: tiles.RowTile = tile) -> None:
            with mock.patch.object(row_parts, "row_tile", lambda *_, **__: tile):
                function()

        results[name] = _tried({"ours": function, "tile": with_tile}, setting, left, _calls(setting))
    return results


def _tried(
    functions: dict[str, Callable[[], Any]], setting: Setting, left: Callable[[], float], calls: int
) -> dict[str, float] | str:
    """The ratio of the second function's time to the first's, or why there is none."""
    if left() < LEAST_S:
        return NO_TIME
    baseline, candidate = functions
    try:
        return measure(functions, setting, baseline, calls)[candidate]["ratio"]
    except Exception as error:
        return _refusal(error)


def _refusal(error: Exception) -> str:
    """Why a tile is out: too many registers, too much shared memory, wrong numbers.

    Raises:
        Exception: the error itself, where it is the GPU's: nothing that runs after it in this process means anything.
    """
    if "CUDA" in str(error):
        raise error
    return one_line(error)


def rows_table(pieces: dict[str, Any]) -> str:
    """Time, bandwidth and share of the copy's; then the sweeps."""
    lines = []
    for name, figures in pieces.items():
        if "sweep" in figures:
            lines += [f"{name}, V {figures['v']}, time over that of our tile", *_ranked(figures["sweep"]), ""]
            continue
        title = f"row kernels, {figures['rows']} rows, V {figures['v']}"
        lines.append(f"{title:40}{'ms':>9}{'p20':>9}{'p80':>9}{'TB/s':>8}{'of copy':>9}{'p20':>8}{'p80':>8}")
        copied = figures["times"][COPY]["bytes"]
        for case, time in figures["times"].items():
            values = "".join(f"{1e3 * time[key]:9.4f}" for key in ("median", "p20", "p80"))
            # A longer time is a smaller share, so the percentiles change places.
            share = [time["bytes"] / copied / time["ratio"][key] for key in ("median", "p80", "p20")]
            rate = time["bytes"] / time["median"] / 1e12
            lines.append(f"{case:40}{values}{rate:8.3f}{share[0]:9.1%}{share[1]:8.1%}{share[2]:8.1%}")
        lines += [f"goal on an H100: {GOAL_OF_COPY:.0%} of the copy", ""]
    return "\n".join(lines[:-1])


def _ranked(sweep: dict[str, Any]) -> list[str]:
    """The candidates that ran, best first, with p20 and p80 of their ratio, then the others with the reason."""
    ran = sorted((ratio["median"], name, ratio) for name, ratio in sweep.items() if not isinstance(ratio, str))
    failed = [f"  {name:34} {reason}" for name, reason in sweep.items() if isinstance(reason, str)]
    return [
        *(f"  {name:34} {median:9.3f} {ratio['p20']:8.3f} {ratio['p80']:8.3f}" for median, name, ratio in ran),
        *failed,
    ]


def linear(setting: Setting, left: Callable[[], float]) -> Iterator[tuple[str, Any]]:
    """Tiles and splits against torch.mm of the same shape: with E at many rows, and without it at many and at few."""
    problem = Problem.make(setting.n, setting.d, setting.v, setting.pairs, setting.dtype, setting.device)
    architecture = linear_tiles.architecture_of(setting.device)
    bulk = linear_tiles.takes_descriptors(architecture, setting.dtype)
    cuda = setting.device.type == "cuda"
    brief, calls = dataclasses.replace(setting, rounds=5 if cuda else 1), 2 if cuda else 1
    few = min(128, setting.n // 2)
    for n, stores in ((setting.n, True), (setting.n, False), (few, False)):
        chosen = linear_tiles.linear_tile(
            architecture, setting.dtype, softcap=False, descriptors=bulk, stores=stores, even=True
        )
        candidates: dict[str, dict[str, Any]] = {"ours": {}}
        if bulk:
            candidates["ours, no descriptors"] = {"descriptors": False}
        for shape in LINEAR_TILES if cuda else DRY_LINEAR_TILES:
            tile = linear_tiles.LinearTile(*shape)
            candidates["x".join(map(str, shape)) + (" (ours)" if tile == chosen else "")] = {"tile": tile}
        candidates |= {f"{splits} splits": {"splits": splits} for splits in (SPLITS if cuda else SPLITS[1:2])}
        exp_out = torch.empty(n, setting.v, dtype=setting.dtype, device=setting.device) if stores else None
        hidden, targets = problem.hidden[:n], problem.targets[:n]
        product = torch.empty(n, setting.v, dtype=setting.dtype, device=setting.device)
        expected = exp_gemm.exp_gemm(hidden, problem.weight, targets).logps

        def floor(hidden: Tensor = hidden, product: Tensor = product) -> None:
            torch.mm(hidden, problem.weight.t(), out=product)

        def kernel(
            options: dict[str, Any], hidden: Tensor = hidden, targets: Tensor = targets, exp: Tensor | None = exp_out
        ) -> Tensor:
            return exp_gemm.exp_gemm(hidden, problem.weight, targets, exp_out=exp, **options).logps

        sweep = {}
        for name, options in candidates.items():
            function = functools.partial(kernel, options)
            sweep[name] = NO_TIME if left() < LEAST_S else _right(function, expected)
            sweep[name] = sweep[name] or _tried({"torch.mm": floor, "kernel": function}, brief, left, calls)
        yield (
            f"{n} rows{', E' if stores else ''}",
            {"n": n, "d": setting.d, "v": setting.v, "architecture": architecture, "sweep": sweep},
        )


def _right(function: Callable[[], Tensor], expected: Tensor) -> str:
    """Why a candidate is out before it is timed: it does not run, or its log-probs are off; empty: it is right."""
    try:
        off = float((function() - expected).abs().max())
    except Exception as error:
        return _refusal(error)
    return "" if off <= LOGPS_TOLERANCE else f"log-probs are off by {off:.1e} nats"


def linear_table(pieces: dict[str, Any]) -> str:
    """Times over torch.mm's, best first."""
    lines = []
    for name, figures in pieces.items():
        title = f"tl.dot kernel, {name}, D {figures['d']}, V {figures['v']}, tiles of {figures['architecture']}"
        lines += [f"{title}: time over torch.mm's", *_ranked(figures["sweep"]), ""]
    return "\n".join(lines[:-1])


def sigmoid(setting: Setting, left: Callable[[], float]) -> Iterator[tuple[str, Any]]:
    """From per-token log-probs to loss and coefficients: the one launch, and the public function, with backward."""
    for sequences in (2 * setting.pairs, setting.n // 8):
        generator = torch.Generator().manual_seed(SEED)
        logps = -torch.rand(setting.n, generator=generator).to(setting.device)
        cu_targets = (torch.arange(sequences + 1) * setting.n // sequences).int()
        pairs = torch.arange(sequences // 2 * 2, dtype=torch.int32).view(-1, 2)
        ref_logps = torch.zeros(sequences, device=setting.device)
        adjacency = preference.pair_adjacency(pairs, sequences).to(setting.device)
        bounds = cu_targets.to(setting.device)

        def launch(logps=logps, bounds=bounds, adjacency=adjacency, ref_logps=ref_logps) -> Any:
            return preference.preference_sigmoid(logps, bounds, adjacency, ref_logps, beta=0.1)

        def public(backend: str, logps=logps, cu_targets=cu_targets, pairs=pairs, ref_logps=ref_logps) -> float:
            leaf = logps.clone().requires_grad_()
            output = token_preference_loss(
                leaf, cu_targets, pairs, ref_logps, loss=PreferenceLoss(beta=0.1), backend=backend
            )
            output.loss.backward()
            return output.loss.detach()

        losses = [float(launch().pair_losses.mean()), float(public("auto")), float(public("torch"))]
        if max(losses) - min(losses) > 1e-5:
            raise ValueError(f"the losses of kernel, public function and torch differ: {losses}")
        functions = {
            "kernel": launch,
            "forward and backward": lambda public=public: public("auto"),
            "the same in torch": lambda public=public: public("torch"),
        }
        calls = 10 if setting.device.type == "cuda" else 1
        times = measure(functions, setting, "the same in torch", calls)
        yield f"{setting.n} targets, {sequences} sequences", times


def sigmoid_table(pieces: dict[str, Any]) -> str:
    """Microseconds; where a call takes longer to launch than to run, as forward with backward may, the launches'."""
    lines = [f"{'sigmoid loss':56}{'us':>9}{'p20':>9}{'p80':>9}"]
    for shape, times in pieces.items():
        for name, time in times.items():
            values = "".join(f"{1e6 * time[key]:9.1f}" for key in ("median", "p20", "p80"))
            lines.append(f"{name + ', ' + shape:56}{values}")
    return "\n".join(lines)
