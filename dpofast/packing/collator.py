"""For a torch DataLoader: a collate_fn that packs, and a batch sampler that puts the pairs of a prompt in one step."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from dpofast.packing.arguments import at_least_one, limit, sharing
from dpofast.packing.batch import PackedBatch
from dpofast.packing.pack import PackBuffers, pack


class PackingCollator:
    """A DataLoader's collate_fn that packs the examples of a step into micro-batches.

    `DataLoader(dataset, batch_size=64, collate_fn=PackingCollator(max_tokens=16384))` yields lists of PackedBatch. If
    max_tokens and max_targets are both None, it yields one PackedBatch per step. Works in worker processes and with
    pin_memory=True.

    Args:
        max_tokens: most packed positions of a micro-batch; None: no limit.
        max_targets: most response tokens of a micro-batch; None: no limit.
        share: as in `pack`; so is share_prompts.
        share_prompts: an alias.
        vocab_size: if given, token ids must be below it.
        num_threads: as in `pack`.
        buffers: memory to reuse; a batch is then valid until the next one is collated. Not for use with worker
            processes or a DataLoader that prefetches.

    Raises:
        ValueError: a limit below 1. When called: the errors of `pack`, or no examples without a limit.
    """

    def __init__(
        self,
        max_tokens: int | None = None,
        *,
        max_targets: int | None = None,
        share: str | None = None,
        share_prompts: bool | None = None,
        vocab_size: int | None = None,
        num_threads: int = 1,
        buffers: PackBuffers | None = None,
    ) -> None:
        """Check the limits."""
        limit("max_tokens", max_tokens)
        limit("max_targets", max_targets)
        self.max_tokens = max_tokens
        self.max_targets = max_targets
        self.share = sharing(share, share_prompts)
        self.vocab_size = vocab_size
        self.num_threads = num_threads
        self.buffers = buffers

    def __call__(self, examples: Iterable[Mapping[str, Any]]) -> list[PackedBatch] | PackedBatch:
        """Pack the examples of one step; pair_examples are indices into `examples`."""
        batches = pack(
            examples,
            self.max_tokens,
            max_targets=self.max_targets,
            share=self.share,
            vocab_size=self.vocab_size,
            num_threads=self.num_threads,
            buffers=self.buffers,
        )
        if self.max_tokens is not None or self.max_targets is not None:
            return batches
        if not batches:
            raise ValueError("examples: expected at least one for a single batch, got none")
        return batches[0]


def group_by_prompt(
    prompts: Sequence[Any], pairs_per_step: int, *, seed: int = 0, drop_last: bool = False
) -> list[np.ndarray]:
    """Group examples into steps of pairs_per_step in random order, with the examples of one prompt in the same step.

    In one step they share the positions of the prompt and of equal responses. Prompts are shuffled; each step takes the
    first ones in that order that fit. A prompt is spread over several steps only if it has more examples than a step
    holds. Deterministic given the seed.

    Args:
        prompts: the prompt of every example: token ids (a 1-D array or list), or any hashable value (text, a number);
            or a tuple of these, all of which must be equal. With images token ids do not tell prompts apart: give
            (prompt_ids, *(image.key for image in media.images)).
        pairs_per_step: examples in a step, 1 or more.
        seed: seed of the shuffle; change it every epoch.
        drop_last: drop steps that are not full. These come last; if every prompt has one example, there is at most one.

    Returns:
        The example indices of every step, int64, in ascending order.

    Raises:
        ValueError: pairs_per_step below 1.
    """
    size = at_least_one("pairs_per_step", pairs_per_step)
    members: dict[Any, list[int]] = {}
    for index, prompt in enumerate(prompts):
        members.setdefault(_key(prompt), []).append(index)
    generator = np.random.default_rng(seed)
    groups = list(members.values())
    # Groups that are not yet in a step, by size; each with its position in the shuffled order.
    waiting: dict[int, deque[tuple[int, list[int]]]] = {}
    place = 0
    for g in generator.permutation(len(groups)):
        order = generator.permutation(groups[g]).tolist()
        for start in range(0, len(order), size):
            part = order[start : start + size]
            waiting.setdefault(len(part), deque()).append((place, part))
            place += 1

    full: list[np.ndarray] = []
    short: list[np.ndarray] = []
    while waiting:
        step: list[int] = []
        while fitting := [count for count in waiting if count <= size - len(step)]:
            first = min(fitting, key=lambda count: waiting[count][0][0])
            step += waiting[first].popleft()[1]
            if not waiting[first]:
                del waiting[first]
        (full if len(step) == size else short).append(np.sort(np.array(step, np.int64)))
    return full if drop_last else full + short


def _key(prompt: Any) -> Any:
    if isinstance(prompt, (str, bytes, int)):
        return prompt
    if isinstance(prompt, tuple) and not all(isinstance(part, (int, np.integer)) for part in prompt):
        return tuple(map(_key, prompt))
    if isinstance(prompt, (list, tuple, np.ndarray)) or hasattr(prompt, "__array__"):
        return np.asarray(prompt, np.int64).tobytes()
    return prompt


class PromptGroupSampler(Sampler[list[int]]):
    """A DataLoader's batch_sampler over the steps of group_by_prompt.

    Args:
        prompts: as in `group_by_prompt`.
        pairs_per_step: examples in a step.
        seed: must be the same on every rank and after a restart.
        drop_last: drop steps that are not full.

    Raises:
        ValueError: pairs_per_step below 1.
    """

    def __init__(self, prompts: Sequence[Any], pairs_per_step: int, *, seed: int = 0, drop_last: bool = False) -> None:
        """Start at epoch 0."""
        at_least_one("pairs_per_step", pairs_per_step)
        self._keys = [_key(prompt) for prompt in prompts]
        self._pairs_per_step, self._seed, self._drop_last = pairs_per_step, seed, drop_last
        self._steps: list[np.ndarray] = []
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the steps of an epoch; they depend on the prompts, the seed and the epoch only."""
        seed = int(np.random.SeedSequence([self._seed, epoch]).generate_state(1)[0])
        self._steps = group_by_prompt(self._keys, self._pairs_per_step, seed=seed, drop_last=self._drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the example indices of every step."""
        return (step.tolist() for step in self._steps)

    def __len__(self) -> int:
        """The number of steps."""
        return len(self._steps)
