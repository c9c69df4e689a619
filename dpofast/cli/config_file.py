"""Read a --config file: YAML of a bounded size, without repeated names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

_MOST_BYTES = 1 << 20
# Values, each counted as often as aliases repeat it. All options of a run are some hundred.
_MOST_VALUES = 10_000


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
