"""State of callbacks in a checkpoint's trainer_state.json: stored as Trainer does, restored in known fields only."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from transformers.trainer_callback import ExportableState

from dpofast.checkpointing.folder import STATE, DamagedCheckpoint


def callback_states(callbacks: Iterable[Any]) -> dict[str, Any]:
    """Returns what stateful_callbacks stores: the states of each kind, a list where there are several of one."""
    states = defaultdict(list)
    for callback in callbacks:
        if isinstance(callback, ExportableState):
            states[type(callback).__name__].append(callback.state())
    return {name: found if found[1:] else found[0] for name, found in states.items()}


def restore_callback_states(callbacks: Iterable[Any], states: Mapping[str, Any], folder: Any) -> None:
    """Set the attributes that a callback's own state() has; its arguments stay, and it gets no others.

    Args:
        callbacks: of this run.
        states: what callback_states returned.
        folder: the checkpoint, for messages.

    Raises:
        DamagedCheckpoint: a value is of another type than the attribute.
    """
    found = defaultdict(list)
    for callback in callbacks:
        found[type(callback).__name__].append(callback)
    for kind, stored in states.items():
        for callback, state in zip(found[kind], stored if isinstance(stored, list) else [stored], strict=False):
            attributes = state.get("attributes") if isinstance(state, dict) else None
            if not isinstance(attributes, dict):
                raise DamagedCheckpoint(f"{folder}: its {STATE} has no object with attributes of {kind}")
            _restore(callback, attributes, folder)


def _restore(callback: Any, attributes: Mapping[str, Any], folder: Any) -> None:
    known = callback.state()["attributes"] if isinstance(callback, ExportableState) else {}
    kind = type(callback).__name__
    if others := sorted(attributes.keys() - known.keys()):
        warnings.warn(
            f"{folder}: its {STATE} has values of {kind} that are no state of it, and are left out: {others}",
            stacklevel=3,
        )
    for name, now in known.items():
        if name not in attributes:
            continue
        value = attributes[name]
        if None not in (now, value) and _type(now) is not _type(value):
            raise DamagedCheckpoint(
                f"{folder}: its {STATE} has {value!r} as {name} of {kind}, and {type(now).__name__} was expected"
            )
        setattr(callback, name, value)


def _type(value: Any) -> type:
    """float for any number, which JSON does not tell apart; list for a tuple, which it does not have."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float
    return list if isinstance(value, tuple) else type(value)
