"""share="prefix": what sequences begin with alike is one row of a micro-batch, and pairs that share it meet in one."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpofast import pack
from tests.support.examples import example, group
from tests.support.tries import naive_pack, unpadded

pytestmark = pytest.mark.slow(5)


@st.composite
def conversations(draw):
    """Rows whose prompts are system prompt + turns, taken from few, and whose responses begin alike up to somewhere."""
    systems = draw(st.lists(st.lists(st.integers(0, 3), max_size=12), min_size=1, max_size=3))
    turns = draw(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=4))
    rows = []
    for _ in range(draw(st.integers(1, 10))):
        history = draw(st.lists(st.sampled_from(turns), min_size=1, max_size=3))
        prompt = [*draw(st.sampled_from(systems)), *(token for turn in history for token in turn)]
        common = draw(st.lists(st.integers(0, 3), max_size=6))
        ends = draw(
            st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), min_size=2, max_size=4, unique_by=tuple)
        )
        branches = [[*common, *end] for end in ends]
        if len(branches) == 2:
            rows.append(example(prompt, *branches))
        else:
            rows.append(group(prompt, branches, [(k, k + 1) for k in range(len(branches) - 1)]))
    return rows


def triples(rows):
    """(example, prompt, chosen, rejected) of every pair."""
    found = []
    for index, row in enumerate(rows):
        branches = row.get("branches") or [row["chosen_ids"], row["rejected_ids"]]
        for chosen, rejected in row.get("pairs", [(0, 1)]):
            found.append((index, *map(tuple, (row["prompt_ids"], branches[chosen], branches[rejected]))))
    return found


def beginnings(pairs):
    """The distinct beginnings of all sequences without their last tokens: what a trie has one row for."""
    paths = {(*prompt, *response[:-1]) for _, prompt, *responses in pairs for response in responses}
    return {path[:length] for path in paths for length in range(1, len(path) + 1)}


def pairs_of(batch):
    sequences = unpadded(batch)
    return [
        (origin, *sequences[chosen], sequences[rejected][1])
        for origin, (chosen, rejected) in zip(batch.pair_examples.tolist(), batch.pairs.tolist(), strict=True)
    ]


budgets = given(conversations(), st.none() | st.integers(1, 80))


@budgets
def test_a_micro_batch_has_one_row_for_each_distinct_beginning(rows, max_tokens):
    batches = pack(rows, max_tokens)
    assert sorted(pair for batch in batches for pair in pairs_of(batch)) == sorted(triples(rows))
    for batch in batches:
        pairs = pairs_of(batch)
        assert batch.num_tokens == len(beginnings(pairs)) == len(naive_pack(pairs, "prefix")[0])


@budgets
def test_segments_end_at_forks_and_nowhere_else(rows, max_tokens):
    for batch in pack(rows, max_tokens):
        segments = batch.segments
        children = torch.bincount(segments.parents[segments.parents >= 0].long(), minlength=segments.num_segments)
        assert not bool((children == 1).any())
        assert bool((segments.cu_seqlens_q.diff() > 0).all())
        # Depth first: the children of a fork differ in their first token, and what follows a segment is its subtree.
        starts = segments.cu_seqlens_q[:-1].long()
        keys = set(zip(segments.parents.tolist(), batch.input_ids[starts].tolist(), strict=True))
        assert len(keys) == segments.num_segments
        assert torch.equal(segments.positions(), batch.position_ids)


@budgets
def test_no_micro_batch_is_too_large_and_the_plan_is_no_larger_than_with_prompts_shared_alone(rows, max_tokens):
    batches, before = pack(rows, max_tokens), pack(rows, max_tokens, share="prompt")
    assert sum(batch.num_tokens for batch in batches) <= sum(batch.num_tokens for batch in before)
    for batch in batches:
        pairs = pairs_of(batch)
        alone = {len(beginnings([pair])) for pair in pairs}
        assert max_tokens is None or batch.num_tokens <= max_tokens or batch.num_tokens in alone


@budgets
@settings(max_examples=200)
def test_sizes_do_not_depend_on_the_order_of_the_examples(rows, max_tokens):
    shuffled = random.Random(0).sample(rows, len(rows))
    first, second = pack(rows, max_tokens), pack(shuffled, max_tokens)
    assert [batch.num_tokens for batch in first] == [batch.num_tokens for batch in second]


def random_ids(rng, length):
    return rng.integers(0, 2**30, length).tolist()


def test_rows_of_one_system_prompt_meet_in_one_micro_batch():
    """Four system prompts of 300 tokens, 8 rows each of 50: two system prompts fit into 1,500, and not three."""
    rng = np.random.default_rng(0)
    systems = [random_ids(rng, 300) for _ in range(4)]
    rows = [
        example([*systems[k % 4], *random_ids(rng, 20)], random_ids(rng, 16), random_ids(rng, 16)) for k in range(32)
    ]
    batches = pack(rows, 1500)
    assert [batch.num_tokens for batch in batches] == [2 * (300 + 8 * 50)] * 2
    for batch in batches:
        assert len({int(row) % 4 for row in batch.pair_examples}) == 2
    assert sum(batch.num_tokens for batch in pack(rows, 1500, share="prompt")) == 32 * 350


def test_what_all_rows_share_is_paid_once_a_micro_batch():
    """2,000 shared tokens and 64 rows of 398: 16 rows of 8,368 - 2,000 fit into 8,400."""
    rng = np.random.default_rng(1)
    tools = random_ids(rng, 2000)
    rows = [example([*tools, *random_ids(rng, 100)], random_ids(rng, 150), random_ids(rng, 150)) for _ in range(64)]
    assert [batch.num_tokens for batch in pack(rows, 8400)] == [2000 + 16 * 398] * 4


def test_turns_of_one_conversation_continue_each_other():
    """Each turn's prompt is the one before it, its chosen response and a question: only what is new has rows."""
    rng = np.random.default_rng(2)
    prompt, rows, new = random_ids(rng, 50), [], 50
    for _ in range(5):
        chosen, rejected, question = random_ids(rng, 20), random_ids(rng, 30), random_ids(rng, 10)
        rows.append(example(prompt, chosen, rejected))
        prompt = [*prompt, *chosen, *question]
        new += 19 + 29 + (1 + 10)  # the chosen response's last token is a row of the next prompt
    (batch,) = pack(rows)
    assert batch.num_tokens == new - 11  # no turn follows the last


def test_a_pair_beyond_the_budget_leaves_the_sharing_of_the_others_as_it_is():
    prompts = [list(range(1, length + 1)) for length in range(1, 100)]
    rows = [example(prompt, [1000 + len(prompt)], [2000 + len(prompt)]) for prompt in prompts]
    assert [batch.num_tokens for batch in pack(rows, 200)] == [99]
    longer = example(list(range(1, 400)), [5], [6])
    assert [batch.num_tokens for batch in pack([*rows, longer], 200)] == [399, 99]


def test_a_response_that_forks_late_shares_its_beginning():
    (batch,) = pack([group([1, 2], [[3, 4, 5, 6], [3, 4, 7, 8, 9], [3, 4]], [(0, 1), (0, 2)])])
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 5, 7, 8]
    assert batch.segments.cu_seqlens_q.tolist() == [0, 4, 5, 7] and batch.segments.parents.tolist() == [-1, 0, 0]
    assert batch.logit_rows.tolist() == [1, 2, 3, 4, 1, 2, 3, 5, 6, 1, 2]
    assert unpadded(batch) == [((1, 2), (3, 4, 5, 6)), ((1, 2), (3, 4, 7, 8, 9)), ((1, 2), (3, 4))]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"share": "prompts"}, "share: expected prefix, prompt or none, got 'prompts'"),
        ({"share": True}, "share: expected prefix, prompt or none, got True"),
        ({"share_prompts": 1}, "share_prompts: expected True or False, got 1"),
        ({"share": "none", "share_prompts": True}, "share_prompts: True means share='prompt', got share='none'"),
    ],
)
def test_another_way_to_share_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        pack([example([1], [2], [3])], **arguments)
