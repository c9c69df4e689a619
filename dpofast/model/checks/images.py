"""Whether a composite model may see images: its family is known, and the parity check passes with one.

A model that may not is attached for text all the same, and refuses batches with images by the reason that is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dpofast.model.parts import base_causal_lm, is_composite, whole_backbone
from dpofast.model.vision.example import example_with_image
from dpofast.model.vision.families import family_of, image_token_id
from dpofast.packing.media import BatchMedia

# Where models with multimodal positions keep the offsets of their last call, which a call by inputs_embeds alone reads.
_LAST_OFFSETS = "rope_deltas"
_REFUSAL = "_dpofast_images_refused"  # an attribute of the model: the reason; None where images are right


def admit_images(model: Any, padded: bool, check: Callable[[list[dict[str, Any]]], None]) -> None:
    """Try a composite model with a small random image, and keep the reason where it fails.

    Args:
        model: an attached model.
        padded: whether it runs over padded rows.
        check: compares the log-probs of these examples with the model's own.
    """
    name, family = type(model).__name__, family_of(model.config) if is_composite(model) else None
    vars(model)[_REFUSAL] = None
    if family is None:
        reason: str | None = f"{name}: images of {model.config.model_type} models are not supported, only text"
    elif family.inside is not None and not padded:
        reason = (
            f"{name}: packed rows with images are not supported, as {family.inside}; padded rows are: "
            "attach_logprob_head(model, padded=True), DPOConfig(padded=True), or --padded true"
        )
    else:
        reason = None
        inner = whole_backbone(model)
        kept = getattr(inner, _LAST_OFFSETS, None)
        try:
            check([example_with_image(model)])
        except Exception as error:  # of any kind: configs of these families differ, and text may still be right
            text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            reason = f"{name}: the check with a small random image has failed: {text}"
        if hasattr(inner, _LAST_OFFSETS):
            setattr(inner, _LAST_OFFSETS, kept)
    vars(model)[_REFUSAL] = reason


def forget_images(model: Any) -> None:
    """Undo admit_images."""
    vars(model).pop(_REFUSAL, None)


def images_refused(model: Any) -> str | None:
    """Why an attached model takes no images, by name; None where it does."""
    reason: str | None = vars(base_causal_lm(model)).get(_REFUSAL)
    return reason


def check_images(model: Any, media: BatchMedia) -> None:
    """Check that an attached model takes these images.

    Raises:
        ValueError: it takes none, or the placeholders are not its own.
    """
    reason = images_refused(model)
    if reason is not None:
        raise ValueError(reason)
    expected = image_token_id(model.config)
    if media.token_id != expected:
        raise ValueError(
            f"packed: expected media with {expected} as the id of {type(model).__name__}'s image placeholders, got "
            f"{media.token_id}: make them by vision_inputs(model)"
        )
