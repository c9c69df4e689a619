"""PackedBatch: lengths(), padded(), shared, describe() and layout() against plain Python."""

import re

from hypothesis import given
from hypothesis import strategies as st

from dpofast import pack
from dpofast.packing.arguments import SHARED
from tests.support.deep_examples import tries
from tests.support.examples import DESIGN
from tests.support.histories import histories
from tests.support.tries import unpadded


def test_describe_and_layout():
    (batch,) = pack([DESIGN])
    assert batch.describe() == (
        "6 tokens, 5 targets, 2 sequences, 1 pairs; sharing saves 33.3% of 9 tokens; "
        "a padded trainer computes 12 (2.00x)"
    )
    assert batch.layout().splitlines() == [
        "input_ids     10 11 12 20 | 30 31",
        "position_ids   0  1  2  3 |  3  4",
        "logit_rows     2  3 |  2  4  5",
        "targets       20 21 | 30 31 32",
        "cu_targets    [0, 2, 5]",
        "pairs         [[0, 1]]",
        "run           q rows [0,4) sees k rows 0..3",
        "run           q rows [4,6) sees k rows 0..2 4..5",
    ]


@given(tries(), st.sampled_from(SHARED))
def test_every_sequence_is_found_again_on_its_path(examples, share):
    (batch,) = pack(examples, share=share)
    expected = []  # by prompt and by branch, in order of first appearance
    for prompt in dict.fromkeys(tuple(row["prompt_ids"]) for row in examples):
        rows = [row for row in examples if tuple(row["prompt_ids"]) == prompt]
        used = [tuple(row["branches"][side]) for row in rows for pair in row["pairs"] for side in pair]
        expected += [(prompt, response) for response in dict.fromkeys(used)]
    assert unpadded(batch) == expected
    lengths = [len(prompt) + len(response) for prompt, response in expected]
    assert batch.lengths().tolist() == lengths
    assert batch.segments.longest_path() == max(lengths) - 1
    alone = sum(lengths) - len(lengths)
    assert batch.shared == (batch.num_tokens < alone)
    unshared = sum(lengths[side] - 1 for pair in batch.pairs.tolist() for side in pair)
    assert f"sharing saves {1 - batch.num_tokens / unshared:.1%} of {unshared} tokens" in batch.describe()


@given(tries(), st.sampled_from(SHARED))
def test_the_layout_names_the_rows_that_are_seen(examples, share):
    (batch,) = pack(examples, share=share)
    lines, paths = batch.layout().splitlines(), histories(batch.segments)
    runs = [line.partition("sees k rows ") for line in lines if line.startswith("run ")]
    begin = 0
    for queries, _, keys in runs:
        start, stop = map(int, re.search(r"\[(\d+),(\d+)\)", queries).groups())
        seen = [row for low, high in re.findall(r"(\d+)\.\.(\d+)", keys) for row in range(int(low), int(high) + 1)]
        assert start == begin and seen == paths[stop - 1] and seen[start - stop :] == list(range(start, stop))
        begin = stop
    assert begin == batch.num_tokens
    ids = lines[0].removeprefix("input_ids").split("|")
    assert len(ids) == len(runs) and [int(i) for part in ids for i in part.split()] == batch.input_ids.tolist()
