"""Checks of the packer's arguments and arrays: each returns what is read on, or raises a ValueError naming it."""

from __future__ import annotations

from typing import Any

import numpy as np

from dpofast import _C


def limit(name: str, value: int | None) -> int:
    """A bound of 1 or more as an integer; None is unlimited (_C.UNLIMITED).

    Raises:
        ValueError: another value.
    """
    return _C.UNLIMITED if value is None else at_least_one(name, value, "None or an integer")


def at_least_one(name: str, value: int, expected: str = "an integer") -> int:
    """An integer in [1, 2**63).

    Raises:
        ValueError: another value.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 1 <= value <= _C.UNLIMITED:
        raise ValueError(f"{name}: expected {expected} in [1, 2**63), got {value!r}")
    return int(value)


SHARED = ("prefix", "prompt", "none")


def sharing(share: str | None, share_prompts: bool | None) -> str:
    """One of SHARED from `pack`'s arguments share and share_prompts, its alias: True is "prompt", False "none".

    Raises:
        ValueError: another value, or two that say different things.
    """
    if share is not None and share not in SHARED:
        raise ValueError(f"share: expected {', '.join(SHARED[:-1])} or {SHARED[-1]}, got {share!r}")
    if share_prompts is None:
        return share or SHARED[0]
    if not isinstance(share_prompts, bool):
        raise ValueError(f"share_prompts: expected True or False, got {share_prompts!r}")
    meant = "prompt" if share_prompts else "none"
    if share not in (None, meant):
        raise ValueError(f"share_prompts: {share_prompts} means share={meant!r}, got share={share!r}: give one of them")
    return meant


def integers(value: Any, name: str, columns: int | None = None) -> np.ndarray:
    """A 1-D integer array, or a 2-D one where columns is given.

    Raises:
        ValueError: ragged lists, another shape or another dtype.
    """
    expected = f"{name}: expected integers, a 1-D array or list" + (f" of {columns} each" if columns else "")
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged lists, tensors on another device
        raise ValueError(f"{expected}; {error}") from error
    if array.size == 0 and array.ndim == 1:
        return np.empty(0, np.int64)  # np.asarray([]) is float64
    if array.ndim != (2 if columns else 1) or array.dtype.kind not in "iu" or (columns and array.shape[1] != columns):
        raise ValueError(f"{expected}, got shape {array.shape} of {array.dtype}")
    if array.dtype == np.uint64 and array.size and array.max() > _C.UNLIMITED:  # would wrap to a negative number
        raise ValueError(f"{expected}, below 2**63, got {array.max()}")
    return array


def numbers(value: Any, name: str) -> np.ndarray:
    """A 1-D array of numbers as float64; bools, a mask, are 0 and 1.

    Raises:
        ValueError: ragged lists, another shape or another dtype.
    """
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged lists, tensors on another device
        raise ValueError(f"{name}: expected numbers; {error}") from error
    if array.ndim != 1 or array.dtype.kind not in "iufb":
        raise ValueError(f"{name}: expected numbers, got shape {array.shape} of {array.dtype}")
    return array.astype(np.float64)
