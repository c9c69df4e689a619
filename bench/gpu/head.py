"""The part "head" of bench.gpu: every head plan and every peer against bare products, at the shapes of the goals.

bench.head does the work. In the forward mode, both of the public function's implementations are compared as well,
whichever it chooses: the tl.dot kernel, which writes no logits to memory, and logits of a few hundred rows at a time
with a row kernel.
"""

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench.gpu.setting import Setting
from bench.head.compare import compare
from bench.head.floor import FLOOR
from bench.head.peers import OURS, build
from bench.head.problem import MODES, Head, Problem, per_token
from bench.head.table import table as mode_table
from bench.head.truth import LOGPS_TOLERANCE, Truth
from dpofast.head.engine.matmul import logits_into
from dpofast.head.planning.dtypes import accumulate_dtype
from dpofast.head.planning.plan import SCRATCH_ROWS
from dpofast.kernels.exp_gemm import exp_gemm
from dpofast.kernels.token_logprobs import token_logprobs

# On an H100: two reads of the logits are 1.16 of two products, one read 1.10.
GOALS = {
    ("trained", "dpofast pairs"): 1.15,
    ("frozen", "dpofast pairs"): 1.10,
    ("frozen", "dpofast"): 1.10,
    ("forward", "tl.dot kernel"): 1.08,
    ("forward", "scratch"): 1.15,
}


def tl_dot(problem: Problem) -> Head:
    """The kernel with the product inside, as it is launched without options."""
    return per_token(problem, lambda h, w: exp_gemm(h, w, problem.targets).logps)


def scratch(problem: Problem) -> Head:
    """Logits of a few hundred rows at a time, then the row kernel."""

    def logps(hidden: Tensor, weight: Tensor) -> Tensor:
        buffer = hidden.new_empty(SCRATCH_ROWS, len(weight), dtype=accumulate_dtype(hidden.dtype))
        values = []
        for h, targets in zip(hidden.split(SCRATCH_ROWS), problem.targets.split(SCRATCH_ROWS), strict=True):
            logits_into(buffer[: len(h)], h, weight, SCRATCH_ROWS)
            values.append(token_logprobs(buffer[: len(h)], targets).logps)
        return torch.cat(values)

    return per_token(problem, logps)


# Seconds that must be left to begin a mode.
LEAST_S = 10

FORWARD_ONLY = {"tl.dot kernel": tl_dot, "scratch": scratch}


def run(setting: Setting, left: Callable[[], float]) -> Iterator[tuple[str, Any]]:
    """Each mode at each shape, the goals' first.

    Raises:
        RuntimeError: at the end, what of dpofast's own did not run or was wrong.
    """
    wrong: list[str] = []
    for shape in setting.heads:
        peers = setting.peers if shape == setting.heads[0] else setting.few_peers
        problem = Problem.make(setting.n, shape.d, shape.v, setting.pairs, setting.dtype, setting.device)
        heads, absent = build(problem, [*OURS, *peers])
        truth = Truth.of(problem)
        counts = {"token": setting.n, "sequence": 2 * setting.pairs}
        common = {
            "shape": {"n": setting.n, "d": shape.d, "v": shape.v, "pairs": setting.pairs},
            "own_error": {name: (truth.limit(count) - LOGPS_TOLERANCE) / 2 for name, count in counts.items()},
            "absent": absent,
            "goals_apply": setting.device.type == "cuda" and shape == setting.heads[0],
        }
        ours = {name: make(problem) for name, make in FORWARD_ONLY.items()}
        for mode in MODES:
            title = f"D {shape.d}, {mode}"
            if left() < LEAST_S:
                wrong.append(f"{title}: no time left")
                continue
            contenders = {**heads, **ours} if mode == "forward" else heads
            result = compare(problem, contenders, truth, mode, setting.rounds, left, keep_wrong=True)
            yield title, {**common, "mode": mode, "result": result}
            own = [name for name in contenders if name in ours or name in OURS]
            wrong += [f"{title}: {name}: {result['failed'][name]}" for name in own if name in result["failed"]]
            entries = result["contenders"]
            wrong += [
                f"{title}: {name}: {entries[name]['wrong']}" for name in own if entries.get(name, {}).get("wrong")
            ]
        del problem, heads, truth, ours
    if wrong:
        raise RuntimeError("; ".join(wrong))


def table(pieces: dict[str, Any]) -> str:
    """The modes of bench.head, the floor's rate, and the goals beside what was reached."""
    lines: list[str] = []
    seen: list[dict[str, int]] = []
    for figures in pieces.values():
        shape, mode, result = figures["shape"], figures["mode"], figures["result"]
        if shape not in seen:
            seen.append(shape)
            own = figures["own_error"]
            lines += [f"head: N {shape['n']}, D {shape['d']}, V {shape['v']}, {shape['pairs']} pairs"]
            errors = f"{own['token']:.0e} nats a token, {own['sequence']:.0e} a sequence"
            lines.append(f"torch.mm with a float32 result: off by {errors}")
            lines += [f"{name} is not here and left out: {reason}" for name, reason in figures["absent"].items()]
        products = 1 + len(MODES[mode])
        flops = products * 2 * shape["n"] * shape["d"] * shape["v"]
        lines += ["", mode_table(mode, result)]
        lines.append(f"{FLOOR} runs at {flops / statistics.median(result['floor_s']) / 1e12:.0f} TFLOP/s")
        for (goal_mode, name), goal in GOALS.items():
            if figures["goals_apply"] and goal_mode == mode and name in result["contenders"]:
                reached = result["contenders"][name]["floors"]
                lines.append(
                    f"goal on an H100: {name} within {goal:.2f} of {products} x torch.mm: {reached:.3f}, "
                    f"{'reached' if reached <= goal else 'MISSED'}"
                )
        lines.append("")
    return "\n".join(lines[:-1])
