"""Predictions for many GPUs as text and as Markdown: which way of dividing a model is fastest for which length."""

from collections.abc import Sequence

from bench import markdown
from bench.roofline.devices import DEVICES, GIB, Device
from bench.roofline.models import MODELS
from bench.roofline.scale import Divided, each_division
from bench.roofline.step import Setting
from bench.roofline.work import Pairs

MODELS_SHOWN = {
    "llama-3.1-8b": "Llama-3.1-8B",
    "llama-3.1-70b": "Llama-3.1-70B",
    "qwen3-235b-a22b": "Qwen3-235B-A22B",
}
GPUS = (8, 16, 32, 64, 128, 256, 512)
# Positions of a pair, half of them the prompt's, and of all pairs of a step.
ROWS, STEP = (2048, 32_768, 131_072), 2**20
LORA, EPOCHS = 16, 3
# The case whose modes the page has one by one.
EXAMPLE = ("llama-3.1-70b", 32_768, 64)


def pairs_of(row: int) -> Pairs:
    """A step's pairs of so many positions: a prompt of half of them, and two responses."""
    return Pairs.make(STEP // row, row // 2, row // 4, row // 4)


def case(name: str, row: int, gpus: int, lora: int, device: Device) -> Setting:
    """A cell of the tables."""
    return Setting(model=MODELS[name][1], pairs=pairs_of(row), device=device, devices=gpus, lora=lora, epochs=EPOCHS)


def _cell(found: Sequence[Divided]) -> str:
    if not found:
        return "no way to divide so few pairs"
    first = found[0]
    if not first.fits:
        return f"does not fit: {first.name} {first.peak / GIB:,.0f} GiB"
    return f"{first.name}: {_seconds(first.seconds)} s, {first.peak / GIB:.0f} GiB"


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f}" if seconds < 100 else f"{seconds:,.0f}"


def _best(name: str, lora: int, device: Device) -> list[tuple[str, ...]]:
    return [(str(gpus), *(_cell(each_division(case(name, row, gpus, lora, device))) for row in ROWS)) for gpus in GPUS]


HEADER = ("GPUs", *(f"{STEP // row} pairs of {row // 1024}K" for row in ROWS))


def _title(name: str, lora: int) -> str:
    model = MODELS[name][1]
    active = f", {model.active_weights() / 1e9:.1f} of them for each token" if model.experts else ""
    trained = f"LoRA {lora}" if lora else "all weights"
    return f"{MODELS_SHOWN[name]} ({model.weights() / 1e9:.1f} billion weights{active}), {trained}"


def best_text(device: Device) -> str:
    """The fastest way for every model, number of GPUs and length, for a terminal."""
    parts = [f"PREDICTIONS, not measurements: {device.name}, {STEP:,} positions a step"]
    for name in MODELS_SHOWN:
        for lora in (0, LORA):
            body = [HEADER, *_best(name, lora, device)]
            widths = [max(len(row[column]) for row in body) for column in range(len(HEADER))]
            lines = [
                "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in body
            ]
            parts.append("\n".join([_title(name, lora), *lines]))
    return "\n\n".join(parts)


def best_tables() -> str:
    """The same of H100s in Markdown."""
    return "\n\n".join(
        f"{_title(name, lora)}:\n\n{markdown.rows(HEADER, _best(name, lora, DEVICES['H100']))}"
        for name in MODELS_SHOWN
        for lora in (0, LORA)
    )


MODES_HEADER = (
    "mode",
    "fits",
    "s a step",
    "tokens/s a GPU",
    "GiB",
    "weights",
    "gradients",
    "optimizer",
    "activations",
    "head",
    "GiB sent by a GPU",
    "s not hidden",
)


def _mode_row(found: Divided) -> tuple[str, ...]:
    waited = sum(found.terms.values()) - found.terms["computing"]
    sent = ", ".join(f"{what} {size / GIB:,.0f}" for what, size in found.sent.items())
    held = found.memory
    return (
        found.name,
        "yes" if found.fits else "no",
        _seconds(found.seconds) if found.fits else "-",
        f"{found.tokens_per_second:,.0f}" if found.fits else "-",
        f"{found.peak / GIB:,.1f}",
        *(f"{held[kind] / GIB:,.1f}" for kind in ("weights", "gradients", "optimizer", "activations", "head")),
        sent or "-",
        f"{waited:.1f}",
    )


def modes_text(setting: Setting) -> str:
    """Every way to divide one case, for a terminal.

    Raises:
        ValueError: there is none.
    """
    found = each_division(setting)
    if not found:
        raise ValueError(
            f"--devices: expected a number that the pairs and heads can be divided over, got {setting.devices} for "
            f"{len(setting.pairs)} pairs and {setting.model.heads} heads"
        )
    body = [MODES_HEADER, *map(_mode_row, found)]
    widths = [max(len(row[column]) for row in body) for column in range(len(MODES_HEADER))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in body]
    trained = f"LoRA {setting.lora}" if setting.lora else "all weights"
    title = f"{setting.device.name} x {setting.devices}, {len(setting.pairs)} pairs a step, {trained}"
    return "\n".join([f"PREDICTIONS, not measurements: {title}", *lines])


def modes_table() -> str:
    """Every way to divide the page's example, in Markdown."""
    name, row, gpus = EXAMPLE
    setting = case(name, row, gpus, 0, DEVICES["H100"])
    return markdown.rows(MODES_HEADER, map(_mode_row, each_division(setting)))
