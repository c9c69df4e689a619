"""Parse flags and YAML files into dataclasses; unknown, repeated and misspelled options are refused with advice."""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool


def parse(
    classes: tuple[Any, ...],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    help_groups: Mapping[str, Sequence[str]] | None = None,
    help_end: str = "",
) -> tuple[Any, ...]:
    """Returns one object of each dataclass, from flags, or from --config file.yaml with flags on top of it.

    Args:
        classes: dataclasses whose fields are the options.
        argv: the flags.
        prog: the command's name in messages.
        description: what --help begins with.
        help_groups: the options that --help shows, by the title of their group; --help_all then shows all. Default: all
            options in --help.
        help_end: what --help with groups ends with.

    Raises:
        ValueError: an unknown, missing or repeated flag, a value of the wrong type, a file that is not such a mapping.
    """
    # Unabbreviated: the file is looked for by its whole name, so a shortened --config would be taken and not read.
    parser = _Parser(classes, prog=prog, description=description, allow_abbrev=False)
    if help_groups is not None:
        parser.group_help(help_groups, help_end)
    parser.let_switches_stand_alone()
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


_SWITCHES = "An option without a value is a switch: --x turns it on, and --no_x turns off one that is on by default."


class _Parser(HfArgumentParser):
    _groups: Mapping[str, Sequence[str]] | None = None

    def group_help(self, groups: Mapping[str, Sequence[str]], end: str) -> None:
        """Let --help show these groups only, and --help_all everything."""
        self._groups, self._end = groups, end
        self.usage = f"{self.prog} --model MODEL --data DATA [options]"
        self.add_argument("--help_all", "--help-all", action=_HelpAll, help="Show every option and exit.")

    def let_switches_stand_alone(self) -> None:
        """--x is --x true for options whose default is neither, which HfArgumentParser wants a value for."""
        for action in self._actions:
            if action.type is string_to_bool and action.nargs is None:
                action.nargs, action.const = "?", True

    def format_help(self) -> str:
        """The groups of group_help(), or every option."""
        if self._groups is None:
            return self._format({"options": list(self._by_name())}, _SWITCHES)
        return self._format(self._groups, self._end)

    def format_all(self) -> str:
        """The groups of group_help(), then every other option."""
        groups = self._groups or {}
        grouped = {name for names in groups.values() for name in names}
        others = [name for name in self._by_name() if name not in grouped]
        return self._format({**groups, "other options": others}, _SWITCHES)

    def _by_name(self) -> dict[str, argparse.Action]:
        """The options by the names of their fields; of a switch --x, not the --no_x that turns it off."""
        first: dict[str, argparse.Action] = {}
        for action in self._actions:  # --no_x, of the same dest, comes after --x
            first.setdefault(action.dest, action)
        return first

    def _format(self, groups: Mapping[str, Sequence[str]], end: str) -> str:
        formatter = _GroupFormatter(prog=self.prog, max_help_position=36)
        usage = self.usage or f"{self.prog} [options]"
        formatter.add_usage(usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        by_name = self._by_name()
        for title, names in groups.items():
            formatter.start_section(title)
            formatter.add_arguments([by_name[name] for name in names])
            formatter.end_section()
        formatter.add_text(end)
        return formatter.format_help()

    def error(self, message: str) -> NoReturn:  # argparse would print some hundred flags in front of it
        flag = "--help" if self._groups is None else "--help_all"
        raise ValueError(f"{message}; `{self.prog} {flag}` lists every option")

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


class _HelpAll(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: Any, *_: Any) -> None:
        print(parser.format_all())
        parser.exit()


class _GroupFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """One spelling of an option, a short placeholder for its value, and its default where it has one."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if action.nargs == 0:
            return ", ".join(action.option_strings)
        if action.nargs == "?":  # a switch
            return action.option_strings[0]
        value = "N" if action.type is int else "X" if action.type is float else "TEXT"
        return f"{action.option_strings[0]} {value}{' ...' if action.nargs == '+' else ''}"

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.choices is not None:
            values = ", ".join(str(getattr(choice, "value", choice)) for choice in action.choices)
            default = getattr(action.default, "value", action.default)
            return f"{action.help} (one of: {values}" + (")" if default is None else f"; default: {default})")
        if action.default is None or action.nargs == 0:
            return action.help
        if isinstance(action.default, list):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)


def _yaml_flags(path: str) -> list[str]:
    """Returns the file's mapping as command-line flags, so that file and flags pass through one parser."""
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
    """Silence the FutureWarnings of libraries and, unless interactive, their progress bars.

    Users can do nothing about the former; the latter would fill a log file with lines.
    """
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")
    if interactive:
        return
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()
