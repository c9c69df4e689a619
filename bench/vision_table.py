"""Markdown made from the records of bench/vision.py, for README.md and docs/benchmarks.md (docs/generate.py)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.cases import RESULTS
from bench.markdown import GIB, Record, machine, records, rows
from bench.step_run import BASE

HEADER = (
    "model, pairs an image",
    "engine",
    "s a step",
    "of it the reference before training",
    "trl's time over it",
    "peak, GiB",
    "of trl's",
    "positions",
    "images seen",
)


def last_records(results: Path = RESULTS) -> list[Record]:
    """The last record of each profile, pairs an image and epochs."""
    last = {}
    for record in records("vision", results):
        figures = record["figures"]
        last[figures["profile"], figures["pairs_per_image"], figures["epochs"]] = record
    return list(last.values())


def vision_table(results: Path = RESULTS) -> str:
    """The last record of each case, one row an engine; or the sentence that there is none."""
    found = last_records(results)
    if not found:
        return "No run is recorded yet."
    tokens = found[0]["figures"]["mean_tokens"]
    where = sorted({f"{machine(record)}, {record['date'][:10]}" for record in found})
    differ = max(record["figures"]["loss_difference"] for record in found)
    caption = (
        f"Prompts of {tokens['prompt']:.0f} tokens, {tokens['image']} of them an image, responses of "
        f"{tokens['response']:.0f}, {found[0]['figures']['pairs_per_step']} pairs a step; {' and '.join(where)}; "
        f"losses differ by at most {differ:.0e}:"
    )
    body = [cells for record in found for cells in _rows(record["figures"])]
    commands = "\n".join(dict.fromkeys(record["command"] for record in found))
    return f"{caption}\n\n{rows(HEADER, body)}\n\n```\n{commands}\n```"


def _rows(figures: dict[str, Any]) -> list[Sequence[str]]:
    base = figures["engines"][BASE]
    case = f"V = {figures['vocab_size']:,}, {figures['pairs_per_image']}"
    case += f", {figures['epochs']} epochs" if figures["epochs"] > 1 else ""
    body = []
    for engine, row in figures["engines"].items():
        share = row["reference_s"] / figures["steps"]
        # the pass before training is a part of a step's work, as its time is
        counts = {
            name: count + row.get("reference_counts", {}).get(name, 0) / figures["steps"]
            for name, count in row["step_counts"].items()
        }
        body.append(
            (
                case,
                f"**{engine}**" if engine == "dpofast" else engine,
                f"{row['step_s']['median']:.2f}",
                f"{share:.2f}" if share else "-",
                f"{base['step_s']['median'] / row['step_s']['median']:.1f}x",
                f"{row['peak_bytes'] / GIB:.1f}",
                f"{row['peak_bytes'] / base['peak_bytes']:.0%}",
                f"{counts['positions']:,.0f}",
                f"{counts['images']:.1f}",
            )
        )
        case = ""
    return body


def vision_summary(results: Path = RESULTS) -> str:
    """One sentence over the last records: least and greatest saving of dpofast against trl."""
    page = "[Benchmarks](docs/benchmarks.md#a-step-on-images)"
    found = last_records(results)
    if not found:
        return f"Prompts with images: no comparison with TRL is recorded yet ({page})."
    engines = [record["figures"]["engines"] for record in found]
    times = [each[BASE]["step_s"]["median"] / each["dpofast"]["step_s"]["median"] for each in engines]
    memory = [each["dpofast"]["peak_bytes"] / each[BASE]["peak_bytes"] for each in engines]
    image = found[0]["figures"]["mean_tokens"]["image"]
    return (
        f"**Prompts with an image** of {image} tokens: a step of a small random Qwen3-VL was {min(times):.1f} to "
        f"{max(times):.1f} times faster than\nTRL 1.16's and took {min(memory):.0%} to {max(memory):.0%} of its "
        f"memory, by size of the vocabulary and pairs an image\n({page})."
    )
