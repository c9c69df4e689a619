"""List the files of dpofast that one training step calls, and count the changes of file and package between calls.

    python -m bench.walk
    python -m bench.walk --root ../other --packages packages.json     another checkout, with a flat dpofast/

DPOTrainer trains a tiny random Llama on random pairs: on the CPU, packed, the reference log-probs computed before
training. A profiler notes the file of every Python call between the end of one step and the end of the next, which is
one batch, one forward and backward, one optimizer step and one log. Printed are the files in the order of their first
call, and how often the next call is in another file, and in another package, than the one before it.
"""

import argparse
import contextlib
import importlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

from bench.cases import UNATTENDED, RandomProfile

ROOT = Path(__file__).resolve().parent.parent
PROFILE = RandomProfile(prompt_median=8, response_median=6, vocab_size=128, hidden_size=64, layers=2)
PAIRS_PER_STEP, STEPS = 4, 4
# The step that is followed starts where this one ends: everything is imported, and two more steps are to come.
LAST_WARM_UP = 1


@dataclass(frozen=True)
class Walk:
    """The Python calls of one step.

    Attributes:
        calls: for each Python call, in order, its file relative to dpofast/.
        packages: package of a module at the top of dpofast/, by its name; others belong to their first folder.
    """

    calls: list[str]
    packages: Mapping[str, str]

    def package(self, file: str) -> str:
        """The package that a file belongs to."""
        path = Path(file)
        return path.parts[0] if len(path.parts) > 1 else self.packages.get(path.stem, path.stem)

    @property
    def files(self) -> list[str]:
        """Each file once, in the order of the first calls."""
        return list(dict.fromkeys(self.calls))

    def switches(self) -> dict[str, int]:
        """How often a call is in another file, and in another package, than the call before it."""
        packages = map(self.package, self.calls)
        return {
            "files": sum(one != other for one, other in pairwise(self.calls)),
            "packages": sum(one != other for one, other in pairwise(packages)),
        }

    def text(self) -> str:
        """The files in order, and the counts."""
        switches, packages = self.switches(), {self.package(file) for file in self.files}
        return "\n".join(
            [
                *(f"{number:3} {file}" for number, file in enumerate(self.files, 1)),
                f"{len(self.files)} files of {len(packages)} packages in {len(self.calls)} calls; "
                f"the next call is in another file {switches['files']} times, "
                f"in another package {switches['packages']} times",
            ]
        )


class _NotAhead:
    """Stands for Ahead: each item is prepared when it is asked for, in the thread that is followed."""

    def __init__(self, items: Iterator[Any], prepare: Callable[[Any], Any]) -> None:
        self._prepared = map(prepare, items)

    def __next__(self) -> Any:
        return next(self._prepared)

    def __iter__(self) -> Any:
        return self

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Nothing to end."""


def calls_of_a_step(root: Path) -> list[str]:
    """Train with the dpofast of a checkout and return the files of one step's calls, relative to dpofast/.

    Raises:
        ValueError: dpofast was imported from another place before.
    """
    if str(root) not in sys.path[:1]:
        sys.path.insert(0, str(root))
    import dpofast

    package = root / "dpofast"
    if Path(dpofast.__file__).resolve().parent != package:
        raise ValueError(f"root: expected the checkout of {dpofast.__file__}, which is imported already, got {root}")
    from datasets import Dataset
    from transformers import AutoTokenizer, PrinterCallback, TrainerCallback

    from bench.random_pairs import build_random_pairs, write_model

    prefix = f"{package}/"
    calls: list[str] = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(prefix) and code.co_name != "<module>":
            calls.append(code.co_filename.removeprefix(prefix))

    class Follow(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            sys.setprofile(note if state.global_step == LAST_WARM_UP else None)

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as patched:
        with contextlib.suppress(ModuleNotFoundError):  # another checkout may pack where it trains
            micro_batches = importlib.import_module("dpofast.training.data.micro_batches")
            patched.enter_context(mock.patch.object(micro_batches, "Ahead", _NotAhead))
        write_model(Path(folder), PROFILE)
        trainer = dpofast.DPOTrainer(
            folder,
            args=dpofast.DPOConfig(
                output_dir=folder,
                per_device_train_batch_size=PAIRS_PER_STEP,
                max_steps=STEPS,
                logging_steps=1,
                precompute_ref_log_probs=True,
                **UNATTENDED,
            ),
            train_dataset=Dataset.from_list(build_random_pairs(PROFILE, PAIRS_PER_STEP * STEPS)),
            processing_class=AutoTokenizer.from_pretrained(folder),
            callbacks=[Follow()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return calls


def main(arguments: list[str] | None = None) -> int:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="a checkout, its extension built; default: this one")
    parser.add_argument("--packages", type=Path, help="JSON: the package of each module at the top of dpofast/")
    args = parser.parse_args(arguments)
    packages = json.loads(args.packages.read_text(encoding="utf-8")) if args.packages else {}
    print(Walk(calls_of_a_step(args.root.resolve()), packages).text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
