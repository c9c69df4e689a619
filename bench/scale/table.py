"""The counts as text for a terminal, and as Markdown for docs/several_gpus.md (docs/generate.py)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.cases import RESULTS
from bench.markdown import Record, records, rows
from bench.scale.modes import MODES, PROFILES, alone

HELD = ("weights", "gathered", "gradients", "optimizer", "activations", "host")
HEADER = ("mode", "ranks", *HELD[:-1], "offloaded", "exchanged in a step", "checkpoint", "loss differs by")


def _kib(size: float) -> str:
    return f"{size / 1024:,.0f}"


def _cells(name: str, row: Mapping[str, Any], one: Mapping[str, Any]) -> tuple[str, ...]:
    """KiB of each kind, those of one process beside them as a factor where it has any."""
    cells = []
    for kind in HELD:
        size, whole = row["bytes"][kind], one["bytes"][kind]
        cells.append(_kib(size) + (f" ({size / whole:.2f}x)" if whole and row is not one else ""))
    sent = {kind: found for kind, found in row["exchanges"].items() if kind != "numbers"}
    exchanged = ", ".join(f"{found['calls']} {kind} {_kib(found['sent'])}" for kind, found in sent.items())
    return (
        MODES[name].title,
        str(row["ranks"]),
        *cells,
        exchanged or "-",
        _kib(row["checkpoint_bytes"]["all"]),
        f"{row['loss_difference']:.0e}" if row["loss_difference"] else "0",
    )


def _body(figures: Mapping[str, Any]) -> list[tuple[str, ...]]:
    modes = figures["modes"]
    return [_cells(name, row, modes[alone(MODES[name])]) for name, row in modes.items()]


def text(figures: Mapping[str, Any]) -> str:
    """One line a mode, in KiB a rank."""
    body = [HEADER, *_body(figures)]
    widths = [max(len(row[column]) for row in body) for column in range(len(HEADER))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in body]
    return "\n".join([f"{PROFILES[figures['profile']].title}; KiB of the rank that has most", *lines])


def last_records(results: Path = RESULTS) -> list[Record]:
    """The last record of each profile."""
    return list({record["figures"]["profile"]: record for record in records("scale", results)}.values())


def scale_table(results: Path = RESULTS) -> str:
    """The last record of each profile, one row a mode; or the sentence that there is none."""
    found = last_records(results)
    if not found:
        return "No run is recorded yet."
    parts = []
    for record in found:
        profile, model = PROFILES[record["figures"]["profile"]], record["figures"]["model"]
        caption = (
            f"{profile.title[0].upper()}{profile.title[1:]} a step, {model['num_hidden_layers']} layers of "
            f"{model['hidden_size']}, vocabulary {model['vocab_size']}, float32; KiB of the rank that has most, and "
            f"the factor to one process's ({record['date'][:10]}, `{record['command']}`):"
        )
        parts.append(f"{caption}\n\n{rows(HEADER, _body(record['figures']))}")
    return "\n\n".join(parts)
