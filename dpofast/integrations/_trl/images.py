"""Images of trl's padded rows: which arguments of the model describe them, and their division among the rows."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from dpofast.integrations._trl.rows import PaddedRows
from dpofast.model.attach import PackedForward
from dpofast.model.checks.images import images_refused
from dpofast.model.parts import base_causal_lm, is_composite
from dpofast.model.vision.families import family_of
from dpofast.model.vision.inputs import VisionInputs, vision_inputs

_PIXELS = "pixel_values"
# 1 for placeholders: a packed row knows where these are.
_TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
_ADVICE = "; padded rows are: "  # of a refusal, for other callers


def reader_of(model: Any) -> VisionInputs | None:
    """What divides a processor's output among rows for a fused model; None where it takes no packed images."""
    base = base_causal_lm(model)
    if not isinstance(base, PackedForward) or not is_composite(base) or refusal(base) is not None:
        return None
    return vision_inputs(base)


def refusal(model: Any) -> str | None:
    """Why the images of a packed composite model run padded; None where they are packed."""
    reason = images_refused(model)
    return None if reason is None else reason.removeprefix(f"{type(model).__name__}: ").partition(_ADVICE)[0]


def unpackable_arguments(model: Any, given: Collection[str]) -> str | None:
    """Why a model that can be packed cannot be with these arguments beside ids and mask; None where it can."""
    if not given:
        return None
    family = family_of(model.config) if is_composite(model) else None
    known: set[str] = set() if family is None else {*family.required, *family.optional, *_TOKEN_TYPES}
    if _PIXELS in given and is_composite(model) and images_refused(model) is not None:
        return refusal(model)
    if not set(given) <= known:
        what = ", ".join(sorted(set(given) - known))
        return f"it was given {what} (videos, sound, prompt-learning adapters)"
    return None


def with_images(model: Any, rows: PaddedRows, arguments: Mapping[str, Any]) -> PaddedRows:
    """The rows with their images, where the model was called with any and the collator has not read them.

    Tensors on a device are copied to the CPU, which waits for it.

    Raises:
        ValueError: a row whose placeholders are not those of whole images.
    """
    if rows.media is not None or not arguments.keys() & {_PIXELS, *_TOKEN_TYPES}:
        return rows
    try:
        return rows.with_media(vision_inputs(model), arguments)
    except ValueError as error:
        # the words that trl's trainer looks for, to say that max_length is too short
        raise ValueError(f"{type(model).__name__}: Image features and image tokens do not match: {error}") from error
