"""opened: one image as it is given -> a PIL image in RGB."""

from __future__ import annotations

from typing import Any

from PIL import Image, ImageOps


def opened(image: Any) -> Image.Image:
    """Return an image in RGB, turned as its EXIF data say.

    Args:
        image: a PIL image, a path, encoded bytes, or {"bytes": ..., "path": ...} as datasets' Image feature stores one.

    Raises:
        BadRow: it is none of these, or cannot be read.
    """
    if isinstance(image, dict):
        image = image.get("bytes") or image["path"]
    if isinstance(image, bytes):
        import io

        image = io.BytesIO(image)
    picture = image if isinstance(image, Image.Image) else Image.open(image)
    return ImageOps.exif_transpose(picture).convert("RGB")
