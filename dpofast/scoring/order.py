"""prompt_order: the order in which a pass reads a dataset, so that prompts that begin alike meet in a window."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from datasets import Dataset

from dpofast.data.arrow import chunk_bounds, read_chunks
from dpofast.data.token_rows import PROMPT, image_columns, prompts_of
from dpofast.packing.examples import lexicographic_order

_ROWS = 1024
_TOKENS = 1 << 23  # of prompts that are sorted together: 32 MB of int32


def prompt_order(dataset: Dataset) -> np.ndarray:
    """Row numbers of a token-level dataset, sorted by prompt: (n,) int64.

    Rows whose prompts begin alike (a system prompt, earlier turns) stand together, and `pack` computes that beginning
    once for all of them that it gets. Prompts are sorted lexicographically, equal ones by row number, in stretches of
    2**23 tokens, so that memory does not grow with the dataset but for 8 bytes a row. A function of the tokens alone,
    and where prompts have images of the keys of these: an image is compared like a token that differs for each image.

    Raises:
        ValueError: prompt_ids that are no lists of token ids, or images that contradict them.
    """
    images, bounds = image_columns(dataset.column_names), chunk_bounds(len(dataset), _ROWS)
    order, chunks, tokens, first = [np.empty(0, np.int64)], list[pa.Array](), 0, 0
    for (_, stop), table in zip(bounds, read_chunks(dataset, [PROMPT, *images], bounds), strict=True):
        new = table.column(PROMPT).chunks
        if images:
            values, offsets, _ = prompts_of(table)
            new = [pa.LargeListArray.from_arrays(offsets, values)]
        chunks += new
        tokens += sum(len(chunk.flatten()) for chunk in new)
        if tokens >= _TOKENS or stop == len(dataset):
            order.append(first + lexicographic_order(pa.chunked_array(chunks), PROMPT))
            chunks, tokens, first = [], 0, stop
    return np.concatenate(order)
