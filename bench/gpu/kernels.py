"""The parts "rows", "linear" and "sigmoid" of bench.gpu: kernels against copy bandwidth and torch.mm, tile sweeps.

Bandwidth is computed from the bytes that the task requires, each logit read once and each result written once,
independent of what the kernel does. It is compared with a copy that reads and writes 1 GiB in the same rounds.
"""

import dataclasses
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.cases import SEED
from bench.gpu.setting import Setting, measure, one_line
from bench.head.problem import Problem
from dpofast.kernels import exp_gemm, linear_tiles, preference, row_parts, tiles, token_logprobs
from dpofast.losses.config import PreferenceLoss
from dpofast.losses.functional import token_preference_loss

COPY = "copy"
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


def _check_rows(name: str, logits: Tensor, targets: Tensor, logps: Tensor, exp: Tensor) -> None:
    """Compare log-probs and E with float64 on the first 32 rows.

    Raises:
        ValueError: they are off.
    """
    x, y = logits[:32].double(), targets[:32]
    exact = x.log_softmax(1).gather(1, y[:, None]).squeeze(1)
    expected = (x - x.amax(1, keepdim=True)).exp()
    expected.scatter_add_(1, y[:, None], -expected.sum(1, keepdim=True))
    off = float((logps[:32] - exact).abs().max())
    norm = float((exp[:32].double() - expected).norm() / expected.norm())
    if not (off <= LOGPS_TOLERANCE and norm <= ROW_TOLERANCE):
        raise ValueError(f"{name}: log-probs are off by {off:.1e} nats, E by {norm:.1e} of its norm")


def _calls(setting: Setting) -> int:
    """The number of consecutive calls per sample, which hide the launch overhead; 1 in the interpreter."""
    return 4 if setting.device.type == "cuda" else 1


def rows(setting: Setting, figures: dict[str, Any], left: Callable[[], float]) -> None:
    """Row kernels against a copy, then a sweep over their tiles."""
    narrow = torch.bfloat16
    size = 1 << 30 if setting.device.type == "cuda" else 1 << 20
    source = torch.zeros(size, dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    functions: dict[str, Callable[[], Any]] = {COPY: lambda: target.copy_(source)}
    moved = {COPY: 2 * len(source)}

    def add(v: int, extra: bool) -> None:
        wide, targets = _rows(setting, v)
        half, exp, out = wide.to(narrow), torch.empty_like(wide, dtype=narrow), torch.empty_like(wide, dtype=narrow)
        sums = token_logprobs.token_logprobs(wide, targets, exp_out=exp)
        _check_rows(f"E of float32 logits, V {v}", wide, targets, sums.logps, exp)
        upstream = torch.ones_like(sums.logps)
        cases: dict[str, tuple[int, Callable[[], Any]]] = {
            "logps, E": (6, lambda: token_logprobs.token_logprobs(wide, targets, exp_out=exp)),
            "logps": (4, lambda: token_logprobs.token_logprobs(wide, targets)),
        }
        if extra:
            stats = row_parts.STATS
            cases |= {
                "logps of 16 bits": (2, lambda: token_logprobs.token_logprobs(half, targets)),
                "logps, statistics": (4, lambda: token_logprobs.token_logprobs(wide, targets, stats=stats)),
                "gradient of 16 bits": (
                    4,
                    lambda: token_logprobs.token_logprobs_grad(
                        half, targets, sums.row_max, sums.sum_exp, upstream, out=out
                    ),
                ),
            }
        for name, (width, function) in cases.items():
            functions[f"{name}, V {v}"] = function
            moved[f"{name}, V {v}"] = width * wide.numel()

    add(setting.v, extra=True)
    add(setting.ragged, extra=False)
    figures["rows"], figures["sweep"] = setting.rows, {}
    figures["times"] = measure(functions, setting, _calls(setting))
    figures["bytes"] = moved
    for name in (f"logps, E, V {setting.v}", f"gradient of 16 bits, V {setting.v}"):
        figures["sweep"][name] = _sweep_rows(functions[name], setting, left)


def _sweep_rows(function: Callable[[], Any], setting: Setting, left: Callable[[], float]) -> dict[str, Any]:
    """Median seconds by tile, or why a tile does not run."""
    chosen = tiles.row_tile(setting.v)
    results: dict[str, Any] = {}
    for block_v, num_warps in ROW_TILES if setting.device.type == "cuda" else ROW_TILES[:1]:
        if left() < 10:
            raise TimeoutError(f"no time left for tiles from BLOCK_V {block_v}, {num_warps} warps on")
        tile = dataclasses.replace(chosen, BLOCK_V=block_v, num_warps=num_warps)
        name = f"{block_v} x {num_warps} warps" + (" (ours)" if tile == chosen else "")
        with mock.patch.object(row_parts, "row_tile", lambda *_, tile=tile, **__: tile):
            try:
                results[name] = measure({name: function}, setting, _calls(setting))[name]["median"]
            except Exception as error:
                results[name] = _refusal(error)
    return results


def _refusal(error: Exception) -> str:
    """Why a tile is out: too many registers, too much shared memory, wrong numbers.

    Raises:
        Exception: the error itself, where it is the GPU's: nothing that runs after it in this process means anything.
    """
    if "CUDA" in str(error):
        raise error
    return one_line(error)


def rows_table(figures: dict[str, Any]) -> str:
    """Time, bandwidth and share of the copy's; then the sweep."""
    times, moved = figures["times"], figures["bytes"]
    rates = {name: moved[name] / times[name]["median"] for name in times}
    title = f"row kernels, {figures['rows']} rows"
    lines = [f"{title:36}{'ms':>9}{'p20':>9}{'p80':>9}{'TB/s':>8}{'of copy':>9}"]
    for name, time in times.items():
        values = "".join(f"{1e3 * time[key]:9.4f}" for key in ("median", "p20", "p80"))
        lines.append(f"{name:36}{values}{rates[name] / 1e12:8.3f}{rates[name] / rates[COPY]:9.1%}")
    lines.append(f"goal on an H100: {GOAL_OF_COPY:.0%} of the copy, bytes counted as each logit read once")
    for name, sweep in figures["sweep"].items():
        lines += ["", f"tiles of {name}, ms", *_ranked(sweep, lambda seconds: f"{1e3 * seconds:9.4f}")]
    return "\n".join(lines)


def _ranked(sweep: dict[str, Any], text: Callable[[float], str]) -> list[str]:
    """The candidates that ran, best first, then the others with the reason."""
    ran = sorted((value, name) for name, value in sweep.items() if not isinstance(value, str))
    failed = [f"  {name:34} {reason}" for name, reason in sweep.items() if isinstance(reason, str)]
    return [*(f"  {name:34} {text(value)}" for value, name in ran), *failed]


def linear(setting: Setting, figures: dict[str, Any], left: Callable[[], float]) -> None:
    """The tl.dot kernel's tiles and splits against torch.mm of the same shape, at many and at few rows."""
    problem = Problem.make(setting.n, setting.d, setting.v, setting.pairs, setting.dtype, setting.device)
    architecture = linear_tiles.architecture_of(problem.hidden)
    bulk = linear_tiles.takes_descriptors(architecture, setting.dtype)
    chosen = linear_tiles.linear_tile(
        architecture, setting.dtype, softcap=False, descriptors=bulk, stores=False, even=True
    )
    cuda = setting.device.type == "cuda"
    brief, calls = dataclasses.replace(setting, rounds=5 if cuda else 1), 2 if cuda else 1
    few = min(128, setting.n // 2)
    figures["sweep"] = {}
    for n in (setting.n, few):
        hidden, targets = problem.hidden[:n], problem.targets[:n]
        product = torch.empty(n, setting.v, dtype=setting.dtype, device=setting.device)
        floor = {"torch.mm": lambda h=hidden, out=product: torch.mm(h, problem.weight.t(), out=out)}
        expected = exp_gemm.exp_gemm(hidden, problem.weight, targets).logps

        def against_the_floor(options: dict[str, Any], hidden=hidden, targets=targets, floor=floor, expected=expected):
            def function() -> Tensor:
                return exp_gemm.exp_gemm(hidden, problem.weight, targets, **options).logps

            off = float((function() - expected).abs().max())
            if not off <= LOGPS_TOLERANCE:
                raise ValueError(f"another tile's log-probs are off by {off:.1e} nats")
            times = measure({**floor, "kernel": function}, brief, calls)
            return times["kernel"]["median"] / times["torch.mm"]["median"]

        candidates: dict[str, dict[str, Any]] = {"ours": {}}
        if bulk:
            candidates["ours, no descriptors"] = {"descriptors": False}
        for shape in LINEAR_TILES if cuda else DRY_LINEAR_TILES:
            tile = linear_tiles.LinearTile(*shape)
            candidates["x".join(map(str, shape))] = {"tile": tile}
        candidates |= {f"{splits} splits": {"splits": splits} for splits in (SPLITS if cuda else SPLITS[1:2])}
        sweep = figures["sweep"][f"{n} rows"] = {}
        for name, options in candidates.items():
            if left() < 10:
                raise TimeoutError(f"no time left at {n} rows from {name} on")
            label = name + (" (ours)" if options.get("tile") == chosen else "")
            try:
                sweep[label] = against_the_floor(options)
            except Exception as error:
                if name == "ours":
                    raise
                sweep[label] = _refusal(error)


def linear_table(figures: dict[str, Any]) -> str:
    """Times over torch.mm's, best first."""
    lines = []
    for name, sweep in figures["sweep"].items():
        lines += [f"tl.dot kernel, {name}, time over torch.mm's", *_ranked(sweep, lambda ratio: f"{ratio:9.3f}"), ""]
    return "\n".join(lines[:-1])


def sigmoid(setting: Setting, figures: dict[str, Any], left: Callable[[], float]) -> None:
    """From per-token log-probs to loss and coefficients: the one launch, and the public function, with backward."""
    figures["times"] = {}
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
        figures["times"][f"{setting.n} targets, {sequences} sequences"] = measure(functions, setting, calls)


def sigmoid_table(figures: dict[str, Any]) -> str:
    """Microseconds; where a call takes longer to launch than to run, as forward with backward may, the launches'."""
    lines = [f"{'sigmoid loss':56}{'us':>9}{'p20':>9}{'p80':>9}"]
    for shape, times in figures["times"].items():
        for name, time in times.items():
            values = "".join(f"{1e6 * time[key]:9.1f}" for key in ("median", "p20", "p80"))
            lines.append(f"{name + ', ' + shape:56}{values}")
    return "\n".join(lines)
