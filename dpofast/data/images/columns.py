"""The columns in which images of prompts stand.

Of a row, `images` (a list) or `image` (one): PIL images, paths, bytes, or what datasets' Image feature stores. Of a
token-level dataset, the images as they are encoded, and what the processor makes of them without their pixels.
"""

from __future__ import annotations

from collections.abc import Collection

from datasets import List, Value

ROW_IMAGES = ("images", "image")
# Of a token-level dataset. The last three have a value for each image that the vision tower sees by itself (of some
# models a tile of one): a hash of its pixels (16 bytes), how many placeholders it has, and their token id.
IMAGES, IMAGE_KEYS, IMAGE_TOKENS, IMAGE_TOKEN_ID = "images", "image_keys", "image_tokens", "image_token_id"
OF_IMAGES = (IMAGE_KEYS, IMAGE_TOKENS, IMAGE_TOKEN_ID)

# How images are stored in a column IMAGES: encoded (PNG, JPEG ...), or where the file is.
STORED = List({"bytes": Value("binary"), "path": Value("string")})
FEATURES = {
    IMAGE_KEYS: List(Value("binary")),
    IMAGE_TOKENS: List(Value("int32")),
    IMAGE_TOKEN_ID: Value("int32"),
}


def has_images(columns: Collection[str] | None) -> bool:
    """Whether a token-level dataset with these columns has images."""
    return IMAGE_KEYS in (columns or ())
