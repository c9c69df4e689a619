"""Preference pairs -> packed micro-batches: every prompt once, every distinct response once, no pad token.

The layout is packed_batch.py's; the work is done in C++ (csrc/), which reads token ids where they lie (examples.py)
and writes all arrays of a call into two buffers, one int64 and one int32, of which the batches are views.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dpofast import _C
from dpofast.packing.arguments import at_least_one, limit
from dpofast.packing.batch import PackedBatch as PackedBatch
from dpofast.packing.batch import Segments as Segments
from dpofast.packing.examples import FlatExamples, read_examples
from dpofast.packing.planner import Plan as Plan
from dpofast.packing.planner import plan as plan

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

# Equal branches of one group may come with reference log-probs from different batches; more than noise is an error.
REF_LOGPS_TOLERANCE = 1e-3


class PackBuffers:
    """Memory that calls of `pack` share: they write no fresh pages, which cost more than the packing itself.

    The batches of a call are views of it and hold until the next call with the same buffers.

    Args:
        pin_memory: page-locked memory, for copies to the GPU that do not block.

    Raises:
        ValueError: pin_memory without CUDA.
    """

    def __init__(self, *, pin_memory: bool = False) -> None:
        """Start empty; memory grows with the calls."""
        if pin_memory and not torch.cuda.is_available():
            raise ValueError("pin_memory needs CUDA, which is not available here; leave it out")
        self.pin_memory = pin_memory
        self._longs = torch.empty(0, dtype=torch.int64)
        self._ints = torch.empty(0, dtype=torch.int32)

    def take(self, longs: int, ints: int) -> tuple[Tensor, Tensor]:
        """So many int64 and int32 elements, with anything in them."""
        self._longs, self._ints = self._grown(self._longs, longs), self._grown(self._ints, ints)
        return self._longs[:longs], self._ints[:ints]

    def _grown(self, buffer: Tensor, size: int) -> Tensor:
        if len(buffer) >= size:
            return buffer
        return torch.empty(size + size // 4, dtype=buffer.dtype, pin_memory=self.pin_memory)


def pack(
    examples: Iterable[Mapping[str, Any]] | Mapping[str, Any] | pa.Table | datasets.Dataset,
    max_tokens: int | None = None,
    *,
    max_targets: int | None = None,
    share_prompts: bool = True,
    vocab_size: int | None = None,
    num_threads: int = 1,
    buffers: PackBuffers | None = None,
) -> list[PackedBatch]:
    """Packs examples into micro-batches of at most max_tokens positions.

    Examples with equal prompts share one group, and equal responses inside it are one branch. A group is split only
    if it is larger than max_tokens, a pair never: one longer than max_tokens goes alone, but for pairs that add no
    token to it, and its batch has num_tokens > max_tokens. Every pair lands in exactly one batch. Batches are
    evenly filled (see `plan`) and come largest first; their sizes do not depend on the order of the examples.

    Args:
        examples: mappings with prompt_ids, chosen_ids and rejected_ids (1-D integers, at least one each) and, for all
            examples or none, ref_chosen_logps and ref_rejected_logps (floats: summed nats); or groups with
            prompt_ids, branches (K responses), pairs (a list of (chosen, rejected) indices) and ref_logps (K floats).
            Other keys are ignored. Or the same pairs by columns, which is several times faster: an Arrow table or a
            Dataset with these columns, or one mapping from their names to (values, offsets), where row r's ids are
            values[offsets[r]:offsets[r + 1]]. int32 and int64 ids are read where they lie.
        max_tokens: the budget of a micro-batch; None makes one batch.
        max_targets: a second budget, over response tokens; None leaves them unbounded.
        share_prompts: False gives every branch its own copy of the prompt, to measure what sharing is worth.
        vocab_size: where given, token ids must be below it.
        num_threads: threads that check the ids and write the arrays.
        buffers: memory to reuse; the batches then hold until its next use. None takes fresh memory.

    Returns:
        The batches, on the CPU; [] for no examples. Batches of one call share memory: clone what is to outlive them.

    Raises:
        ValueError: naming the example and what is wrong with it, or the argument.
    """
    token_limit, target_limit = limit("max_tokens", max_tokens), limit("max_targets", max_targets)
    id_limit, threads = limit("vocab_size", vocab_size), at_least_one("num_threads", num_threads)
    flat = read_examples(examples)
    packer = _C.Packer(
        flat.sequences,
        flat.branch_counts,
        flat.pair_counts,
        flat.pairs,
        flat.grouped,
        max_tokens=token_limit,
        max_targets=target_limit,
        share_prompts=share_prompts,
        vocab_size=id_limit,
        threads=threads,
    )
    tokens, targets, segments, sequences, pairs, padded = packer.shapes.T
    ref_logps = None
    if flat.refs is not None:
        _check_refs(flat, flat.refs, packer.canonical)
        ref_logps = torch.from_numpy(flat.refs[packer.sequences].astype(np.float32)).split(sequences.tolist())

    # In the order of csrc/batches.hpp.
    long_sizes = np.stack((tokens, tokens, targets, targets, pairs), 1)
    int_sizes = np.stack((segments + 1, 2 * segments, sequences + 1, 2 * pairs), 1)
    longs, ints = (buffers or PackBuffers()).take(int(long_sizes.sum()), int(int_sizes.sum()))
    packer.fill(longs.numpy(), ints.numpy(), threads)
    long_parts = iter(longs.split(long_sizes.ravel().tolist()))
    int_parts = iter(ints.split(int_sizes.ravel().tolist()))
    batches = []
    for index, padded_tokens in enumerate(padded.tolist()):
        input_ids, position_ids, logit_rows, target_ids, pair_examples = (next(long_parts) for _ in range(5))
        cu_seqlens_q, prefixes, cu_targets, pair_rows = (next(int_parts) for _ in range(4))
        batches.append(
            PackedBatch(
                input_ids=input_ids,
                position_ids=position_ids,
                logit_rows=logit_rows,
                targets=target_ids,
                segments=Segments(cu_seqlens_q, prefixes.view(-1, 2)),
                cu_targets=cu_targets,
                pairs=pair_rows.view(-1, 2),
                pair_examples=pair_examples,
                ref_logps=None if ref_logps is None else ref_logps[index],
                padded_tokens=padded_tokens,
            )
        )
    return batches


def _check_refs(flat: FlatExamples, refs: np.ndarray, canonical: np.ndarray) -> None:
    """Equal branches must agree with the first of them, canonical."""
    apart = np.abs(refs - refs[canonical]) > REF_LOGPS_TOLERANCE
    if apart.any():
        owners = np.repeat(np.arange(len(flat.grouped)), flat.branch_counts + 1)
        other = int(apart.argmax())
        first = int(canonical[other])
        raise ValueError(
            f"examples[{owners[other]}]: reference log-prob {refs[other]:.6g} of a response that examples"
            f"[{owners[first]}] holds with {refs[first]:.6g}; equal responses to equal prompts must agree within "
            f"{REF_LOGPS_TOLERANCE:g} nats"
        )
