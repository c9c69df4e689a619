"""Peak memory of a training run on 100 and on 100,000 pairs: reading, tokenizing, reference pass and a few steps.

    python -m bench.memory

Both runs are processes of their own, over files of random pairs that begin with the same rows, and take the same
first steps in the file's order: their losses must be equal before anything is recorded. Two peaks are given. Resident
memory (VmHWM) is what the kernel counts, with the pages of mapped files that it may take back at any time; anonymous
memory (RssAnon, sampled) is what a process cannot give back.
"""

import argparse
import json
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bench.cases import RESULTS, UNATTENDED, RandomProfile
from bench.random_pairs import build_random_pairs, write_model
from bench.record import command_line, write_record
from bench.timing import run_child

PROFILE = RandomProfile(prompt_median=100, response_median=80, vocab_size=512, hidden_size=64, layers=1)
# Above the peak with few pairs, in bytes.
ALLOWED = 300_000_000
FEW = 100
FORMS = ("text", "ids", "parquet")


def status() -> dict[str, int]:
    """This process's memory by the kernel's names, in bytes."""
    fields = (line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(text.split()[0]) * 1024 for name, text in fields if text.endswith("kB")}


class Peaks:
    """Peaks of this process's resident and anonymous memory inside `with`, in bytes."""

    def __enter__(self) -> "Peaks":
        """Begin to sample."""
        self.anonymous, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(0.01):
            self.anonymous = max(self.anonymous, status()["RssAnon"])

    def __exit__(self, *error: Any) -> None:
        """Stop."""
        self._stop.set()
        self._thread.join()
        self.resident = status()["VmHWM"]


def measure(folder: Path, data: Path, steps: int) -> dict[str, Any]:
    """Load, tokenize and train as `dpofast train` does. Returns peak memory, seconds of each phase and losses."""
    import torch
    from transformers import AutoTokenizer

    from dpofast import DPOConfig, DPOTrainer, load_preferences, tokenize_preferences

    torch.set_num_threads(1)
    seconds = {}
    with Peaks() as peaks:

        def timed(name: str, call: Any) -> Any:
            start = time.perf_counter()
            result = call()
            seconds[name] = time.perf_counter() - start
            return result

        args = DPOConfig(
            output_dir=str(folder / f"output-{data.stem}"),
            per_device_train_batch_size=8,
            max_steps=steps,
            train_sampling_strategy="sequential",
            logging_steps=1,
            **UNATTENDED,
        )
        tokenizer = AutoTokenizer.from_pretrained(folder / "model")
        dataset = timed("load", lambda: load_preferences(data, cache_dir=str(folder / "cache")))
        # The trainer finds the result in the cache.
        timed("tokens", lambda: tokenize_preferences(dataset, tokenizer, vocab_size=PROFILE.vocab_size))
        trainer = timed(
            "reference",
            lambda: DPOTrainer(str(folder / "model"), args=args, train_dataset=dataset, processing_class=tokenizer),
        )
        timed("train", trainer.train)
    logged = [(entry["loss"], entry["rewards/margins"]) for entry in trainer.state.log_history if "loss" in entry]
    return {
        "pairs": len(trainer.train_dataset),
        "file_bytes": data.stat().st_size,
        "resident_bytes": peaks.resident,
        "anonymous_bytes": peaks.anonymous,
        "seconds": seconds,
        "logged": logged,
    }


def write_pairs(path: Path, pairs: int, form: str) -> None:
    """The first so many random pairs, as FORMS says."""
    rows = build_random_pairs(PROFILE, pairs)
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)  # one row group
        return
    with path.open("w", encoding="utf-8") as stream:
        for row in rows:
            ids = {f"{name}_ids": [int(word[1:]) for word in text.split()] for name, text in row.items()}
            stream.write(json.dumps(ids if form == "ids" else row) + "\n")


def compare(pairs: int, form: str, steps: int) -> dict[str, Any]:
    """Run both processes and compare them.

    Raises:
        RuntimeError: they differ in a loss.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model", PROFILE)
        environment = {"HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1"}
        runs = {}
        for name, count in (("few", FEW), ("many", pairs)):
            path = folder / f"{name}.{'parquet' if form == 'parquet' else 'jsonl'}"
            write_pairs(path, count, form)
            arguments = ["--child", name, "--data", str(path), "--steps", str(steps)]
            runs[name] = run_child("bench.memory", arguments, environment)
    few, many = runs["few"], runs["many"]
    if few.pop("logged") != many.pop("logged"):
        raise RuntimeError("the same first steps gave other losses on the longer file, so no figure means anything")
    above = {kind: many[f"{kind}_bytes"] - few[f"{kind}_bytes"] for kind in ("resident", "anonymous")}
    return {"form": form, "steps": steps, "runs": runs, "above_bytes": above, "allowed_bytes": ALLOWED}


def report(figures: dict[str, Any]) -> str:
    """The figures as text."""
    lines = [f"{'pairs':>9} {'file MB':>8} {'resident MB':>12} {'anonymous MB':>13}  seconds"]
    for run in figures["runs"].values():
        seconds = ", ".join(f"{name} {value:.1f}" for name, value in run["seconds"].items())
        sizes = (run[f"{name}_bytes"] / 1e6 for name in ("file", "resident", "anonymous"))
        lines.append("{:9,} {:8.1f} {:12.1f} {:13.1f}  {}".format(run["pairs"], *sizes, seconds))
    above = figures["above_bytes"]
    lines.append(
        f"above the short file: {above['resident'] / 1e6:.1f} MB resident, {above['anonymous'] / 1e6:.1f} MB "
        f"anonymous; allowed {figures['allowed_bytes'] / 1e6:.0f} MB"
    )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Command line entry; 1 where the longer file took more than is allowed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument(
        "--form", choices=FORMS, default="text", help="JSON lines of text or token ids, or text as Parquet"
    )
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps of 8 pairs")
    parser.add_argument("--results", type=Path, default=RESULTS / "memory.jsonl", help="the record is appended to it")
    for name in ("--child", "--data", "--out"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.child:
        data = Path(args.data)
        Path(args.out).write_text(json.dumps(measure(data.parent, data, args.steps)))
        return 0
    if args.pairs < FEW or not 1 <= args.steps <= FEW // 8:
        parser.error(f"expected --pairs of at least {FEW}, and --steps of 1 to {FEW // 8}")
    figures = compare(args.pairs, args.form, args.steps)
    command = command_line("bench.memory", arguments)
    write_record(
        args.results, "memory", figures, command=command, packages=("torch", "transformers", "datasets", "pyarrow")
    )
    print(report(figures))
    return 1 if figures["above_bytes"]["resident"] > ALLOWED else 0


if __name__ == "__main__":
    sys.exit(main())
