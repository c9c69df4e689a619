from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

UNLIMITED: int

def plan(
    lengths: NDArray[np.int64],
    targets: NDArray[np.int64] | None,
    max_tokens: int,
    max_targets: int,
    ranks: int,
    equal_counts: bool,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]: ...
def lexicographic_order(sequences: Sequences) -> NDArray[np.int64]: ...

class Sequences:
    @staticmethod
    def from_objects(objects: list[Any], convert: Callable[[int], NDArray[np.int64]]) -> Sequences: ...
    @staticmethod
    def of_lists(prompts: Sequences, responses: Sequences, counts: NDArray[np.int64]) -> Sequences: ...
    @staticmethod
    def from_columns(columns: list[list[tuple[NDArray[Any], NDArray[Any]]]]) -> Sequences: ...
    def __len__(self) -> int: ...
    def lengths(self) -> NDArray[np.int64]: ...

class Packer:
    def __init__(
        self,
        sequences: Sequences,
        branch_counts: NDArray[np.int64],
        comparison_counts: NDArray[np.int64],
        members: NDArray[np.int64],
        member_counts: NDArray[np.int64],
        ranks: NDArray[np.int64],
        variants: NDArray[np.int64],
        forms: NDArray[np.uint8],
        max_tokens: int,
        max_targets: int,
        share: str,
        vocab_size: int,
        threads: int,
    ) -> None: ...
    def plan(self, max_tokens: int, max_targets: int, threads: int) -> None: ...
    @property
    def shapes(self) -> NDArray[np.int64]: ...
    @property
    def sequences(self) -> NDArray[np.int64]: ...
    @property
    def canonical(self) -> NDArray[np.int64]: ...
    def fill(self, longs: NDArray[np.int64], ints: NDArray[np.int32], threads: int) -> None: ...
