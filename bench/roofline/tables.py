"""The predictions as text for a terminal, and as Markdown for docs/expect_on_your_gpu.md (docs/generate.py)."""

import math
import statistics
from collections.abc import Iterable, Sequence

from bench import markdown
from bench.roofline.devices import DEVICES, GIB
from bench.roofline.models import MODELS
from bench.roofline.published import OPEN_INSTRUCT_MFU, PUBLISHED, model_flops_utilization, open_instruct
from bench.roofline.results import Compared, compare
from bench.roofline.step import IMPLEMENTATIONS, Prediction, Setting, best, strategy
from bench.roofline.work import Pairs

TITLES = {
    "qwen2.5-0.5b": "Qwen2.5-0.5B",
    "qwen2.5-7b": "Qwen2.5-7B",
    "llama-3.1-8b": "Llama-3.1-8B",
}
# The case of the page: lengths of prompt, chosen and rejected response.
PAIRS, LENGTHS, EPOCHS = 64, (200, 320, 280), 3
CASES = (("qwen2.5-0.5b", 0), ("qwen2.5-7b", 16), ("llama-3.1-8b", 16))


def predictions(setting: Setting) -> list[Prediction]:
    """The best step of every implementation."""
    return [best(strategy(setting), how) for how in IMPLEMENTATIONS]


def step_text(found: Sequence[Prediction]) -> str:
    """One line an implementation: time, throughput, memory, and what takes how much of either."""
    setting = found[0].setting
    terms, held = list(found[0].terms), list(found[0].memory)
    lines = [
        f"PREDICTIONS, not measurements: {setting.device.name} x {setting.devices}, {len(setting.pairs)} pairs, "
        f"{'LoRA ' + str(setting.lora) if setting.lora else 'all weights'}, {_divided(setting)}",
        f"{'':9}{'s a step':>9}{'tokens/s a GPU':>16}{'GiB':>7}  {'fits':6}{'micro-batches':>14}{'recomputed':>12}"
        "  bound by",
    ]
    for row in found:
        lines.append(
            f"{row.how.name:9}{row.seconds:9.3f}{row.tokens_per_second:16,.0f}{row.peak / GIB:7.1f}  "
            f"{_yes(row.fits):6}{row.micro_batches:14.0f}{_yes(row.setting.checkpointing):>12}  "
            f"{row.bound}, {row.terms[row.bound] / row.seconds:.0%}"
        )
    lines += ["", f"{'seconds':9}" + "".join(f"{term:>14}" for term in terms)]
    lines += [f"{row.how.name:9}" + "".join(f"{row.terms[term]:14.3f}" for term in terms) for row in found]
    lines += ["", f"{'GiB':9}" + "".join(f"{name:>14}" for name in held)]
    lines += [f"{row.how.name:9}" + "".join(f"{row.memory[name] / GIB:14.1f}" for name in held) for row in found]
    return "\n".join(lines)


def _divided(setting: Setting) -> str:
    if setting.devices == 1:
        return setting.precision
    return f"{setting.precision}, weights {'sharded' if setting.sharded else 'copied to each'}"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def results_text(found: Sequence[Compared]) -> str:
    """Every measured line with its prediction and the error, and the lines without one with the reason."""
    lines = [f"{'measured, predicted, error':86}{'seconds':>26}{'GiB':>26}{'GFLOP of products':>28}"]
    for row in found:
        if row.seconds is None:
            lines.append(f"{row.line[:86]:86}  not predicted: {row.why}")
            continue
        cells = (_triple(row.seconds, 1, 8), _triple(row.peak, GIB, 8), _triple(row.gflops, 1, 9, 1))
        lines.append(f"{row.line[:86]:86}" + "".join(cells))
    return "\n".join([*lines, "", summary_text(found)])


def _triple(pair: tuple[float, float] | None, unit: float, width: int, digits: int = 2) -> str:
    if pair is None:
        return f"{'-':>{2 * width + 10}}"
    measured, predicted = (value / unit for value in pair)
    return f"{measured:{width + 1}.{digits}f}{predicted:{width + 1}.{digits}f}{predicted / measured - 1:+8.0%}"


def errors(found: Sequence[Compared]) -> list[tuple[str, int, list[str]]]:
    """For each kind of line: its name, how many are predicted, and the errors of time, memory and products as text."""
    kinds: dict[str, list[Compared]] = {}
    for row in found:
        if row.seconds is not None:
            kinds.setdefault(_kind(row), []).append(row)

    def spread(pairs: Iterable[tuple[float, float] | None]) -> str:
        signed = [predicted / measured - 1 for measured, predicted in filter(None, pairs)]
        if not signed:
            return "-"
        return f"{statistics.median(signed):+.0%} ({min(signed):+.0%} to {max(signed):+.0%})"

    def most(pairs: Iterable[tuple[float, float] | None]) -> str:
        return f"{max((abs(p / m - 1) for m, p in filter(None, pairs)), default=math.nan):.2%}"

    return [
        (
            kind,
            len(rows),
            [spread(r.seconds for r in rows), spread(r.peak for r in rows), most(r.gflops for r in rows)],
        )
        for kind, rows in kinds.items()
    ]


def _kind(row: Compared) -> str:
    """step or head or gpu, and the engine or contender."""
    return f"{row.line.split()[0]}: {row.line.rpartition(': ')[2]}"


def summary_text(found: Sequence[Compared]) -> str:
    """Median and range of the errors, by kind of line."""
    lines = [
        f"{'error of predictions: median (range)':40}{'lines':>6}{'time':>26}{'memory':>26}{'products, at most':>20}"
    ]
    for kind, count, (time, memory, products) in errors(found):
        lines.append(f"{kind:40}{count:6}{time:>26}{memory:>26}{products:>20}")
    left = sum(row.seconds is None for row in found)
    return "\n".join([*lines, f"{left} lines are not predicted, each named above with the reason"])


def errors_table() -> str:
    """The same in Markdown, with the lines that are not predicted by reason."""
    found = compare()
    table = markdown.rows(
        ("measured on a CPU", "lines", "time", "memory", "operations of products, at most"),
        [(f"`{kind}`", str(count), *texts) for kind, count, texts in errors(found)],
    )
    reasons: dict[str, int] = {}
    for row in found:
        if row.seconds is None:
            reasons[row.why] = reasons.get(row.why, 0) + 1
    left = "\n".join(f"- {count}: {why}" for why, count in reasons.items())
    return f"{table}\n\nNot predicted:\n\n{left}"


def devices_table() -> str:
    """Datasheet numbers and assumed fractions."""
    return markdown.rows(
        (
            "device",
            "bf16, TFLOP/s",
            "products reach",
            "attention reaches",
            "TB/s",
            "elementwise reaches",
            "GiB",
            "link, GB/s",
            "network, GB/s",
            "to the host, GB/s",
            "source",
        ),
        [
            (
                device.name,
                f"{device.peak_flops / 1e12:,.0f}",
                f"{device.gemm:.0%}",
                f"{device.attention:.0%}",
                f"{device.bandwidth / 1e12:.2f}",
                f"{device.stream:.0%}",
                f"{device.memory / GIB:.0f}",
                f"{device.link / 1e9:.0f}",
                f"{device.network / 1e9:.0f}",
                f"{device.host / 1e9:.0f}",
                device.source,
            )
            for device in DEVICES.values()
        ],
    )


def one_gpu_table() -> str:
    """The page's case on one GPU of each kind."""
    body = []
    for name, lora in CASES:
        for key, device in DEVICES.items():
            setting = Setting(
                model=MODELS[name][1], pairs=Pairs.make(PAIRS, *LENGTHS), device=device, lora=lora, epochs=EPOCHS
            )
            found = predictions(setting)
            _, trl, _, ours = found
            title = f"{TITLES[name]}, {'LoRA' if lora else 'all weights'}"
            cells = [f"{row.seconds:.2f} s, {row.peak / GIB:.0f} GiB" for row in found]
            faster = f"{trl.seconds / ours.seconds:.1f}x"
            body.append((title, key, *cells, f"{ours.tokens_per_second:,.0f}", faster, ours.bound))
    names = [how.name for how in IMPLEMENTATIONS]
    header = ("predicted step", "GPU", *names, "tokens/s, dpofast", "trl's time over it", "dpofast is bound by")
    return markdown.rows(header, body)


def published_table() -> str:
    """Published GPU figures of other libraries, the model's prediction for each and its error."""
    body = []
    for figure in PUBLISHED:
        predicted, size = figure.predict()
        measured, shown = _ms(figure.measured), _ms(predicted)
        if figure.measured_bytes and size:
            measured += f", {figure.measured_bytes / GIB:.1f} GiB"
            shown += f", {size / GIB:.1f} GiB"
        body.append((figure.what, figure.source, measured, shown, f"{predicted / figure.measured - 1:+.0%}"))
    table = markdown.rows(("what", "source", "published", "predicted", "error of the time"), body)
    step = open_instruct()
    return (
        f"{table}\n\nOf the peak rate, that step's products (without a repeated forward) are "
        f"{OPEN_INSTRUCT_MFU:.1%} as published, "
        f"{model_flops_utilization(step):.1%} as predicted, at {step.tokens_per_second:,.0f} tokens/s a GPU."
    )


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:,.0f} ms" if milliseconds >= 1000 else f"{milliseconds:.2f} ms"


def worked_example() -> str:
    """The command's own output for the page's case."""
    setting = Setting(
        model=MODELS["llama-3.1-8b"][1],
        pairs=Pairs.make(PAIRS, *LENGTHS),
        device=DEVICES["H100"],
        lora=16,
        epochs=EPOCHS,
    )
    lengths = "/".join(map(str, LENGTHS))
    command = (
        f"python -m bench.roofline --model llama-3.1-8b --device H100 --pairs {PAIRS} --lengths {lengths} --lora 16"
    )
    return f"```\n$ {command}\n{step_text(predictions(setting))}\n```"
