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

import torch

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

    def line(self, *points: tuple[float, float]) -> None:
        """A line through these points."""
        path = " ".join(f"{x},{y}" for x, y in points)
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{INK}" stroke-width="1.2"/>')

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


@functools.cache
def dialogue_batch() -> Any:
    """Two pairs, packed: one system prompt [10 11], two prompts, and of the first pair responses that part late."""
    from dpofast import pack

    first = {"prompt_ids": [10, 11, 20], "chosen_ids": [30, 31, 32, 35], "rejected_ids": [30, 31, 33, 34]}
    second = {"prompt_ids": [10, 11, 21, 22], "chosen_ids": [40, 41], "rejected_ids": [42, 43]}
    (batch,) = pack([first, second])
    return batch


def trie_row() -> str:
    """Two dialogues: the trie of their tokens, a run of attention a line, and the row in which it is packed."""
    batch, drawing, step = dialogue_batch(), Drawing(760, 400), 46
    segments, ids = batch.segments, batch.input_ids.tolist()
    bounds, parents, depths = segments.cu_seqlens_q.tolist(), segments.parents.tolist(), segments.depths.tolist()
    of_row = segments.by_row(torch.arange(segments.num_segments)).tolist()
    last_rows = [batch.logit_rows[stop - 1].item() for stop in batch.cu_targets[1:]]
    ends = segments.by_row(segments.ends).tolist()
    users = [[s for s, last in enumerate(last_rows) if row <= last < ends[row]] for row in range(len(ids))]
    chosen = batch.pairs[:, 0].tolist()
    colours = [PROMPT if len(own) > 1 else CHOSEN if own[0] in chosen else REJECTED for own in users]
    run_of = segments.runs.of_rows(torch.tensor(bounds[:-1])).tolist()

    drawing.text(16, 26, "What the sequences begin with alike is there once", weight="bold")
    left, top = 60, 44
    for g, parent in enumerate(parents):
        x, y = left + depths[g] * step, top + run_of[g] * 40
        if parent >= 0 and run_of[g] != run_of[parent]:  # a fork
            drawing.line((x - step + 22, top + run_of[parent] * 40 + 30), (x - step + 22, y + 15), (x - 2, y + 15))
        for row in range(bounds[g], bounds[g + 1]):
            drawing.box(x + (row - bounds[g]) * step, y, 44, 30, colours[row], str(ids[row]))
    for run, y in enumerate(range(top, top + 40 * (max(run_of) + 1), 40)):
        drawing.text(left - 12, y + 20, f"run {run}", size=12, anchor="end")
    for column, (name, fill) in enumerate(
        (("of several sequences", PROMPT), ("chosen only", CHOSEN), ("rejected only", REJECTED))
    ):
        drawing.box(470, 44 + column * 26, 18, 18, fill)
        drawing.text(496, 58 + column * 26, name)
    y = top + 40 * (max(run_of) + 1) + 40
    unshared = sum((batch.lengths() - 1).tolist())
    drawing.text(16, y, f"Packed: {len(ids)} positions; each sequence by itself: {unshared}", weight="bold")
    _row(drawing, y + 12, "input_ids", ids, colours)
    _row(drawing, y + 46, "position_ids", batch.position_ids.tolist(), colours)
    _row(drawing, y + 80, "segment", of_row, [GREY] * len(ids))
    _row(drawing, y + 114, "its parent", ["–" if parents[g] < 0 else parents[g] for g in of_row], [GREY] * len(ids))
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
    "trie_row": trie_row,
    "attention_mask": attention_mask,
    "head_engine": head_engine,
    "training_step": training_step,
    "layers": layers,
}
