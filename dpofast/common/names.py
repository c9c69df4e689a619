"""did_you_mean: the known name that a mistyped one is closest to, for messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping


def did_you_mean(name: str, known: Iterable[str], also_called: Mapping[str, str] | None = None) -> str:
    """Returns "; did you mean X?" for a misspelled name, or "" where no known name is near.

    Args:
        name: as it was given.
        known: the names that exist.
        also_called: what other libraries call it, in lower case -> what to use here.
    """
    other = (also_called or {}).get(name.lower())
    if other:
        return f"; did you mean {other}?"
    by_case = {each.lower(): each for each in known}
    near = difflib.get_close_matches(name.lower(), by_case, n=1, cutoff=0.7)
    return f"; did you mean {by_case[near[0]]}?" if near else ""
