from typing import Any

import numpy as np
from numpy.typing import NDArray

UNLIMITED: int

def plan(lengths: NDArray[np.int64], max_tokens: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]: ...
def pack(
    tokens: NDArray[np.int64],
    lengths: NDArray[np.int64],
    branch_counts: NDArray[np.int64],
    pair_counts: NDArray[np.int64],
    pairs: NDArray[np.int64],
    grouped: NDArray[np.uint8],
    max_tokens: int,
    share_prompts: bool,
    vocab_size: int,
) -> tuple[list[dict[str, Any]], NDArray[np.int64]]: ...
