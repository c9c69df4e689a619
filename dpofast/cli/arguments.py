"""Flags and YAML files to dataclasses, for the commands: what cannot be meant is refused, and said how to write."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser


def parse(classes: tuple[Any, ...], argv: Sequence[str], *, prog: str, description: str) -> tuple[Any, ...]:
    """One object of each dataclass, from flags, or from --config file.yaml with flags on top of it.

    Raises:
        ValueError: an unknown, missing or repeated flag, a value of the wrong type, a file that is not such a mapping.
    """
    # Unabbreviated: the file is looked for by its whole name, so a shortened --config would be taken and not read.
    parser = _Parser(classes, prog=prog, description=description, allow_abbrev=False)
    parser.add_argument("--config", help="A YAML file of the same names; flags win over it.")
    given = list(argv)
    parser.refuse_repeated(given)
    early = _Parser(prog=prog, add_help=False, allow_abbrev=False)
    early.add_argument("--config")
    path = early.parse_known_args(given)[0].config
    flags = [*_yaml_flags(path), *given] if path else given
    *parsed, unknown = parser.parse_args_into_dataclasses(
        args=flags, look_for_args_file=False, return_remaining_strings=True
    )
    if unknown:
        place = f" (from {path})" if path and unknown[0] not in given else ""
        parser.error(f"unknown: {' '.join(unknown)}{place}")
    return tuple(parsed[: len(classes)])


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:  # argparse would print some hundred flags in front of it
        raise ValueError(f"{message}; `{self.prog} --help` lists every option")

    def refuse_repeated(self, argv: Sequence[str]) -> None:
        """argparse keeps the last of two equal flags, in silence."""
        seen: dict[str, str] = {}
        for word in argv:
            action = self._option_string_actions.get(word.split("=", 1)[0])
            if action is None:
                continue
            if action.dest in seen:
                several = action.nargs == "+"
                way = f"give all values to one: {word} A B" if several else "leave one of them out"
                raise ValueError(f"{word}: given twice (first as {seen[action.dest]}), and only one can hold: {way}")
            seen[action.dest] = word


def _yaml_flags(path: str) -> list[str]:
    """The file's mapping as command-line flags, so that file and flags pass through one parser."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            names = [key.value for key, _ in node.value]
            for name in names:
                if names.count(name) > 1:  # yaml keeps the last, in silence
                    raise ValueError(f"config: {path}: {name} stands there twice, and only one can hold")
            return super().construct_mapping(node, deep)

    try:
        options = yaml.load(Path(path).read_text(encoding="utf-8"), Loader)  # a SafeLoader
    except OSError as error:
        raise ValueError(f"config: {path}: cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"config: {path}: not a YAML file: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"config: {path}: expected a mapping of option names to values, got {type(options).__name__}")
    flags = []
    for name, value in options.items():
        if value is False and name.endswith("_strategy"):
            value = "no"  # what YAML makes of an unquoted no
        if isinstance(value, dict):
            value = json.dumps(value)
        if value is not None:
            values = value if isinstance(value, list) else [value]
            flags += [f"--{name}", *map(str, values)]
    return flags


def quiet(interactive: bool) -> None:
    """Leave standard error to what a user can do something about.

    Libraries tell each other's authors of coming changes there; and where nobody sees their bars move, in a log file,
    each of them is a line of rubbish.
    """
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")
    if interactive:
        return
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()
