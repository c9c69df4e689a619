"""Images of prompts: what a model's processor made of them, beside token ids that contain their placeholders."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ImageInput:
    """One image, or one tile where a processor cuts images into tiles that the vision tower sees one by one.

    Attributes:
        tensors: the image's part of each of the processor's tensors (pixel_values, image_grid_thw, ...), by name; along
            the first dimension those of several images are joined.
        num_tokens: its placeholders in the prompt, 1 or more.
        key: a hash of the tensors. Images with equal keys are equal.
    """

    tensors: Mapping[str, Tensor]
    num_tokens: int
    key: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Hash the tensors."""
        content = hashlib.blake2b(str(self.num_tokens).encode(), digest_size=16)
        for name, tensor in sorted(self.tensors.items()):
            content.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            content.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        object.__setattr__(self, "key", content.digest())


@dataclass(frozen=True, eq=False)
class PromptMedia:
    """The images of one prompt: the value of an example's `media`.

    Attributes:
        images: in the order of their placeholders.
        token_id: of a placeholder.
    """

    images: tuple[ImageInput, ...]
    token_id: int


@dataclass(frozen=True, eq=False)
class BatchMedia:
    """The images of a packed row of T positions, M of them distinct.

    Attributes:
        token_id: of a placeholder.
        inputs: the processor's tensors by name, those of the M images joined along the first dimension; padded with
            zeros where they differ in another.
        shapes: those of inputs that have integers, on the CPU.
        counts: by name, rows of each of the M images in inputs.
        num_tokens: (M) placeholders of each image.
        image_of_row: (T,) int64 on the CPU, the image whose placeholder a row has; −1 for other rows.
    """

    token_id: int
    inputs: Mapping[str, Tensor]
    shapes: Mapping[str, Tensor]
    counts: Mapping[str, tuple[int, ...]]
    num_tokens: tuple[int, ...]
    image_of_row: Tensor

    def images_in(self, rows: Tensor) -> list[int]:
        """The images in the order in which placeholders stand in these rows (n,), one entry an occurrence."""
        of_rows = self.image_of_row[rows]
        images, counts = of_rows[of_rows >= 0].unique_consecutive(return_counts=True)
        # equal images may follow on each other
        return [
            image
            for image, count in zip(images.tolist(), counts.tolist(), strict=True)
            for _ in range(count // self.num_tokens[image])
        ]

    def num_seen(self) -> int:
        """How many images the vision tower sees for the packed row: distinct ones, once for each place."""
        return len(self.images_in(torch.arange(len(self.image_of_row))))

    def inputs_of(self, images: Sequence[int]) -> dict[str, Tensor]:
        """The tensors of these images joined in this order."""
        return self._of(images, self.inputs)

    def shapes_of(self, images: Sequence[int]) -> dict[str, Tensor]:
        """Those of them that have integers, on the CPU."""
        return self._of(images, self.shapes)

    def _of(self, images: Sequence[int], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if list(images) == list(range(len(self.num_tokens))):
            return dict(tensors)
        taken = {}
        for name, tensor in tensors.items():
            parts = torch.arange(len(tensor)).split(list(self.counts[name]))
            index = torch.cat([parts[image] for image in images])
            taken[name] = tensor.index_select(0, index.to(tensor.device))
        return taken

    def at_rows(self, rows: Tensor) -> BatchMedia:
        """The same images in a batch made of these rows (n,) of this one."""
        return replace(self, image_of_row=self.image_of_row[rows.to(self.image_of_row.device)])

    def moved(self, move: Callable[[Tensor], Tensor]) -> BatchMedia:
        """A copy whose inputs are move(tensor)."""
        return replace(self, inputs={name: move(tensor) for name, tensor in self.inputs.items()})
