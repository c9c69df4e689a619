"""The part "head" of bench.gpu: every head plan and every peer against bare products, at the shapes of the goals.

bench.head does the work. In the forward mode, both of the public function's implementations are compared as well,
whichever it chooses: the tl.dot kernel, which writes no logits to memory, and logits of a few hundred rows at a time
with a row kernel.
"""

import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.gpu.setting import Setting, one_line
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


FORWARD_ONLY = {"tl.dot kernel": tl_dot, "scratch": scratch}


def run(setting: Setting, figures: dict[str, Any], left: Callable[[], float]) -> None:
    """Fill figures. Failures of dpofast's own contenders are raised at the end, when everything else is measured."""
    problem = Problem.make(setting.n, setting.d, setting.v, setting.pairs, setting.dtype, setting.device)
    figures["shape"] = {name: getattr(setting, name) for name in ("n", "d", "v", "pairs")}
    heads, figures["absent"] = build(problem, [*OURS, *setting.peers])
    for name, reason in figures["absent"].items():
        print(f"{name} is not installed here and left out: {reason}", flush=True)
    truth = Truth.of(problem)
    counts = {"token": setting.n, "sequence": 2 * setting.pairs}
    figures["own_error"] = {name: (truth.limit(count) - LOGPS_TOLERANCE) / 2 for name, count in counts.items()}
    ours = {name: make(problem) for name, make in FORWARD_ONLY.items()}
    figures["goals_apply"] = setting.device.type == "cuda"
    figures["modes"] = {}
    wrong = []
    for mode in MODES:
        if left() < 15:
            wrong.append(f"{mode}: no time left")
            continue
        contenders = {**heads, **ours} if mode == "forward" else heads
        try:
            result = compare(problem, contenders, truth, mode, setting.rounds)
        except Exception as error:
            traceback.print_exc()
            wrong.append(f"{mode}: {one_line(error)}")
            continue
        figures["modes"][mode] = result
        wrong += [f"{mode}: {name}: {result['failed'][name]}" for name in ours if name in result["failed"]]
        entries = result["contenders"]
        wrong += [f"{mode}: {name}: {entries[name]['wrong']}" for name in ours if entries.get(name, {}).get("wrong")]
    if wrong:
        raise RuntimeError("; ".join(wrong))


def table(figures: dict[str, Any]) -> str:
    """The modes of bench.head, the floor's rate, and the goals beside what was reached."""
    shape = figures["shape"]
    lines = [f"head: N {shape['n']}, D {shape['d']}, V {shape['v']}, {shape['pairs']} pairs"]
    own = figures["own_error"]
    lines.append(
        f"torch.mm with a float32 result: off by {own['token']:.0e} nats a token, {own['sequence']:.0e} a sequence"
    )
    for name, reason in figures["absent"].items():
        lines.append(f"{name} is not installed here and left out: {reason}")
    for mode, result in figures["modes"].items():
        products = 1 + len(MODES[mode])
        flops = products * 2 * shape["n"] * shape["d"] * shape["v"]
        lines += ["", mode_table(mode, result)]
        lines.append(f"{FLOOR} runs at {flops / min(result['floor_s']) / 1e12:.0f} TFLOP/s")
        for (goal_mode, name), goal in GOALS.items():
            if figures["goals_apply"] and goal_mode == mode and name in result["contenders"]:
                reached = result["contenders"][name]["floors"]
                lines.append(
                    f"goal on an H100: {name} within {goal:.2f} of {products} x torch.mm: {reached:.3f}, "
                    f"{'reached' if reached <= goal else 'MISSED'}"
                )
    return "\n".join(lines)
