"""opened: one image as it is given -> a PIL image in RGB, or why it cannot be used.

What is seen are the pixels that transformers' image processors see (convert_to_rgb): transparency is laid over white,
CMYK, palette and greyscale are converted by PIL. One thing differs: pixels of 16 bits are scaled to 8, where PIL's own
conversion cuts them off at 255, which leaves white.
"""

from __future__ import annotations

import io
import os
import re
import stat
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dpofast.data.formats import BadRow, excerpt, got

EXPECTED = 'expected a PIL image, a path, encoded bytes (PNG, JPEG ...) or {"bytes": ..., "path": ...}'
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_DATA_URI = re.compile("data:", re.IGNORECASE)
_BYTES = (bytes, bytearray, memoryview)
# Formats of which the first of several pictures is the whole one: photos of cameras that hold a preview, and layers.
_WHOLE_FIRST = ("MPO", "PSD")
# Formats that PIL opens in mode "I" though their pixels have 16 bits.
_16_BITS_AS_I = ("PNG", "PPM")
_LONG_NAME = 255  # characters of a file name on most systems


def opened(image: Any) -> Image.Image:
    """Return an image in RGB, turned as its EXIF data say. Files are closed.

    Args:
        image: a PIL image, a path, encoded bytes, or {"bytes": ..., "path": ...} as datasets' Image feature stores one,
            of which bytes that are not null are taken.

    Raises:
        BadRow: it is none of these, a file or bytes that cannot be read as an image, an animation, or larger than
            PIL.Image.MAX_IMAGE_PIXELS.
    """
    source = source_of(image)
    if isinstance(source, Image.Image):
        return _read(source, "a PIL image")
    if isinstance(source, bytes):
        if not source:
            raise BadRow("an image is empty", "its bytes are of length 0")
        return _decoded(io.BytesIO(source), f"{len(source)} bytes")
    _check_file(source)
    return _decoded(source, source)


def source_of(image: Any) -> Image.Image | bytes | str:
    """Return what an image is read from: itself, its bytes, or its path. Raises BadRow where it is none of these."""
    if isinstance(image, dict) and image and {*image} <= {"bytes", "path"}:
        encoded, path = image.get("bytes"), image.get("path")
        if encoded is None and path is None:
            raise BadRow("an image has neither bytes nor a path", f"both are null: {EXPECTED}")
        if encoded is not None and not isinstance(encoded, _BYTES):
            raise BadRow(
                "not an image", f'expected encoded bytes (not base64) or null in "bytes", got {_short(encoded)}'
            )
        image = path if encoded is None else encoded
        if encoded is None and not isinstance(path, (str, Path)):
            raise BadRow("not an image", f'expected a path in "path", got {_short(path)}')
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, _BYTES):
        return bytes(image)
    if not isinstance(image, (str, Path)):
        raise BadRow("not an image", f"{EXPECTED}, got {_short(image)}")
    path = str(image)
    if not path:
        raise BadRow(
            "an image's path is empty",
            "leave it out, or give null in place of the column's value where a row has no image",
        )
    if _DATA_URI.match(path):
        raise BadRow("an image is a data: URI", f"decode it and give the bytes: {excerpt(path, 0, 40)}")
    if _URL.match(path):
        raise BadRow("an image is a URL", f"download it first and give the file's path: {excerpt(path)}")
    return path


def is_relative(path: str) -> bool:
    """Whether a path is relative to a folder, rather than absolute, a URL or a data: URI."""
    return not (os.path.isabs(path) or _URL.match(path) or _DATA_URI.match(path))


def _short(value: Any) -> str:
    return " ".join(got(value).split())


def _check_file(path: str) -> None:
    """Raise BadRow unless a path is that of a regular file: reading a pipe or a device may never end."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:  # a path with a null byte
        reason = "an image file is missing" if isinstance(error, FileNotFoundError) else "an image file cannot be read"
        base64 = " (text that is no path, such as base64, is not read)" if len(path) > _LONG_NAME else ""
        raise BadRow(reason, f"{excerpt(path)}: {getattr(error, 'strerror', None) or error}{base64}") from None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, a device or a socket"
        raise BadRow("an image is not a regular file", f"{excerpt(path)} is {kind}")


def _decoded(source: str | io.BytesIO, name: str) -> Image.Image:
    try:
        with Image.open(source) as picture:
            return _read(picture, name)
    except BadRow:
        raise
    except UnidentifiedImageError:
        start = _start(source)
        if not start:
            raise BadRow("an image is empty", f"{name} has length 0") from None
        raise BadRow("not an image", f"{name}: PIL knows no format that begins with {start!r}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadRow("an image is too large", f"{name}: {error}") from None
    except Exception as error:  # PIL's readers raise anything
        if isinstance(error, OSError) and error.errno is not None:  # of the file, not of what is in it
            raise BadRow("an image file cannot be read", f"{name}: {error.strerror}") from None
        raise _damaged(name, error) from error


def _start(source: str | io.BytesIO) -> bytes:
    if isinstance(source, io.BytesIO):
        return source.getvalue()[:12]
    with open(source, "rb") as file:
        return file.read(12)


def _read(picture: Image.Image, name: str) -> Image.Image:
    """The pixels of a picture that PIL has opened."""
    width, height = picture.size
    if not width or not height:
        raise BadRow("an image has no pixels", f"{name} is of {width} x {height} pixels")
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        raise BadRow(
            "an image is too large",
            f"{name} is of {width} x {height} pixels, above PIL.Image.MAX_IMAGE_PIXELS ({Image.MAX_IMAGE_PIXELS}): "
            "scale it down",
        )
    try:
        if getattr(picture, "is_animated", False) and picture.format not in _WHOLE_FIRST:
            raise BadRow(
                "an image has several frames",
                f"{name} is a {picture.format} of {getattr(picture, 'n_frames', 'several')} frames: save the one that "
                "is meant as an image of its own",
            )
        picture.load()
        return _in_rgb(ImageOps.exif_transpose(picture), picture.format)
    except BadRow:
        raise
    except Exception as error:  # PIL's readers raise anything
        raise _damaged(name, error) from error


def _damaged(name: str, error: Exception) -> BadRow:
    return BadRow("an image is damaged", f"{name}: {' '.join(str(error).split())[:200] or type(error).__name__}")


def _in_rgb(picture: Image.Image, format_name: str | None) -> Image.Image:
    """A picture of any mode in RGB: transparency over white."""
    mode = picture.mode
    if mode.startswith("I;16") or (mode == "I" and format_name in _16_BITS_AS_I):
        pixels = np.asarray(picture).astype(np.uint16)
        return Image.fromarray((pixels >> 8).astype(np.uint8)).convert("RGB")
    if mode in ("I", "F"):
        raise BadRow(
            "an image has pixels of 32 bits", f"mode {mode!r} does not say which value is white: convert it to 8 bits"
        )
    if picture.has_transparency_data:
        over = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    return picture if mode == "RGB" else picture.convert("RGB")
