"""Parse flags and YAML files into dataclasses; unknown, repeated and misspelled options are refused with advice."""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from dpofast.common.names import did_you_mean

# Of a --config file.
_MOST_BYTES = 1 << 20
# Values, each counted as often as aliases repeat it. All options of a run are some hundred.
_MOST_VALUES = 10_000


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

    The last entry is a dict of the options that were given, by name, as plain values.

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
        parser.error(f"unknown: {' '.join(unknown)}{place}{parser.meant(unknown)}")
    return (*parsed[: len(classes)], parser.given(flags))


DATA_HELP = (
    "Preference pairs: a .jsonl, .json, .csv or .tsv file (or .gz of one), a .parquet file, a folder of such files or "
    "of save_to_disk, or a hub name (name:config). Images of prompts stand in a column images (or image): paths, or "
    "what datasets stores."
)
# Options of trl's scripts, and of earlier versions -> what they are here.
_ALSO_CALLED = {
    "model_name_or_path": "model",
    "dataset_name": "data",
    "dataset_train_split": "split",
    "dataset_test_split": "eval_split",
    "ref_model_name_or_path": "ref_model",
    "torch_dtype": "dtype",
    "use_peft": "lora_r",
    "epochs": "num_train_epochs",
    "lr": "learning_rate",
    "batch_size": "per_device_train_batch_size",
    "output": "output_dir",
    "no_share_prompts": "share",
}
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

    def given(self, flags: Sequence[str]) -> dict[str, Any]:
        """Returns the values of the options that these flags set, by name."""
        words = (self._option_string_actions.get(word.split("=", 1)[0]) for word in flags)
        values = vars(self.parse_known_args(list(flags))[0])
        return {action.dest: getattr(values[action.dest], "value", values[action.dest]) for action in words if action}

    def meant(self, unknown: Sequence[str]) -> str:
        """Returns "; did you mean --x?" for the first unknown flag that is near an option's name."""
        flags = [word.split("=", 1)[0].lstrip("-").replace("-", "_") for word in unknown if word.startswith("-")]
        known = [flag for flag in self._option_string_actions if "-" not in flag.lstrip("-")]
        names = [flag.lstrip("-") for flag in known]
        also_called = {theirs: ours for theirs, ours in _ALSO_CALLED.items() if ours in names}
        found = (did_you_mean(flag, names, also_called) for flag in flags)
        return next((text.replace("mean ", "mean --") for text in found if text), "")

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
    options = read_yaml(path)
    if not isinstance(options, dict):
        raise ValueError(f"config: {path}: expected a mapping of option names to values, got {type(options).__name__}")
    flags = []
    for name, value in options.items():
        if not isinstance(name, str):
            raise ValueError(f"config: {path}: expected option names, got {name!r}")
        if value is False and name.endswith("_strategy"):
            value = "no"  # what YAML makes of an unquoted no
        try:
            values = value if isinstance(value, list) else [value]
            words = [json.dumps(part) if isinstance(part, (dict, list)) else str(part) for part in values]
        except TypeError as error:  # a mapping with keys or values that JSON does not have
            raise ValueError(f"config: {path}: {name}: {error}") from error
        if value is not None:
            flags += [f"--{name}", *words]
    return flags


class _Loader(yaml.SafeLoader):
    path: str

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:  # yaml keeps the last, in silence
                raise ValueError(f"config: {self.path}: {name} stands there twice, and only one can hold")
        return super().construct_mapping(node, deep)


def read_yaml(path: str) -> Any:
    """Returns what the file holds.

    Raises:
        ValueError: no regular file, no YAML, too large (also by aliases that repeat each other), or a name that stands
            there twice.
    """
    try:
        if not Path(path).is_file() and Path(path).exists():  # a named pipe or a device may be read for ever
            raise ValueError(f"config: {path}: expected a file, and it is none")
        with open(path, "rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise ValueError(f"config: {path}: cannot be read: {error.strerror}") from error
    if len(content) > _MOST_BYTES:
        raise ValueError(f"config: {path}: expected at most {_MOST_BYTES:,} bytes, and it has more")
    try:
        loader = _Loader(content.decode())
        loader.path = path
        node = loader.get_single_node()
        _refuse_endless(node, path)
        return None if node is None else loader.construct_document(node)
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"config: {path}: not a YAML file: {error}") from error
    except RecursionError:
        raise ValueError(f"config: {path}: nested too deeply") from None


def _refuse_endless(node: Any, path: str) -> None:
    """Count values as a reader of the expanded text would, which for a few aliases of aliases are billions."""
    waiting, count = [node], 0
    while waiting:
        value = waiting.pop()
        parts = value.value if isinstance(value, yaml.CollectionNode) else []
        count += len(parts)
        if count > _MOST_VALUES:
            raise ValueError(f"config: {path}: expected at most {_MOST_VALUES:,} values, and aliases make it more")
        waiting += [part for pair in parts for part in pair] if isinstance(value, yaml.MappingNode) else parts


def quiet(interactive: bool) -> None:
    """Silence the FutureWarnings of libraries and, unless interactive, their progress bars.

    Users can do nothing about the former; the latter would fill a log file with lines.
    """
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")
    # The commands print the report of the data, which says the same.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"dpofast\.data\.")
    if interactive:
        return
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()
