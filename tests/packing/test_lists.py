"""pack of lists of responses: their order, layout and plan, in every form of input."""

import random

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from dpofast.packing.arguments import SHARED
from dpofast.packing.collator import PackingCollator
from dpofast.packing.pack import pack
from tests.support.examples import DESIGN
from tests.support.lists import naive_lists
from tests.support.tries import unpadded

ids = st.lists(st.integers(0, 2), min_size=1, max_size=5)
ROW = {"prompt_ids": [1, 2], "responses_ids": [[3, 4, 5], [6, 7], [8]]}


@st.composite
def lists(draw):
    """A list of 2 to 6 responses with ties; equal responses are tied, and may have other weights."""
    responses = draw(st.lists(ids, min_size=2, max_size=5, unique_by=tuple))
    scores = draw(st.lists(st.integers(0, 3), min_size=len(responses), max_size=len(responses)))
    scores[1] = scores[0] + 1 if scores[1] == scores[0] else scores[1]
    if draw(st.booleans()):
        responses.append(responses[0])
        scores.append(scores[0])
    row = {"prompt_ids": draw(ids), "responses_ids": responses, "ranks": [9 - score for score in scores]}
    weight = st.sampled_from([0.5, 1.0, 2.0])
    row["responses_weights"] = [
        draw(st.none() | st.lists(weight, min_size=len(response), max_size=len(response))) for response in responses
    ]
    return row


def weights_of(batch):
    weights = batch.columns.token_weights
    weights = torch.ones(batch.num_targets) if weights is None else weights
    return [tuple(part.tolist()) for part in weights.split(batch.cu_targets.diff().tolist())]


def contents(batch):
    """Every list as (example, ((prompt, response, weights, rank), ...)) best first."""
    sequences, weights = unpadded(batch), weights_of(batch)
    found = []
    for origin, members, ranks in zip(
        batch.pair_examples.tolist(), batch.columns.lists.tolist(), batch.columns.ranks.tolist(), strict=True
    ):
        count = len(members) - members.count(-1)
        assert members[count:] == ranks[count:] == [-1] * (len(members) - count)
        found.append(
            (origin, tuple((*sequences[s], weights[s], r) for s, r in zip(members[:count], ranks[:count], strict=True)))
        )
    return found


some = given(st.lists(lists(), min_size=1, max_size=8), st.none() | st.integers(1, 60), st.sampled_from(SHARED))


@some
def test_a_micro_batch_is_laid_out_as_by_plain_python(rows, max_tokens, share):
    batches = pack(rows, max_tokens, share=share)
    assert sorted(origin for batch in batches for origin in batch.pair_examples.tolist()) == list(range(len(rows)))
    for batch in batches:
        own = [rows[index] for index in batch.pair_examples.tolist()]
        sequences, positions, members = naive_lists(own, share)
        assert [(*one, w) for one, w in zip(unpadded(batch), weights_of(batch), strict=True)] == sequences
        assert batch.num_tokens == positions
        width = max(map(len, members))
        assert batch.columns.lists.shape == batch.columns.ranks.shape == (len(own), width)
        assert batch.columns.lists.dtype == batch.columns.ranks.dtype == torch.int32
        for place, column in ((0, batch.columns.lists), (1, batch.columns.ranks)):
            assert column.tolist() == [[m[place] for m in one] + [-1] * (width - len(one)) for one in members]
        assert batch.pairs.tolist() == [[one[0][0], one[-1][0]] for one in members]
        longest = max(len(prompt) + len(response) for prompt, response, _ in sequences)
        assert batch.padded_tokens == sum(map(len, members)) * longest


@some
def test_a_list_stays_whole_within_the_budget(rows, max_tokens, share):
    batches = pack(rows, max_tokens, share=share)
    for batch in batches:
        if max_tokens is not None and batch.num_tokens > max_tokens:  # one list, and those that add nothing
            alone = {naive_lists([rows[index]], share)[1] for index in batch.pair_examples.tolist()}
            assert batch.num_tokens in alone
    shuffled = random.Random(0).sample(rows, len(rows))
    again = pack(shuffled, max_tokens, share=share)
    assert [batch.num_tokens for batch in batches] == [batch.num_tokens for batch in again]
    everything = [(rows[origin]["prompt_ids"], members) for batch in batches for origin, members in contents(batch)]
    reordered = [(shuffled[origin]["prompt_ids"], members) for batch in again for origin, members in contents(batch)]
    assert sorted(everything) == sorted(reordered)


def test_positions_are_those_of_the_prompt_and_of_every_response_but_its_last_token():
    rng = np.random.default_rng(0)
    rows, expected = [], 0
    for k in (2, 3, 4, 7):
        lengths = rng.integers(1, 30, k + 1).tolist()
        prompt = [100 + k, *rng.integers(0, 50, lengths[0]).tolist()]
        responses = [[j, *rng.integers(0, 50, length - 1).tolist()] for j, length in enumerate(lengths[1:])]
        rows.append({"prompt_ids": prompt, "responses_ids": responses, "ranks": list(range(k))})
        expected += len(prompt) + sum(length - 1 for length in lengths[1:])
    (batch,) = pack(rows)
    assert batch.num_tokens == expected
    assert (batch.num_pairs, batch.num_sequences, batch.columns.lists.shape) == (4, 2 + 3 + 4 + 7, (4, 7))


@pytest.mark.parametrize(
    ("given", "order", "ranks", "scores"),
    [
        ({"ranks": [3, 1, 2]}, [1, 2, 0], [0, 1, 2], None),
        ({"ranks": [2.5, 1, 2.5]}, [1, 0, 2], [0, 1, 1], None),
        ({"scores": [0.25, 3, 0.25]}, [1, 0, 2], [0, 1, 1], [3, 0.25, 0.25]),
        ({"ranks": [1, 1, 2], "scores": [4, 5, 4]}, [0, 1, 2], [0, 0, 1], [4, 5, 4]),
        ({"ranks": [9, 5, 7], "scores": [1, 1, 1]}, [1, 2, 0], [0, 1, 2], [1, 1, 1]),
    ],
)
def test_responses_are_ordered_best_first(given, order, ranks, scores):
    (batch,) = pack([ROW | given])
    responses = [response for _, response in unpadded(batch)]
    assert [responses[s] for s in batch.columns.lists[0]] == [tuple(ROW["responses_ids"][k]) for k in order]
    assert batch.columns.ranks.tolist() == [ranks]
    assert (None if batch.columns.scores is None else batch.columns.scores.tolist()) == (scores and [scores])


MIXED = [
    ROW | {"scores": [0.5, 2, 1], "weight": 2.0, "margin": 0.5, "beta": 0.2, "label_smoothing": 0.1}
    | {"ref_responses_logps": [-1.0, -2.0, -3.0], "responses_weights": [[0, 1, 2], None, [0.5]]},
    {"prompt_ids": [9], "responses_ids": [[1, 2], [3]], "scores": [1, 4], "weight": None, "margin": None}
    | {"beta": 0.3, "label_smoothing": 0, "ref_responses_logps": [-4.0, -5.0], "responses_weights": None},
    {"prompt_ids": [1, 2], "responses_ids": [[6, 7], [4, 4, 4, 4]], "scores": [3, 1], "weight": 0, "margin": -1}
    | {"beta": 0.4, "label_smoothing": 0.2, "ref_responses_logps": [-2.0, -7.0], "responses_weights": [[1, 1], None]},
]  # fmt: skip


def assert_same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        for name in ("input_ids", "logit_rows", "targets", "cu_targets", "pairs", "pair_examples", "ref_logps"):
            assert torch.equal(getattr(a, name), getattr(b, name))
        assert a.padded_tokens == b.padded_tokens and a.columns.given == b.columns.given
        for name in a.columns.given:
            left, right = getattr(a.columns, name), getattr(b.columns, name)
            assert left.dtype == right.dtype and torch.equal(left, right)


def test_every_form_of_input_gives_the_same():
    expected = pack(MIXED)
    (batch,) = expected
    assert batch.columns.weight.tolist() == [2, 1, 0] and batch.columns.margin.tolist() == [0.5, 0, -1]
    assert batch.columns.beta.tolist() == pytest.approx([0.2, 0.3, 0.4])
    assert batch.columns.label_smoothing.tolist() == pytest.approx([0.1, 0, 0.2])
    assert batch.columns.lists.tolist() == [[0, 1, 2], [4, 5, -1], [0, 3, -1]]
    assert batch.columns.scores.tolist() == [[2, 1, 0.5], [4, 1, 0], [3, 1, 0]]
    assert batch.columns.token_weights.tolist() == [1, 1, 0.5, 0, 1, 2, 1, 1, 1, 1, 1, 1, 1]
    assert batch.ref_logps.tolist() == [-2, -3, -1, -7, -5, -4]
    table = pa.Table.from_pylist(MIXED)
    assert_same(pack(table), expected)
    assert_same(pack(pa.concat_tables([table.slice(0, 1), table.slice(1, 2)])), expected)
    assert_same(pack(table.slice(1, 2)), pack(MIXED[1:]))
    assert_same(pack(Dataset(table)), expected)
    assert_same(pack(Dataset(table).with_format("numpy").select([2, 1])), pack([MIXED[2], MIXED[1]]))
    assert_same(pack(dict(zip(table.schema.names, table.columns, strict=True))), expected)
    assert_same(PackingCollator(1)(MIXED), pack(MIXED, 1))
    assert pack(table.slice(0, 0)) == []
    arrays = [row | {"responses_ids": [np.array(one, np.int32) for one in row["responses_ids"]]} for row in MIXED]
    assert_same(pack(arrays), expected)
    # The trainer's examples hold the best and the worst, too.
    assert_same(pack([row | {"chosen_ids": [1], "rejected_ids": [1]} for row in MIXED]), expected)


def test_equal_responses_with_other_weights_share_positions_and_have_targets_of_their_own():
    rows = [
        {"prompt_ids": [1], "responses_ids": [[2, 3], [4]], "ranks": [1, 2], "responses_weights": [weights, None]}
        for weights in ([0, 1], None, [1, 1], [0.0, 1.0], [-0.0, 1])
    ]
    (batch,) = pack(rows)
    assert (batch.num_tokens, batch.num_sequences, batch.num_targets) == (2, 3, 5)
    assert batch.columns.lists.tolist() == [[0, 1], [2, 1], [2, 1], [0, 1], [0, 1]]
    assert batch.columns.token_weights.tolist() == [0, 1, 1, 1, 1]
    assert batch.logit_rows.tolist() == [0, 1, 0, 0, 1]
    assert pack(rows, share="prompt")[0].num_tokens == 3 and pack(rows, share="none")[0].num_tokens == 5
    assert pack(rows[1:3])[0].columns.token_weights is None


def test_a_list_is_said_in_words():
    (batch,) = pack([ROW | {"ranks": [1, 2, 2]}, {"prompt_ids": [9], "responses_ids": [[1], [2]], "ranks": [1, 2]}])
    assert batch.describe().startswith(
        "6 tokens, 8 targets, 5 sequences, 2 lists of up to 3; sharing saves 45.5% of 11"
    )
    assert "lists         [[0, 1, 2], [3, 4, -1]]" in batch.layout()
    assert "lists" not in pack([DESIGN])[0].layout()
    moved = batch.to("meta")
    assert moved.columns.lists is batch.columns.lists


def arrow(**columns):
    table = {key: [row[key] for row in MIXED] for key in ("prompt_ids", "responses_ids", "scores")}
    return pa.table({key: value for key, value in (table | columns).items() if value is not None})


BAD = [
    ({"ranks": [1, 2]}, r"examples\[1\]: ranks: expected 3 numbers, one a response, got 2"),
    ({"ranks": [1, float("nan"), 2]}, r"examples\[1\]: ranks\[1\]: expected a finite number, got nan"),
    ({"scores": [1.0, 2.0, float("inf")]}, r"examples\[1\]: scores\[2\]: expected a finite number, got inf"),
    ({"ranks": [4, 4, 4]}, r"examples\[1\]: all 3 responses are tied; expected one that is better than another"),
    ({"ranks": [1, 2, 3], "scores": [3, 1, 2]}, r"examples\[1\]: ranks and scores contradict each other: "
     r"responses_ids\[1\] has the better rank \(2, not 3\) and the lower score \(1, not 2\) than responses_ids\[2\]"),
    ({"responses_ids": [[3]], "ranks": [1]}, r"examples\[1\]: responses_ids: expected two responses or more, got 1"),
    ({"responses_ids": [[3], [4], [3]], "ranks": [1, 2, 3]},
     r"examples\[1\]: responses_ids\[0\] and responses_ids\[2\] are equal but of different rank"),
    ({"responses_ids": [[3], [], [4]], "ranks": [1, 2, 3]}, r"examples\[1\]: responses_ids\[1\] is empty"),
    ({"responses_ids": [[3], [-4], [4]], "ranks": [1, 2, 3]}, r"examples\[1\]: responses_ids\[1\]\[0\] is -4"),
    ({"ranks": [1, 2, 3], "weight": -1.0}, r"examples\[1\]: weight: expected a number that is 0 or more, got -1"),
    ({"ranks": [1, 2, 3], "weight": float("nan")}, r"examples\[1\]: weight: expected .* 0 or more, got nan"),
    ({"ranks": [1, 2, 3], "margin": float("inf")}, r"examples\[1\]: margin: expected a number that is finite, got inf"),
    ({"ranks": [1, 2, 3], "beta": 0.1}, r"examples\[0\]: no beta, unlike other examples; give it for every row or for"),
    ({"ranks": [1, 2, 3], "ref_responses_logps": [-1.0] * 3}, r"examples\[0\]: no reference log-probs, unlike other"),
    ({"ranks": [1, 2, 3], "responses_weights": [[1, 1, 1], [1], None]},
     r"examples\[1\]: responses_weights\[1\]: expected 2 numbers, one a token of the response, got 1"),
    ({"ranks": [1, 2, 3], "responses_weights": [[1, 1, 1], [1, -1], None]},
     r"examples\[1\]: responses_weights\[1\]\[1\]: expected a finite number of 0 or more, got -1"),
    ({"ranks": [1, 2, 3], "responses_weights": [[1, 1, 1], [0, 0], None]},
     r"examples\[1\]: responses_weights\[1\]: all weights are 0"),
    ({"ranks": [1, 2, 3], "responses_weights": [[1, 1, 1]]},
     r"examples\[1\]: responses_weights: expected 3 lists, one a response, got 1"),
    ({"ranks": [1, 2, 3], "chosen_weights": [1.0]}, "chosen_weights beside responses_ids; a list takes respon"),
    ({"ranks": [1, 2, 3], "ref_chosen_logps": -1.0}, "ref_chosen_logps beside responses_ids; a list takes ref_respon"),
    ({}, r"examples\[1\]: responses_ids needs ranks \(1 is the best\) or scores"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "message"), BAD)
def test_a_bad_list_is_named_in_mappings_and_in_columns(given, message):
    good = {"ranks": [1, 2, 3], "scores": [3, 2, 1]} if "scores" in given else {"ranks": [1, 2, 3]}
    rows = [ROW | good, ROW | given]
    with pytest.raises(ValueError, match=message):
        pack(rows)
    names = {name: None for row in rows for name in row}
    table = pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows])
    with pytest.raises(ValueError, match=message):
        pack(table)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ROW | {"ranks": [1, 2, 3]}, DESIGN], r"examples\[1\]: is a pair among lists; pack them in two calls"),
        ([DESIGN, ROW | {"ranks": [1, 2, 3]}], r"examples\[1\]: is a list among pairs; pack them in two calls"),
        ([ROW | {"branches": [[1], [2]], "pairs": [(0, 1)]}], "has both branches and responses_ids; give one form"),
        ([{"responses_ids": [[1], [2]]}], r"examples\[0\]: prompt_ids missing; expected .*; got responses_ids"),
        ([ROW | {"responses_ids": 7}], r"examples\[0\]: responses_ids: expected a list, got int"),
        ([ROW | {"responses_ids": [[1], [2.5]]}], r"examples\[0\]: responses_ids\[1\]: expected integers"),
        ([ROW | {"ranks": ["a", "b", "c"]}], r"examples\[0\]: ranks: expected numbers, got shape \(3,\) of <U1"),
        ([ROW | {"ranks": [1, None, 2]}], r"examples\[0\]: ranks: expected numbers, got shape \(3,\) of object"),
        ([ROW | {"scores": [1, 2, 3]}, ROW | {"ranks": [1, 2, 3]}], r"examples\[1\]: no scores, unlike other examples"),
        (arrow(prompt_ids=None), "the column prompt_ids is missing; expected prompt_ids, responses_ids"),
        (arrow(responses_ids=[[[1], [2]], None, [[3], [4]]]), r"examples\[1\]: responses_ids is null"),
        (arrow(responses_ids=[[[1], [2]], [[1], None], [[3], [4]]]), r"examples\[1\]: responses_ids\[1\] is null"),
        (
            arrow(responses_ids=[[[1], [2]], [[1], [None]], [[3], [4]]]),
            r"examples\[1\]: responses_ids\[1\] holds a null",
        ),
        (arrow(responses_ids=[[1], [2], [3]]), "responses_ids: expected lists of integers, got int64"),
        (arrow(responses_ids=[1, 2, 3]), "responses_ids: expected an Arrow column of lists, got int64"),
        (arrow(scores=["a", "b", "c"]), "scores: expected an Arrow column of lists, got string"),
        (arrow(scores=[["a"], ["b"], ["c"]]), "scores: expected numbers, got string"),
        (arrow(weight=["a", "b", "c"]), "weight: expected numbers, got string"),
        (
            {"prompt_ids": ([1], [0, 1]), "responses_ids": ([1, 2], [0, 1, 2])},
            "responses_ids: expected an Arrow column",
        ),
    ],
)
def test_a_list_that_cannot_be_read_is_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        pack(rows)
