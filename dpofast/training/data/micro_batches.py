"""Packs a rank's share of a step into micro-batches, when it is asked for or in the background, one step ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from dpofast.data.formats import REF_COLUMNS
from dpofast.data.token_rows import without_reference
from dpofast.packing.batch import PackedBatch
from dpofast.packing.pack import pack
from dpofast.scoring.ahead import Ahead
from dpofast.training.sampler import PackedShare, StepExamples


@dataclass(frozen=True)
class StepPacker:
    """How the steps of a run are packed.

    Attributes:
        device: where micro-batches are computed.
        share: as in `pack`.
        ref_logps_by_pair: ref_logps become (P, 2) instead of (S,): with ld_alpha the number of a response differs from
            pair to pair.
        group: the process group that computes each micro-batch together (sequence parallelism), or None.
    """

    device: torch.device
    share: str
    ref_logps_by_pair: bool
    group: Any = None

    def pack(self, examples: Sequence[Mapping[str, Any]], max_tokens: int | None) -> list[PackedBatch]:
        """Micro-batches on the CPU, for a GPU in page-locked memory.

        Args:
            examples: with token ids, the optional columns of pairs and lists, and reference log-probs where they were
                computed.
            max_tokens: most packed positions of a micro-batch; None packs all into one.

        Raises:
            ValueError: an image that cannot be used, with its row.
        """
        if (problem := getattr(examples, "problem", None)) is not None:
            raise ValueError(problem)
        by_pair = self.ref_logps_by_pair and len(examples) > 0 and REF_COLUMNS[0] in examples[0]
        rows = [without_reference(example) for example in examples] if by_pair else examples
        batches = pack(rows, max_tokens, share=self.share)
        if by_pair:
            columns = torch.tensor([[float(example[name]) for name in REF_COLUMNS] for example in examples])
            batches = [replace(batch, ref_logps=columns[batch.pair_examples]) for batch in batches]
        if self.group is not None:
            batches = [batch.split_over(self.group) for batch in batches]
        if self.device.type != "cuda":
            return batches
        with torch.cuda.device(self.device):  # a thread's own is the first GPU, which another rank may have
            return [batch.pin_memory() for batch in batches]

    def on_device(self, examples: Sequence[Mapping[str, Any]], max_tokens: int | None) -> list[PackedBatch]:
        """Micro-batches on the device: those that were packed ahead, unless for another max_tokens."""
        packed = getattr(examples, "packed", None)
        if packed is None or packed.max_tokens != max_tokens:
            packed = PackedShare(self.pack(examples, max_tokens), max_tokens)
        return [batch.to(self.device) for batch in packed.batches]

    def ahead(self, steps: Iterator[StepExamples], max_tokens: Callable[[], int]) -> Ahead[StepExamples]:
        """The same steps, each packed in the background; max_tokens() is asked when a step is packed."""

        def packed(examples: StepExamples) -> StepExamples:
            limit = max_tokens()
            examples.packed = PackedShare(self.pack(examples, limit), limit)
            return examples

        return Ahead(steps, packed)
