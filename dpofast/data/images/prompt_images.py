"""PromptImages: the token ids and pixels that a model's processor makes of a prompt with images."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from dpofast.data.formats import BadRow
from dpofast.data.images.columns import IMAGE_KEYS, IMAGE_TOKENS, IMAGES
from dpofast.data.images.decode import opened


class ModelInputs(Protocol):
    """What vision_inputs(model) returns."""

    @property
    def config(self) -> Any:
        """The composite model's."""

    @property
    def token_id(self) -> int:
        """Of a placeholder."""

    def of_prompt(self, prompt_ids: Any, processed: Mapping[str, Any], name: str = "prompt") -> Any:
        """The media of one prompt: a PromptMedia, or None without images."""


class PromptImages:
    """Makes token ids and pixels of prompts with images. It pickles, for loader processes.

    DPOTrainer makes its own; tokenize_preferences, preview_preferences and score_rows are given one.

    Args:
        processor: the model's (AutoProcessor).
        inputs: vision_inputs(model).

    Attributes:
        tokenizer: the processor's, with the processor's chat template.
        token: the text that the processor replaces by an image's placeholders.
    """

    def __init__(self, processor: ProcessorMixin, inputs: ModelInputs) -> None:
        """Look up which tokens stand for images."""
        if not isinstance(processor, ProcessorMixin):
            raise ValueError(
                f"processor: expected a transformers processor (AutoProcessor), got {type(processor).__name__}"
            )
        self.processor, self.inputs = processor, inputs
        self.tokenizer: PreTrainedTokenizerBase = with_template(processor)
        self.token = str(getattr(processor, "boi_token", None) or processor.image_token)  # the former of Gemma 3
        self._token_id = self.tokenizer.convert_tokens_to_ids(self.token)
        self._video_id = getattr(inputs.config, "video_token_id", None)
        self._reserved = {self._token_id, inputs.token_id, self._video_id} - {None}

    def __getstate__(self) -> dict[str, Any]:
        """What it was made from; the rest follows."""
        return {"processor": self.processor, "inputs": self.inputs}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make it again."""
        PromptImages.__init__(self, **state)

    def count(self, ids: Sequence[int]) -> int:
        """How many tokens of images, or videos, there are among token ids."""
        return sum(token in self._reserved for token in ids)

    def check_count(self, ids: Sequence[int], images: Sequence[Any]) -> None:
        """Raise BadRow unless a prompt, not yet expanded, has one image token for each image and none of videos."""
        found, others = list(ids).count(self._token_id), self.count(ids)
        if found != len(images) or others != found:
            raise BadRow(
                "another number of images than of image tokens",
                f"{len(images)} images for {others} tokens such as {self.token} in the prompt: a template or text "
                "writes one for each image, and words must not contain it",
            )

    def encode(self, text: str, images: Sequence[Any], *, special_tokens: bool = False) -> tuple[list[int], Any]:
        """Token ids of a prompt, with an image's placeholders where the text has its token, and its PromptMedia.

        Args:
            text: with `token` once for each image.
            images: in the order of the text, in any form that decode.opened takes; 1 or more.
            special_tokens: whether the tokenizer adds BOS and the like; a template has written them.

        Raises:
            BadRow: an image that cannot be read, or what the processor or the model refuses.
        """
        processed = self._processed(text, images, special_tokens=special_tokens)
        ids = processed["input_ids"][0].tolist()
        return ids, self._media(ids, processed)

    def of_ids(self, prompt_ids: Sequence[int], images: Sequence[Any]) -> Any:
        """The PromptMedia of a prompt that has its placeholders already, or None without images.

        Raises:
            BadRow: as encode; another number of placeholders than the images have, or one of a video.
        """
        if not images:
            if self.count(prompt_ids):
                raise BadRow(
                    "image tokens without images",
                    f"the prompt has {self.count(prompt_ids)}: give their images in column `images`, or take them out",
                )
            return None
        if self._video_id in prompt_ids:
            raise BadRow("videos are not supported", f"the prompt has a video's token ({self._video_id})")
        return self._media(prompt_ids, self._processed(self.token * len(images), images, special_tokens=False))

    def media(self, row: Mapping[str, Any]) -> Any:
        """The PromptMedia of a row of a token-level dataset, or None where it has no images.

        Raises:
            ValueError: an image that can no longer be read, or is another one than when the row was tokenized.
        """
        images = row.get(IMAGES)
        if images is None or not len(images):
            return None
        where = f"row {row['row']} of the data" if row.get("row") is not None else "a row"
        try:
            _, media = self.encode(self.token * len(images), images)
        except BadRow as problem:
            raise ValueError(f"{where}: {problem}") from problem
        keys, tokens = [image.key for image in media.images], [image.num_tokens for image in media.images]
        if keys != [bytes(key) for key in row[IMAGE_KEYS]] or tokens != list(row[IMAGE_TOKENS]):
            files = ", ".join(str(image["path"]) for image in images if image.get("path"))
            raise ValueError(
                f"{where}: its images{f' ({files})' if files else ''} are others than when it was tokenized: leave "
                "image files as they are during a run, and start it anew where they have changed"
            )
        return media

    def _processed(self, text: str, images: Sequence[Any], *, special_tokens: bool) -> Mapping[str, Any]:
        pictures = [opened(image) for image in images]
        try:
            return self.processor(
                text=[text], images=[pictures], add_special_tokens=special_tokens, return_tensors="pt"
            )
        # processors raise what their steps meet: ValueError, ZeroDivisionError, IndexError ...
        except Exception as error:
            sizes = ", ".join(f"{picture.width} x {picture.height}" for picture in pictures)
            detail = f"images of {sizes} pixels: {' '.join(str(error).split())[:300] or type(error).__name__}"
            raise BadRow("the processor refused the images", detail) from error

    def _media(self, ids: Sequence[int], processed: Mapping[str, Any]) -> Any:
        try:
            return self.inputs.of_prompt(ids, processed)
        except ValueError as error:
            kind = getattr(self.inputs.config, "model_type", None)
            whose = f"the processor is a {type(self.processor).__name__}, the model's type {kind}"
            raise BadRow("images and placeholders do not fit", f"{error}; {whose}") from error


def with_template(processor: Any) -> Any:
    """The processor's tokenizer with the processor's chat template, where it has one."""
    tokenizer, template = processor.tokenizer, getattr(processor, "chat_template", None)
    if template is None or template == tokenizer.chat_template:
        return tokenizer
    own = copy.copy(tokenizer)
    own.chat_template = template
    return own
