"""Every measured line of bench/results beside its prediction, or the reason why there is none.

A CPU's two rates are of its own lines, as they were measured: the rate in products from the products of a line timed
alone, or from the floors of bench.head on the same processor; the rate in bytes from the steps of plain trl on it, by
what they take beyond their products. So trl's times say how well one rate fits all lengths, and all other times and all
bytes of memory are predictions.
"""

import functools
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.cases import RANDOM_PROFILES, RESULTS, SHARED_PROFILES
from bench.markdown import Record, records
from bench.roofline import heads, layers
from bench.roofline.calls import flops
from bench.roofline.devices import DEVICES, Device
from bench.roofline.models import MODELS, ModelShape
from bench.roofline.step import DPOFAST, TRL, Implementation, Prediction, Setting, predict_batches
from bench.roofline.work import Call, MicroBatch, Pairs, even_parts

# Of its rate in products, what attention on a CPU reaches: assumed.
CPU_ATTENTION = 0.5
# dpofast's micro-batches on a CPU.
CPU_TOKENS = 2048

_TRL = replace(TRL, head=heads.trl_on_cpu)
_DPOFAST = replace(DPOFAST, head=heads.dpofast_on_cpu, layers=lambda name, _: layers.EAGER[name])
ENGINES: dict[str, tuple[Implementation, bool]] = {
    "dpofast": (_DPOFAST, False),
    "dpofast-live": (replace(_DPOFAST, cached=False), False),
    "dpofast-unshared": (replace(_DPOFAST, layout="unshared"), False),
    "trl": (_TRL, False),
    "trl-precompute": (replace(_TRL, cached=True), False),
    "trl-checkpointing": (_TRL, True),
}
HEADS: dict[str, heads.Head] = {
    "dpofast": heads.dpofast_on_cpu,
    "dpofast pairs": heads.dpofast_on_cpu,
    "naive": heads.full_logits,
    "trl": heads.trl_on_cpu,
    "liger": heads.liger_on_cpu,
}
GPU_HEADS = {
    **HEADS,
    "dpofast": heads.dpofast,
    "dpofast pairs": heads.dpofast,
    "trl": heads.trl,
    "liger": heads.liger,
}


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One measured line.

    Attributes:
        line: what was measured, in words.
        seconds, peak: (measured, predicted); None where there is no prediction of it.
        gflops: (counted when it ran, predicted) operations of products, where they were counted.
        why: what is not predicted, and why; empty where all is.
    """

    line: str
    seconds: tuple[float, float] | None = None
    peak: tuple[float, float] | None = None
    gflops: tuple[float, float] | None = None
    why: str = ""


def compare(results: Path = RESULTS) -> list[Compared]:
    """All lines of all files of a folder of results, in the order of their dates.

    Raises:
        ValueError: there is no line.
    """
    found = [*_steps(results), *_heads(results), *_gpu(results)]
    unlike = {
        "kernel_report": "counts of the compiler and predictions, nothing measured",
        "packing": "the packer computes no product",
        "memory": "resident memory of the data, not of a step",
        "real_run": "a whole run with its evaluations; its lengths are not recorded",
        "families": "no time is measured",
        "paper": "no time is measured",
        "scale": "bytes counted on processors, no time is measured",
    }
    for path in sorted(results.glob("*.jsonl")):
        if path.stem not in ("step", "head", "gpu"):
            why = unlike.get(path.stem, "no model of it")
            found.append(Compared(line=f"{path.stem}, {len(records(path.stem, results))} lines", why=why))
    if not found:
        raise ValueError(
            f"--results: expected a folder with lines in step.jsonl, head.jsonl or gpu.jsonl, got {results}"
        )
    return found


def _cpu(products: float, moved: float) -> Device:
    return Device(
        name="CPU",
        peak_flops=products,
        gemm=1.0,
        attention=CPU_ATTENTION,
        bandwidth=moved,
        stream=1.0,
        memory=math.inf,
    )


@functools.cache
def byte_rate(cpu: str, results: Path) -> float:
    """Bytes a second of a processor: the median over its lines of plain trl.

    Raises:
        LookupError: no such line.
    """
    everything = records("step", results)
    rates = []
    for record in everything:
        if record["device"]["cpu"] == cpu and "trl" in record["figures"]["engines"]:
            try:
                products = _product_rate(record, everything, results)
                alone, slow = (
                    predict_engine(record, "trl", _cpu(products, moved), everything).seconds
                    for moved in (math.inf, 1.0)
                )
            except LookupError:
                continue
            beyond = record["figures"]["engines"]["trl"]["step_s"]["median"] - alone
            rates.append((slow - alone) / max(beyond, 1e-9))
    if not rates:
        raise LookupError(f"no step of trl on {cpu} says its rate in bytes")
    return statistics.median(rates)


def _steps(results: Path) -> Iterator[Compared]:
    everything = records("step", results)
    for record in everything:
        figures = record["figures"]
        lengths = figures["mean_tokens"]
        title = (
            f"step {record['date'][:10]}, {_name(record)}, {lengths['prompt']:.0f} / "
            f"{(lengths['chosen'] + lengths['rejected']) / 2:.0f} tokens, {figures['pairs_per_step']} pairs"
        )
        for engine, row in figures["engines"].items():
            line = f"{title}: {engine}"
            try:
                moved = byte_rate(record["device"]["cpu"], results)
                device = _cpu(_product_rate(record, everything, results), moved)
                prediction = predict_engine(record, engine, device, everything)
            except LookupError as error:
                yield Compared(line=line, why=str(error.args[0]))
                continue
            counted = row.get("work", {}).get("gemm_gflops")
            yield Compared(
                line=line,
                seconds=(row["step_s"]["median"], prediction.seconds),
                peak=(row["peak_bytes"], prediction.peak),
                gflops=None if counted is None else (counted, prediction.gemm_flops / 1e9),
            )


def predict_engine(record: Record, engine: str, device: Device, everything: list[Record]) -> Prediction:
    """A recorded engine's step, the mean of the steps of its run.

    Args:
        record: a line of step.jsonl.
        engine: one of its engines.
        device: the processor.
        everything: all lines; where this one lacks the padded length, it may be in another of the same pairs.

    Raises:
        LookupError: something that it needs is not recorded.
    """
    if record["figures"]["profile"] in SHARED_PROFILES:
        raise LookupError("what sequences share beyond a prompt is not modelled")
    if engine not in ENGINES:
        raise LookupError("how it divides padded rows is not modelled")
    how, checkpointing = ENGINES[engine]
    figures = record["figures"]
    setting = Setting(
        model=_shape(figures),
        pairs=Pairs.make(1, 1, 1, 1),
        device=device,
        lora=figures.get("lora", 0),
        precision="float32",
        checkpointing=checkpointing,
        epochs=figures.get("epochs", 1),
    )
    max_tokens = figures.get("max_tokens") or CPU_TOKENS
    batches = [batch for step in _batches(record, how, max_tokens, everything) for batch in step]
    return predict_batches(setting, how, batches, steps=_distinct_steps(figures))


def _batches(record: Record, how: Implementation, max_tokens: int, everything: list[Record]) -> list[list[MicroBatch]]:
    """The micro-batches of every step of the run's pairs."""
    figures = record["figures"]
    if figures["profile"] in RANDOM_PROFILES:
        pairs = _random_pairs(figures)
        each = figures["pairs_per_step"]
        parts = [pairs[start : start + each] for start in range(0, len(pairs), each)]
    else:
        # Only sums are recorded; the same sums in other lengths make the same products.
        parts = [_even_pairs(figures)]
    if how.layout != "padded":
        return [how.micro_batches(part, max_tokens, 1) for part in parts]
    if figures["profile"] in RANDOM_PROFILES:
        return [how.micro_batches(part, 1 << 30, 1) for part in parts]
    rows, steps = 2 * figures["pairs_per_step"], _distinct_steps(figures)
    widths = even_parts(round(_padded_positions(record, everything) * steps / rows), steps)
    targets = even_parts(parts[0].targets, steps)
    return [[(_padded_call(rows, width, count),)] for width, count in zip(widths, targets, strict=True)]


def _padded_call(rows: int, width: int, targets: int) -> Call:
    return Call(positions=rows * width, targets=targets, sequences=rows, width=width, visible=rows * width**2)


def _padded_positions(record: Record, everything: list[Record]) -> float:
    """Positions of one model in a padded step: trl's count is of policy and reference."""
    wanted = record["figures"]
    for other in [record, *everything]:
        figures = other["figures"]
        alike = all(figures[key] == wanted[key] for key in ("profile", "pairs_per_step", "mean_tokens"))
        if alike and "work" in figures["engines"]["trl"]:
            return figures["engines"]["trl"]["work"]["positions"] / 2
    raise LookupError("the length that rows were padded to is not recorded (bench.step --count records it)")


def _even_pairs(figures: dict[str, Any]) -> Pairs:
    count = _distinct_steps(figures) * figures["pairs_per_step"]
    totals = (round(figures["mean_tokens"][key] * count) for key in ("prompt", "chosen", "rejected"))
    return Pairs(*(tuple(even_parts(total, count)) for total in totals))


def _random_pairs(figures: dict[str, Any]) -> Pairs:
    from bench.random_pairs import build_random_pairs

    made = build_random_pairs(RANDOM_PROFILES[figures["profile"]], _distinct_steps(figures) * figures["pairs_per_step"])
    # A trainer adds the end-of-sequence token to each response.
    lengths = (
        [len(pair[key].split()) + (key != "prompt") for pair in made] for key in ("prompt", "chosen", "rejected")
    )
    return Pairs(*(tuple(column) for column in lengths))


def _distinct_steps(figures: dict[str, Any]) -> int:
    return figures["steps"] // figures.get("epochs", 1)


def _shape(figures: dict[str, Any]) -> ModelShape:
    if figures["model"] == "smollm2":
        return MODELS["smollm2-135m"][1]
    profile = RANDOM_PROFILES[figures["profile"]]
    return ModelShape(
        layers=profile.layers,
        hidden=profile.hidden_size,
        intermediate=4 * profile.hidden_size,
        heads=profile.hidden_size // 64,
        kv_heads=max(1, profile.hidden_size // 128),
        head_dim=64,
        vocab=profile.vocab_size,
    )


def _name(record: Record) -> str:
    figures = record["figures"]
    model = "SmolLM2-135M" if figures["model"] == "smollm2" else f"random Llama {figures['profile']}"
    return f"{model}, LoRA" if figures.get("lora") else model


def _product_rate(record: Record, everything: list[Record], results: Path) -> float:
    """Operations a second of products alone, measured on the line's processor.

    Raises:
        LookupError: no line of this processor has it.
    """
    same = [other for other in everything if other["device"]["cpu"] == record["device"]["cpu"]]
    for other in [record, *same]:
        work = [row["work"] for row in other["figures"]["engines"].values() if "gemm_s" in row.get("work", {})]
        if work:
            return sum(row["gemm_gflops"] for row in work) * 1e9 / sum(row["gemm_s"] for row in work)
    rates = [
        _floor_rate(head["figures"]["shape"], mode, result)
        for head in records("head", results)
        if head["device"]["cpu"] == record["device"]["cpu"]
        for mode, result in head["figures"]["modes"].items()
    ]
    if not rates:
        raise LookupError(f"no product was timed on {record['device']['cpu']}")
    return statistics.median(rates)


def _not_modelled(name: str, mode: str, known: dict[str, heads.Head]) -> str:
    if (name, mode) == ("dpofast", "trained"):
        return "per-token log-probs keep what fits and compute the rest again, which is not modelled"
    return "" if name in known else "what its code moves is not modelled"


PRODUCTS = {"forward": 1, "frozen": 2, "trained": 3}


def _floor_rate(shape: dict[str, int], mode: str, result: dict[str, Any]) -> float:
    return PRODUCTS[mode] * 2 * shape["n"] * shape["d"] * shape["v"] / min(result["floor_s"])


def _heads(results: Path) -> Iterator[Compared]:
    for record in records("head", results):
        figures = record["figures"]
        for mode, result in figures["modes"].items():
            device = _cpu(_floor_rate(figures["shape"], mode, result), byte_rate(record["device"]["cpu"], results))
            yield from _head_lines(
                f"head {record['date'][:10]}", figures["shape"], mode, result, device, "float32", HEADS
            )


def _gpu(results: Path) -> Iterator[Compared]:
    for record in records("gpu", results):
        figures = record["figures"]
        title = f"gpu {record['date'][:10]}, {figures['part']}: {figures['piece']}"
        device = next((entry for key, entry in DEVICES.items() if key in figures["gpu"].get("name", "")), None)
        if figures["part"] != "head" or "result" not in figures["figures"]:
            yield Compared(line=title, why="only heads and whole steps of a known model are predicted")
        elif device is None:
            yield Compared(line=title, why=f"no entry for {figures['gpu'].get('name')}")
        else:
            piece = figures["figures"]
            yield from _head_lines(title, piece["shape"], piece["mode"], piece["result"], device, "bfloat16", GPU_HEADS)


def _head_lines(
    title: str,
    shape: dict[str, int],
    mode: str,
    result: dict[str, Any],
    device: Device,
    precision: str,
    known: dict[str, heads.Head],
) -> Iterator[Compared]:
    width = layers.PRECISIONS[precision]
    model = ModelShape(layers=1, hidden=shape["d"], intermediate=1, heads=1, kv_heads=1, head_dim=1, vocab=shape["v"])
    sequences = 2 * shape["pairs"]
    call = Call(
        positions=shape["n"],
        targets=shape["n"],
        sequences=sequences,
        width=shape["n"] // sequences + 1,
        visible=0,
    )
    for name, row in result["contenders"].items():
        line = f"{title}, {mode}: {name}"
        if why := _not_modelled(name, mode, known):
            yield Compared(line=line, why=why)
            continue
        asked = heads.HeadCall(
            model=model,
            call=call,
            precision=width,
            device=device,
            grad=mode != "forward",
            trained=mode == "trained",
        )
        cost = known[name](asked)
        seconds = device.gemm_seconds(cost.gemms, width.product) + cost.bytes / device.bytes
        units = row["gemm_units"]
        yield Compared(
            line=line,
            seconds=(min(row["seconds"]), seconds),
            peak=None if row["counted_bytes"] is None else (row["counted_bytes"], cost.peak),
            gflops=None
            if units is None
            else (units * 2 * shape["n"] * shape["d"] * shape["v"] / 1e9, flops(cost.gemms) / 1e9),
        )
