"""NEFTune (arXiv 2310.05914): uniform noise on the input embeddings in training, within ±alpha/√(L·D) for each token.

L counts the tokens of the token's own sequence, prompt and response. transformers' hook takes the width of the call's
rows instead, which is a micro-batch's for packed rows. Here forward.py says for each call how long the sequences are,
and a forward hook on the input embedding adds the noise; other calls of the model have none, nor has eval mode.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dpofast.model.parts import base_causal_lm
from dpofast.packing.batch import PackedBatch

_ATTRIBUTE = "_dpofast_embedding_noise"  # of the causal language model


@dataclass(eq=False)
class _EmbeddingNoise:
    """A forward hook on an embedding.

    Attributes:
        alpha: NEFTune's.
        lengths: (rows, T) or (rows, 1) int64 on the CPU, tokens of each position's sequence; None between calls.
        applied: how often the hook has added noise in the present call.
    """

    alpha: float
    lengths: Tensor | None = None
    applied: int = 0

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """Embeddings (rows, T, D) with noise."""
        if self.lengths is None:
            return output
        self.applied += 1
        bound = self.alpha / (self.lengths * output.shape[-1]).sqrt()
        bound = bound[..., None].to(output.device, output.dtype, non_blocking=True)
        return output + torch.empty_like(output).uniform_(-1, 1).mul_(bound)

    @contextlib.contextmanager
    def in_call(self, model: nn.Module, lengths: Tensor) -> Iterator[None]:
        """Inside, the embedding has noise.

        Raises:
            ValueError: it was not called.
        """
        self.lengths, self.applied = lengths, 0
        try:
            yield
        finally:
            self.lengths = None
        if not self.applied:
            raise ValueError(
                f"neftune_noise_alpha: {type(model).__name__} does not call its input embedding "
                "(get_input_embeddings()), so no noise can be put on it: leave it out"
            )


@contextlib.contextmanager
def noisy_embeddings(model: Any, alpha: float | None) -> Iterator[None]:
    """Inside, model(packed=batch) has NEFTune's noise in train mode; sequences of a batch must share no rows then.

    Args:
        model: an attached model, PEFT's wrapper included.
        alpha: NEFTune's; None or 0 for no noise.
    """
    if not alpha:
        yield
        return
    base = base_causal_lm(model)
    noise = _EmbeddingNoise(alpha)
    # first, so that every other hook on the embedding sees what the layers do
    handle = base.get_input_embeddings().register_forward_hook(noise, prepend=True)
    vars(base)[_ATTRIBUTE] = noise
    try:
        yield
    finally:
        handle.remove()
        vars(base).pop(_ATTRIBUTE, None)


def packed_noise(model: nn.Module, batch: PackedBatch) -> contextlib.AbstractContextManager[None]:
    """For the backbone's call over one packed row: its noise, where there is some.

    Raises:
        ValueError: sequences, which have several lengths, share rows.
    """
    noise = _active(model)
    if noise is None:
        return contextlib.nullcontext()
    if batch.split is not None:
        raise ValueError(
            "packed: expected a batch of one process, as NEFTune's noise is drawn for whole rows, got one that "
            "split_over has made: leave neftune_noise_alpha out"
        )
    if batch.shared:
        raise ValueError(
            "packed: expected a batch whose sequences share nothing, as NEFTune's noise depends on the length of "
            'prompt and response, and in this one they share rows: pack with share="none"'
        )
    own = batch.segments.cu_seqlens_q.diff().long()
    return noise.in_call(model, (own + 1).repeat_interleave(own)[None])  # a response's last token has no position


def padded_noise(model: nn.Module, lengths: Tensor) -> contextlib.AbstractContextManager[None]:
    """For the backbone's call over padded rows of sequences of lengths (rows,): its noise, where there is some."""
    noise = _active(model)
    return contextlib.nullcontext() if noise is None else noise.in_call(model, lengths[:, None])


def _active(model: nn.Module) -> _EmbeddingNoise | None:
    return vars(model).get(_ATTRIBUTE) if model.training else None
