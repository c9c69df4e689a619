"""check_hub_name: tells a mistyped path from a name on the Hugging Face hub, before minutes of retries there."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path

_SECONDS = 5.0


def check_hub_name(name: str, *, kind: str = "model", cached: Callable[[str], bool] | None = None) -> None:
    """Return where a name that is no local path may be on the hub.

    A name is a path where it is written as one (absolute, from . or ~, of more than two parts) or where its first
    part is a folder here. Any other is looked for on the hub once: its own clients would try again for a minute.

    Args:
        name: of a file or folder that does not exist.
        kind: "model" or "dataset".
        cached: whether an earlier download of this name can be used without the hub; default: transformers' cache.

    Raises:
        ValueError: it is a path, or the hub cannot be reached; with the nearest path that exists.
    """
    near = nearest_path(name)
    meant = f"; did you mean {near}?" if near else ""
    first, *others = Path(name).parts or (name,)
    if name.startswith(("/", ".", "~")) or name.endswith("/") or len(others) > 1 or (others and Path(first).is_dir()):
        raise ValueError(f"{name}: no such file or folder{meant}")
    if (cached or _is_cached)(name):
        return
    reason = _unreachable(name, kind)
    if reason:
        raise ValueError(
            f"{name}: no such file or folder{meant}, and the hub cannot be reached to look there: {reason}"
        )


def nearest_path(name: str) -> str | None:
    """Returns the existing path whose parts are each equal or similar to the parts of a path that does not exist."""
    found = Path()
    for part in Path(name).expanduser().parts:
        if not (found / part).exists():
            try:
                siblings = [entry.name for entry in found.iterdir()]
            except OSError:
                return None
            near = difflib.get_close_matches(part, siblings, n=1, cutoff=0.7)
            if not near:
                return None
            part = near[0]
        found /= part
    return str(found)


def _is_cached(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "config.json"), str)


def _unreachable(name: str, kind: str) -> str | None:
    """Why the hub does not answer at all, or None where it does or is not to be asked (HF_HUB_OFFLINE)."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return None
    try:
        get_session().head(f"{constants.ENDPOINT}/api/{kind}s/{name}", timeout=_SECONDS)
    except Exception as error:  # of httpx, httpx2 or requests, by the release of huggingface_hub
        return " ".join(str(error).split()) or type(error).__name__
    return None
