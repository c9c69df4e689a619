"""Images in conversations: parts {"type": "image"} of the prompt's turns, put there where the data name no place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dpofast.data.formats import BadRow

# What an image part may not bring along: the images stand in their column.
_PAYLOADS = ("image", "url", "path", "base64", "image_url", "bytes")


def is_image(part: Any) -> bool:
    """Whether a part of a turn's content is an image."""
    return isinstance(part, Mapping) and part.get("type") == "image"


def with_image_parts(prompt: Sequence[Any], count: int, token: str | None) -> list[Any]:
    """Return the prompt's turns with a part for each of its images.

    Where neither a part nor a text names a place, images stand first in the first turn of role user, as TRL puts them.

    Args:
        prompt: turns.
        count: images of the row.
        token: the text that stands for an image, or None without a processor.

    Raises:
        BadRow: another number of parts than images, or a part that holds the image itself.
    """
    named = sum(1 for part in _parts(prompt) if is_image(part))
    for part in _parts(prompt):
        payload = next((key for key in _PAYLOADS if is_image(part) and part.get(key) is not None), None)
        if payload is not None:
            raise BadRow(
                "an image part holds the image itself",
                f'its key {payload!r}: put the image into column `images`, and {{"type": "image"}} where it stands',
            )
    if not named and count and not (token and any(token in text for text in _texts(prompt))):
        at = next((i for i, turn in enumerate(prompt) if turn["role"] == "user" and turn.get("content")), None)
        if at is None:
            raise BadRow(
                "no place for the images",
                f'{count} of them, and no turn of role user says anything: write {{"type": "image"}} where each stands',
            )
        said = prompt[at]["content"]
        said = [{"type": "text", "text": said}] if isinstance(said, str) else said
        content = [*({"type": "image"} for _ in range(count)), *said]
        return [*prompt[:at], {**prompt[at], "content": content}, *prompt[at + 1 :]]
    if named and named != count:
        raise BadRow(
            "another number of images than of image parts",
            f'{count} images for {named} parts {{"type": "image"}}: give each part its image in column `images`, in '
            "the order of the parts, or `image` where there is one",
        )
    return list(prompt)


def check_no_image(response: Sequence[Any], name: str) -> None:
    """Raise BadRow where a response has an image part."""
    if any(is_image(part) for part in _parts(response)):
        raise BadRow("images in responses are not supported", f"{name}: images stand in the prompt only")


def _parts(turns: Sequence[Any]) -> Iterator[Any]:
    for turn in turns:
        if isinstance(turn.get("content"), list):
            yield from turn["content"]


def _texts(turns: Sequence[Any]) -> Iterator[str]:
    for turn in turns:
        if isinstance(turn.get("content"), str):
            yield turn["content"]
    yield from (str(part["text"]) for part in _parts(turns) if isinstance(part, Mapping) and part.get("text"))
