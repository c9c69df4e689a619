"""pack: preference pairs and lists -> packed micro-batches, with what sequences share once and no padding.

batch.py describes the layout. The C++ extension (csrc/) reads the token ids in place (examples.py) and writes all
arrays of a call into two buffers, one int64 and one int32; the tensors of the batches are views of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dpofast.losses.columns import NO_COLUMNS
from dpofast.packing.arguments import at_least_one, limit, sharing
from dpofast.packing.batch import PackedBatch
from dpofast.packing.examples import FlatExamples, read_examples
from dpofast.packing.segments import Segments

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

# Equal branches of one group may come with reference log-probs from different batches; more than noise is an error.
REF_LOGPS_TOLERANCE = 1e-3


class PackBuffers:
    """Memory that calls of `pack` reuse: page faults of fresh memory cost more than the packing itself.

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
        """An int64 and an int32 tensor of so many elements, uninitialized."""
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
    share: str | None = None,
    share_prompts: bool | None = None,
    vocab_size: int | None = None,
    num_threads: int = 1,
    buffers: PackBuffers | None = None,
) -> list[PackedBatch]:
    """Packs examples into micro-batches of at most max_tokens positions.

    Examples with equal prompts share one group, and equal responses inside it are one branch. What sequences of a batch
    begin with alike is computed once: prompts that share a system prompt or earlier turns, responses that fork late. A
    group is split only if it is larger than max_tokens, a pair or list never: one longer than max_tokens goes alone,
    but for those that add no token to it, and its batch has num_tokens > max_tokens. Each lands in exactly one batch.
    Groups that begin alike are put together where that leaves fewer positions. Batches are evenly filled (see `plan`)
    and come largest first; their sizes do not depend on the order of the examples.

    Args:
        examples: mappings with prompt_ids, chosen_ids and rejected_ids (1-D integers, at least one each) and, for all
            examples or none, ref_chosen_logps and ref_rejected_logps (floats: summed nats); or groups with
            prompt_ids, branches (K responses), pairs (a list of (chosen, rejected) indices) and ref_logps (K floats).
            Or lists with prompt_ids, responses_ids (K >= 2 responses in any order), ranks (K numbers, smaller is
            better, equal ones are tied) or scores (K numbers, larger is better) or both, and ref_responses_logps
            (K floats). A call has pairs or lists. Pairs and lists, but not groups, may have columns
            (`PreferenceColumns`): weight (None: 1) and margin (None: 0), beta and label_smoothing (in all rows or
            none), and weights for the tokens of responses, chosen_weights and rejected_weights or responses_weights
            (None: all 1). Other keys are ignored. Or the same by columns, which is several times faster: an Arrow
            table or a Dataset with these columns, or one mapping from their names to arrays or, for lists of numbers,
            (values, offsets), where row r's ids are values[offsets[r]:offsets[r + 1]]; responses_ids and
            responses_weights are Arrow columns. int32 and int64 ids are read where they lie.
        max_tokens: the budget of a micro-batch; None makes one batch.
        max_targets: a second budget, over response tokens; None leaves them unbounded.
        share: which positions sequences share: "prefix" (the default) all that they begin with alike, "prompt" a prompt
            among its responses, "none" nothing, to measure what sharing is worth.
        share_prompts: True is share="prompt", False is share="none".
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
    shared = sharing(share, share_prompts)
    flat = read_examples(examples)
    packer = flat.packer(
        max_tokens=token_limit, max_targets=target_limit, share=shared, vocab_size=id_limit, threads=threads
    )
    tokens, targets, segments, sequences, pairs, widths, padded = packer.shapes.T
    origins = packer.sequences if flat.refs is not None or flat.columns.given else None
    ref_logps = None
    if flat.refs is not None:
        _check_refs(flat, flat.refs, packer.canonical)
        ref_logps = torch.from_numpy(flat.refs[origins].astype(np.float32)).split(sequences.tolist())

    # The elements of every batch's arrays, which lie in each buffer in this order (csrc/batches.hpp).
    long_sizes = {
        "input_ids": tokens,
        "position_ids": tokens,
        "logit_rows": targets,
        "targets": targets,
        "pair_examples": pairs,
    }
    int_sizes = {
        "cu_seqlens_q": segments + 1,
        "parents": segments,
        "cu_targets": sequences + 1,
        "pairs": 2 * pairs,
    }
    if flat.columns.order is not None:
        int_sizes |= {"lists": widths * pairs, "ranks": widths * pairs}
    long_counts, int_counts = (np.stack(list(sizes.values()), 1) for sizes in (long_sizes, int_sizes))
    longs, ints = (buffers or PackBuffers()).take(int(long_counts.sum()), int(int_counts.sum()))
    packer.fill(longs.numpy(), ints.numpy(), threads)
    long_parts = iter(longs.split(long_counts.ravel().tolist()))
    int_parts = iter(ints.split(int_counts.ravel().tolist()))
    first = 0
    batches = []
    for index, padded_tokens in enumerate(padded.tolist()):
        long_arrays = {name: next(long_parts) for name in long_sizes}
        int_arrays = {name: next(int_parts) for name in int_sizes}
        columns = NO_COLUMNS
        if origins is not None and flat.columns.given:
            own = origins[first : first + sequences[index]]
            first += sequences[index]
            columns = flat.columns.of_batch(
                long_arrays["pair_examples"], own, int_arrays.get("lists"), int_arrays.get("ranks")
            )
        batches.append(
            PackedBatch(
                **long_arrays,
                segments=Segments(int_arrays["cu_seqlens_q"], int_arrays["parents"]),
                cu_targets=int_arrays["cu_targets"],
                pairs=int_arrays["pairs"].view(-1, 2),
                ref_logps=None if ref_logps is None else ref_logps[index],
                padded_tokens=padded_tokens,
                columns=columns,
            )
        )
    return batches


def _check_refs(flat: FlatExamples, refs: np.ndarray, canonical: np.ndarray) -> None:
    """ValueError if a branch's reference log-prob differs from that of the first equal branch (canonical)."""
    apart = np.abs(refs - refs[canonical]) > REF_LOGPS_TOLERANCE
    if apart.any():
        owners = np.repeat(np.arange(len(flat.forms)), flat.branch_counts + 1)
        other = int(apart.argmax())
        first = int(canonical[other])
        raise ValueError(
            f"examples[{owners[other]}]: reference log-prob {refs[other]:.6g} of a response that examples"
            f"[{owners[first]}] holds with {refs[first]:.6g}; equal responses to equal prompts must agree within "
            f"{REF_LOGPS_TOLERANCE:g} nats"
        )
