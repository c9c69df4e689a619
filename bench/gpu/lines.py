"""The lines of bench/results/gpu.jsonl: one for each piece of a part, written when it is measured.

A run that is cut leaves what it has measured. Every line says its run, part and piece, beside what every record has.
"""

import dataclasses
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.record import append, make_record

PACKAGES = ("torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy", "dpofast")
# The piece by which a part ends: its seconds, why it failed, and the clocks.
END = "end"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of bench.gpu, as it goes to the processes of its parts.

    Attributes:
        name: when it began; all its lines have it.
        command: how to get the figures again.
        gpu: the device (bench/gpu/machine.py).
        files: where its lines go.
    """

    name: str
    command: str
    gpu: dict[str, Any]
    files: tuple[str, ...]

    @staticmethod
    def from_json(text: str) -> "Run":
        """What json.dumps(dataclasses.asdict(run)) gave."""
        fields = json.loads(text)
        return Run(**{**fields, "files": tuple(fields["files"])})

    def to_json(self) -> str:
        """For from_json in another process."""
        return json.dumps(dataclasses.asdict(self))

    def write(self, part: str, piece: str, figures: Any) -> None:
        """Append one line to every file; one that cannot be written is said and left out."""
        whole = {"run": self.name, "gpu": self.gpu, "part": part, "piece": piece, "figures": finite(figures)}
        record = make_record("gpu", whole, command=self.command, packages=PACKAGES)
        for file in self.files:
            try:
                append(Path(file), record)
            except OSError as error:
                print(f"not recorded in {file}: {error}", file=sys.stderr, flush=True)


def finite(tree: Any) -> Any:
    """The tree with NaN and infinities as strings, because a record accepts finite numbers only."""
    if isinstance(tree, dict):
        return {key: finite(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [finite(value) for value in tree]
    return str(tree) if isinstance(tree, float) and not math.isfinite(tree) else tree


def last_run(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The parts of the last run among these records, and the pieces of each, in the order in which they were written.

    Args:
        records: lines of gpu.jsonl, oldest first.

    Returns:
        part -> piece -> figures; empty without records.
    """
    parts: dict[str, dict[str, Any]] = {}
    for record in records:
        line = record["figures"]
        if line["run"] == records[-1]["figures"]["run"]:
            parts.setdefault(line["part"], {})[line["piece"]] = line["figures"]
    return parts


def one_line(error: BaseException) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:1000]}" if lines else type(error).__name__
