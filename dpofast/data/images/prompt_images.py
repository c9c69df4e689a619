"""PromptImages: the token ids and pixels that a model's processor makes of a prompt with images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from transformers import ProcessorMixin

from dpofast.data.formats import BadRow
from dpofast.data.images.columns import IMAGE_KEYS, IMAGE_TOKENS, IMAGES
from dpofast.data.images.decode import opened


class ModelInputs(Protocol):
    """What vision_inputs(model) returns."""

    token_id: int

    def of_prompt(self, prompt_ids: Any, processed: Mapping[str, Any], name: str = "prompt") -> Any:
        """The media of one prompt, a PromptMedia."""


class PromptImages:
    """Makes token ids and pixels of prompts with images. It pickles, for loader processes.

    Args:
        processor: the model's (AutoProcessor).
        inputs: vision_inputs(model).
    """

    def __init__(self, processor: ProcessorMixin, inputs: ModelInputs) -> None:
        """Keep both."""
        self.processor, self.inputs = processor, inputs

    @property
    def tokenizer(self) -> Any:
        """The processor's."""
        return self.processor.tokenizer

    def encode(self, text: str, images: Sequence[Any]) -> tuple[list[int], Any]:
        """Token ids of a rendered prompt, with an image's placeholders where the text has one, and its PromptMedia.

        Args:
            text: with one image token of the processor for each image.
            images: in the order of the text, in any form that decode.opened takes; 1 or more.

        Raises:
            BadRow: an image that cannot be read, another number of images than image tokens, or what the processor
                or the model refuses.
        """
        pictures = [opened(image) for image in images]
        try:
            # the template has written special tokens
            processed = self.processor(text=[text], images=[pictures], add_special_tokens=False, return_tensors="pt")
            ids = processed["input_ids"][0].tolist()
            return ids, self.inputs.of_prompt(ids, processed)
        except Exception as error:  # processors raise anything
            raise BadRow("the processor refused the images", " ".join(str(error).split())[:300]) from error

    def media(self, row: Mapping[str, Any]) -> Any:
        """The PromptMedia of a row of a token-level dataset, or None where it has no images.

        Raises:
            ValueError: an image that can no longer be read, or is another one than when the row was tokenized.
        """
        images = row.get(IMAGES)
        if images is None or not len(images):
            return None
        where = f"row {row['row']}" if "row" in row else "a row"
        try:
            _, media = self.encode(self.placeholder * len(images), images)
        except BadRow as problem:
            raise ValueError(f"{where}: {problem}") from problem
        keys, tokens = [image.key for image in media.images], [image.num_tokens for image in media.images]
        if keys != [bytes(key) for key in row[IMAGE_KEYS]] or tokens != list(row[IMAGE_TOKENS]):
            raise ValueError(
                f"{where}: its images are others than when it was tokenized: leave image files as they are during a "
                "run, or tokenize again"
            )
        return media

    @property
    def placeholder(self) -> str:
        """The text that the processor replaces by an image's placeholders."""
        boi = getattr(self.processor, "boi_token", None)  # Gemma 3
        return str(boi or self.processor.image_token)
