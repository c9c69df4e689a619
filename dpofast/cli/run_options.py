"""run.yaml: the options of a run, written into its output folder, with which --resume goes on."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from dpofast.cli.arguments import read_yaml
from dpofast.cli.load_models import is_adapter
from dpofast.common.atomic_files import put

RUN_FILE = "run.yaml"
# Access tokens are secrets; the folder is where the file lies; the others are of one call.
_LEFT_OUT = ("hub_token", "push_to_hub_token", "output_dir", "resume", "resume_from_checkpoint", "config")
_PATHS = ("model", "ref_model", "data", "eval_data", "ref_cache_dir")


def write_options(folder: Path, given: Mapping[str, Any]) -> None:
    """Write the options that were given, by flags or a YAML file, as a file for --config.

    Paths are made absolute, so that the run goes on from any folder.
    """
    import yaml

    options = {name: value for name, value in given.items() if name not in _LEFT_OUT}
    for name in _PATHS:
        if isinstance(options.get(name), str) and Path(options[name]).exists():
            options[name] = os.path.abspath(options[name])
    text = yaml.safe_dump(options, sort_keys=False, allow_unicode=True)
    aside = folder / f".tmp-{RUN_FILE}"
    aside.write_text(f"# The options of this run. dpofast train --resume FOLDER goes on with them.\n{text}", "utf-8")
    put(aside, folder / RUN_FILE)


class RunOptions(TrainerCallback):
    """Writes a run's options when training begins: a checkpoint that is refused leaves those of its run alone."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        """Options by name, as given by flags or a YAML file."""
        self.given = given

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write them, on the main process."""
        if state.is_world_process_zero:
            write_options(Path(args.output_dir), self.given)


def with_run_options(argv: Sequence[str]) -> list[str]:
    """Returns the flags with --resume replaced by the options of the run that it names, and its checkpoint.

    --resume takes a run's output folder, one of its checkpoints, or latest for the newest of --output_dir. Further
    flags win over the run's.

    Raises:
        ValueError: no folder with a run.yaml, or --config or --resume_from_checkpoint beside it.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    early.add_argument("--resume")
    resume, rest = early.parse_known_args(list(argv))
    if not hasattr(resume, "resume"):
        return list(argv)
    early.add_argument("--output_dir", "--output-dir")
    for name in ("config", "resume_from_checkpoint"):
        early.add_argument(f"--{name}", f"--{name.replace('_', '-')}")
    beside = vars(early.parse_known_args(rest)[0])
    for name in ("config", "resume_from_checkpoint"):
        if name in beside:
            raise ValueError(f"resume: takes the options of the run itself: leave --{name} out, or --resume")
    checkpoint = resume.resume
    if checkpoint.lower() == "latest":
        if "output_dir" not in beside:
            raise ValueError("resume: latest is the newest checkpoint of --output_dir, which is missing: name it")
        folder = Path(beside["output_dir"])
    else:
        named = Path(checkpoint)
        folder = named if (named / RUN_FILE).is_file() else named.absolute().parent
        checkpoint = "latest" if folder is named else checkpoint
        if "output_dir" in beside and not _same(beside["output_dir"], folder):
            raise ValueError(f"resume: {named} is of another run than --output_dir {beside['output_dir']}")
    if not (folder / RUN_FILE).is_file():
        raise ValueError(
            f"resume: {folder} has no {RUN_FILE}, the options of a run: name a run's output folder or a checkpoint in "
            "it; a run without one is gone on with by its own flags and --resume_from_checkpoint"
        )
    to = [] if "output_dir" in beside else ["--output_dir", str(folder)]
    return ["--config", str(folder / RUN_FILE), *rest, *to, "--resume_from_checkpoint", checkpoint]


def first_adapter(folder: str) -> str | None:
    """Returns the adapter that a run trained on, by the run.yaml beside the adapter that it wrote; None: a new one."""
    path = Path(folder, RUN_FILE)
    if not (path.is_file() and is_adapter(folder)):
        return None
    options = read_yaml(str(path))  # the folder may come from anyone
    if not isinstance(options, dict) or "model" not in options:
        raise ValueError(f"{path}: cannot be read as the options of a run: it names no model")
    model = options["model"]
    return model if isinstance(model, str) and is_adapter(model) else None


def resume_command(folder: Path) -> str:
    """Returns the command that goes on with the run of a folder, quoted for a shell."""
    return f"dpofast train --resume {shlex.quote(str(folder))}"


def _same(one: str | Path, other: str | Path) -> bool:
    return Path(one).resolve() == Path(other).resolve()
