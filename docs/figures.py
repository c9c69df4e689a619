"""The figures of the docs, as SVG text: FIGURES maps a file's name to the function that draws it.

The packed row and its attention mask are drawn from what dpofast.pack returns, and the layers from the table that
tests/test_layers.py checks.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_LAYERS_FILE = Path(__file__).resolve().parent.parent / "tests" / "test_layers.py"
FONT = 'font-family="DejaVu Sans, Verdana, sans-serif"'
PROMPT, CHOSEN, REJECTED, GREY, INK = "#c9d7f0", "#bfe3c5", "#f3c9c4", "#eceff3", "#1f2933"


class Drawing:
    """Collects SVG elements and writes the document."""

    def __init__(self, width: int, height: int) -> None:
        """Start an empty drawing of this size in pixels."""
        self.size = (width, height)
        self.parts: list[str] = []

    def box(self, x: float, y: float, width: float, height: float, fill: str, text: str = "", size: int = 13) -> None:
        """A rectangle, and text in its middle; lines are separated by a line feed."""
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="3" fill="{fill}" stroke="#7b8794"/>'
        )
        lines = text.split("\n")
        top = y + height / 2 + size * 0.36 - (len(lines) - 1) * size * 0.62
        for number, line in enumerate(lines):
            self.text(x + width / 2, top + number * size * 1.24, line, size=size, anchor="middle")

    def text(self, x: float, y: float, text: str, *, size: int = 13, anchor: str = "start", weight: str = "") -> None:
        """One line of text; y is its baseline."""
        safe = text.replace("&", "&amp;").replace("<", "&lt;")
        bold = f' font-weight="{weight}"' if weight else ""
        self.parts.append(
            f'<text x="{x}" y="{y}" {FONT} font-size="{size}" text-anchor="{anchor}" fill="{INK}"{bold}>{safe}</text>'
        )

    def arrow(self, x1: float, y1: float, x2: float, y2: float) -> None:
        """A line with a head at its end."""
        self.parts.append(
            f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{INK}" stroke-width="1.4" marker-end="url(#head)"/>'
        )

    def svg(self) -> str:
        """The document."""
        width, height = self.size
        head = (
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
            f'orient="auto"><path d="M0 0L8 4L0 8z" fill="{INK}"/></marker></defs>'
        )
        opening = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}">'
        return "\n".join(
            [opening, head, f'<rect width="{width}" height="{height}" fill="#fff"/>', *self.parts, "</svg>"]
        )


@functools.cache
def example_batch() -> Any:
    """The docs' example, packed: prompt [10 11 12], chosen [20 21], rejected [30 31 32]."""
    from dpofast import pack

    (batch,) = pack([{"prompt_ids": [10, 11, 12], "chosen_ids": [20, 21], "rejected_ids": [30, 31, 32]}])
    return batch


def _colours(batch: Any) -> list[str]:
    """The colour of each packed position: of the prompt, or of the branch that it belongs to."""
    prompt = int(batch.logit_rows[0]) + 1
    second = int(batch.segments.runs.cu_seqlens_q[1])
    return [PROMPT if i < prompt else CHOSEN if i < second else REJECTED for i in range(batch.num_tokens)]


def _row(drawing: Drawing, y: float, name: str, values: Sequence[Any], fills: Sequence[str], left: float = 150) -> None:
    drawing.text(left - 12, y + 20, name, anchor="end")
    for column, (value, fill) in enumerate(zip(values, fills, strict=True)):
        drawing.box(left + column * 46, y, 44, 30, fill, str(value))


def packed_row() -> str:
    """One pair as a padded trainer lays it out, and as the packed row."""
    batch, drawing = example_batch(), Drawing(760, 330)
    ids, attended, response = batch.padded()
    drawing.text(16, 26, "Padded: the prompt twice, and pads", weight="bold")
    for row, (name, colour) in enumerate((("chosen row", CHOSEN), ("rejected row", REJECTED))):
        fills = [
            GREY if not seen else colour if answer else PROMPT
            for seen, answer in zip(attended[row].tolist(), response[row].tolist(), strict=True)
        ]
        values = [
            "pad" if not seen else value for seen, value in zip(attended[row].tolist(), ids[row].tolist(), strict=True)
        ]
        _row(drawing, 38 + row * 34, name, values, fills)
    drawing.text(16, 136, f"Packed: {batch.num_tokens} positions instead of {batch.padded_tokens}", weight="bold")
    colours = _colours(batch)
    _row(drawing, 148, "input_ids", batch.input_ids.tolist(), colours)
    _row(drawing, 182, "position_ids", batch.position_ids.tolist(), colours)
    rows, bounds = batch.logit_rows.tolist(), batch.cu_targets.tolist()
    of_targets = [CHOSEN if i < bounds[1] else REJECTED for i in range(len(rows))]
    _row(drawing, 236, "logit_rows", rows, [colours[row] for row in rows])
    _row(drawing, 270, "targets", batch.targets.tolist(), of_targets)
    for text, y in (("the last prompt row (2)", 196), ("predicts the first token", 212), ("of both responses", 228)):
        drawing.text(470, y + 50, text, size=12)
    for column, (name, fill) in enumerate(
        (("prompt", PROMPT), ("chosen", CHOSEN), ("rejected", REJECTED), ("pad", GREY))
    ):
        drawing.box(470, 38 + column * 26, 18, 18, fill)
        drawing.text(496, 52 + column * 26, name)
    return drawing.svg()


def attention_mask() -> str:
    """Which packed rows each row attends to, from the batch's segments."""
    batch, drawing = example_batch(), Drawing(560, 370)
    seen, colours = _visible(batch), _colours(batch)
    ids = batch.input_ids.tolist()
    drawing.text(16, 26, "What each row (query) attends to (keys)", weight="bold")
    for i, token in enumerate(ids):
        drawing.box(110, 76 + i * 46, 44, 44, colours[i], str(token))
        drawing.box(160 + i * 46, 36, 44, 34, colours[i], str(token))
        for j in range(len(ids)):
            drawing.box(
                160 + j * 46, 76 + i * 46, 44, 44, colours[j] if seen[i][j] else "#fff", "1" if seen[i][j] else ""
            )
    drawing.text(16, 106, "query", size=12)
    return drawing.svg()


def _visible(batch: Any) -> list[list[bool]]:
    """seen[q][k] of a small batch: k is not later, and q stands before the end of all that follows k's segment."""
    ends = batch.segments.by_row(batch.segments.ends).tolist()
    return [[k <= q < ends[k] for k in range(batch.num_tokens)] for q in range(batch.num_tokens)]


def head_engine() -> str:
    """How hidden states and the head become log-probs and gradients."""
    drawing = Drawing(880, 400)
    drawing.text(
        16, 26, "A trained head, pairs known: three products of 2·N·D·V, within max_logits_bytes", weight="bold"
    )
    drawing.box(20, 60, 110, 200, PROMPT, "hidden\n(N, D)")
    drawing.box(20, 290, 110, 80, GREY, "head W\n(V, D)")
    drawing.box(200, 60, 190, 74, CHOSEN, "chunk of logits, float32\nGEMM 1: h·Wᵀ")
    drawing.box(200, 186, 190, 74, CHOSEN, "E = exp(z − m), e_y − S\nm, S: maximum and sum")
    drawing.box(460, 60, 180, 74, GREY, "log-probs (N,)\nz_y − m − log S")
    drawing.box(460, 186, 180, 74, GREY, "loss of whole pairs\ng = d loss / d log-prob\nc = −g·scale/S")
    drawing.box(700, 60, 160, 74, REJECTED, "dH = c ⊙ (E·W)\nGEMM 2")
    drawing.box(700, 186, 160, 74, REJECTED, "dW += Eᵀ·(c ⊙ h)\nGEMM 3")
    drawing.arrow(130, 97, 198, 97)
    drawing.arrow(130, 320, 240, 136)
    drawing.arrow(295, 134, 295, 184)
    drawing.arrow(390, 200, 458, 110)
    drawing.arrow(550, 134, 550, 184)
    drawing.arrow(640, 210, 698, 110)
    drawing.arrow(640, 223, 698, 223)
    drawing.text(200, 300, "E is kept for whole pairs, in the model's dtype, until c is known:", size=12)
    drawing.text(200, 318, "no row of logits is computed twice. Logits and E together stay", size=12)
    drawing.text(200, 336, "within max_logits_bytes; what does not fit is computed again.", size=12)
    return drawing.svg()


def training_step() -> str:
    """A step: pairs, micro-batches, gradients."""
    drawing = Drawing(880, 210)
    drawing.text(
        16, 26, "One optimizer step: the same pairs whatever max_tokens and the number of ranks", weight="bold"
    )
    drawing.box(20, 60, 130, 110, PROMPT, "a step's pairs\nin the sampler's\norder, divided\nover ranks")
    drawing.box(210, 60, 130, 110, GREY, "C++ packer:\na rank's pairs in\nmicro-batches of\n≤ max_tokens")
    for number in range(3):
        drawing.box(400, 50 + number * 46, 150, 38, CHOSEN, f"forward, backward {number + 1}")
        drawing.arrow(340, 115, 398, 69 + number * 46)
        drawing.arrow(550, 69 + number * 46, 608, 115)
    drawing.box(610, 60, 120, 110, REJECTED, "gradients add up,\ndivided by the\nstep's pairs\non all ranks", 12)
    drawing.arrow(150, 115, 208, 115)
    drawing.arrow(730, 115, 778, 115)
    drawing.box(780, 80, 84, 70, GREY, "optimizer\nstep")
    return drawing.svg()


def layer_table() -> tuple[tuple[str, ...], ...]:
    """The LAYERS of tests/test_layers.py: a package imports only from packages of earlier rows."""
    for node in ast.parse(_LAYERS_FILE.read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "LAYERS":
            return ast.literal_eval(node.value)
    raise ValueError("tests/test_layers.py: expected an assignment to LAYERS")


def layers() -> str:
    """The packages by layer."""
    rows = layer_table()
    drawing = Drawing(760, 60 + 58 * len(rows))
    drawing.text(
        16,
        26,
        "A package imports only from packages in an earlier row (checked by tests/test_layers.py)",
        weight="bold",
    )
    for number, names in enumerate(rows):
        width = (720 - 12 * (len(names) - 1)) / len(names)
        for column, name in enumerate(names):
            fill = (GREY, GREY, PROMPT, PROMPT, CHOSEN, CHOSEN, REJECTED, REJECTED, GREY)[number % 9]
            drawing.box(20 + column * (width + 12), 44 + number * 58, width, 36, fill, name, 14)
        if number:
            drawing.arrow(380, 44 + number * 58, 380, 44 + number * 58 - 20)
    return drawing.svg()


FIGURES: dict[str, Callable[[], str]] = {
    "packed_row": packed_row,
    "attention_mask": attention_mask,
    "head_engine": head_engine,
    "training_step": training_step,
    "layers": layers,
}
