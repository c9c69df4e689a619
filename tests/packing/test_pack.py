"""The packer: layout, deduplication, planning, round trips and errors."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpofast.packing.arguments import SHARED
from dpofast.packing.batch import PackedBatch
from dpofast.packing.pack import PackBuffers, pack
from dpofast.packing.segments import Segments
from tests.support.examples import DESIGN, example, group
from tests.support.histories import histories
from tests.support.tries import naive_pack, rows_of_pair, unpadded


def pair_lists(examples):
    """Every pair as (example, prompt, chosen, rejected), in input order, in plain Python."""
    found = []
    for index, row in enumerate(examples):
        branches = row.get("branches") or [row["chosen_ids"], row["rejected_ids"]]
        for chosen, rejected in row.get("pairs", [(0, 1)]):
            found.append((index, tuple(row["prompt_ids"]), tuple(branches[chosen]), tuple(branches[rejected])))
    return found


def batch_pairs(batches):
    found = []
    for batch in batches:
        sequences = unpadded(batch)
        for origin, (chosen, rejected) in zip(batch.pair_examples.tolist(), batch.pairs.tolist(), strict=True):
            assert sequences[chosen][0] == sequences[rejected][0]
            found.append((origin, sequences[chosen][0], sequences[chosen][1], sequences[rejected][1]))
    return found


def visible_rows(batch):
    """For every row the list of rows its query attends to, from the segments: causal, bottom-right."""
    runs = batch.segments.runs
    keys = runs.key_rows().split(runs.cu_seqlens_k.diff().tolist())
    bounds = runs.cu_seqlens_q.tolist()
    visible = []
    for rows, start, stop in zip(keys, bounds, bounds[1:], strict=False):
        visible += [rows[: len(rows) - (stop - 1 - row)].tolist() for row in range(start, stop)]
    return visible


# Three token ids and short responses, so that prompts and responses collide often.
ids = st.lists(st.integers(0, 2), min_size=1, max_size=5)


@st.composite
def rows(draw):
    prompt, branches = draw(ids), draw(st.lists(ids, min_size=2, max_size=5, unique_by=tuple))
    if draw(st.booleans()):
        return example(prompt, branches[0], branches[1])
    chain = [(k, k + 1) for k in range(len(branches) - 1)]
    every = [(a, b) for a in range(len(branches)) for b in range(len(branches)) if a != b]
    return group(prompt, branches, chain + draw(st.lists(st.sampled_from(every), max_size=4)))


examples_and_budget = given(st.lists(rows(), max_size=12), st.none() | st.integers(1, 60), st.sampled_from(SHARED))


def test_design_example():
    (batch,) = pack([DESIGN])
    assert batch.input_ids.tolist() == [10, 11, 12, 20, 30, 31]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 3, 4]
    assert batch.segments.cu_seqlens_q.tolist() == [0, 3, 4, 6]
    assert batch.segments.parents.tolist() == [-1, 0, 0]
    assert batch.segments.runs.cu_seqlens_q.tolist() == [0, 4, 6]
    assert batch.segments.runs.key_rows().tolist() == [0, 1, 2, 3, 0, 1, 2, 4, 5]
    assert batch.segments.runs.cu_seqlens_k.tolist() == [0, 4, 9]
    assert batch.logit_rows.tolist() == [2, 3, 2, 4, 5]
    assert batch.targets.tolist() == [20, 21, 30, 31, 32]
    assert batch.cu_targets.tolist() == [0, 2, 5]
    assert batch.pairs.tolist() == [[0, 1]]
    assert batch.pair_examples.tolist() == [0]
    assert batch.ref_logps is None
    assert batch.padded_tokens == 12
    assert (batch.num_tokens, batch.num_targets, batch.num_sequences, batch.num_pairs) == (6, 5, 2, 1)
    assert batch.segments.num_segments == 3
    for tensor in (batch.input_ids, batch.position_ids, batch.logit_rows, batch.targets, batch.pair_examples):
        assert tensor.dtype == torch.int64
    for tensor in (batch.cu_targets, batch.pairs, batch.segments.cu_seqlens_q, batch.segments.parents):
        assert tensor.dtype == torch.int32
    assert batch.segments.runs.cu_seqlens_k.dtype == torch.int32


@examples_and_budget
def test_every_pair_once_within_budget(examples, max_tokens, share):
    batches = pack(examples, max_tokens, share=share)
    assert sorted(batch_pairs(batches)) == sorted(pair_lists(examples))
    assert [batch.num_tokens for batch in batches] == sorted((b.num_tokens for b in batches), reverse=True)
    for batch in batches:
        assert batch.pair_examples.tolist() == sorted(batch.pair_examples.tolist())
        if max_tokens is not None and batch.num_tokens > max_tokens:
            # Only one pair may pass the budget; others are with it if they add nothing.
            assert batch.num_tokens in {rows_of_pair(p, c, r, share) for _, p, c, r in batch_pairs([batch])}


@examples_and_budget
def test_layout_and_visible_rows_against_plain_python(examples, max_tokens, share):
    for batch in pack(examples, max_tokens, share=share):
        pairs = batch_pairs([batch])
        tokens, positions, logit_rows, targets, sequences, visible = naive_pack(pairs, share)
        assert batch.input_ids.tolist() == tokens
        assert batch.position_ids.tolist() == positions
        assert batch.logit_rows.tolist() == logit_rows
        assert batch.targets.tolist() == targets
        assert unpadded(batch) == sequences
        assert visible_rows(batch) == visible == histories(batch.segments)
        longest = max(len(prompt) + max(len(chosen), len(rejected)) for _, prompt, chosen, rejected in pairs)
        assert batch.padded_tokens == 2 * len(pairs) * longest


@examples_and_budget
def test_each_target_sees_its_own_history_only(examples, max_tokens, share):
    for batch in pack(examples, max_tokens, share=share):
        visible, bounds = visible_rows(batch), batch.cu_targets.tolist()
        for s, (prompt, response) in enumerate(unpadded(batch)):
            for i, target in enumerate(range(bounds[s], bounds[s + 1])):
                history = visible[batch.logit_rows[target]]
                assert batch.input_ids[history].tolist() == [*prompt, *response[:i]]
                assert batch.position_ids[history].tolist() == list(range(len(prompt) + i))


@pytest.mark.slow(5)
@examples_and_budget
@settings(max_examples=200)
def test_batch_sizes_do_not_depend_on_the_order(examples, max_tokens, share):
    shuffled = random.Random(0).sample(examples, len(examples))
    first, second = (pack(order, max_tokens, share=share) for order in (examples, shuffled))
    assert [batch.num_tokens for batch in first] == [batch.num_tokens for batch in second]


def test_six_pairs_from_four_completions_cost_four_branches():
    branches = [[1, 2, 3], [4, 5], [6], [7, 8, 9, 10]]
    pairs = [(a, b) for a in range(4) for b in range(a + 1, 4)]
    (grouped,) = pack([group([50, 51], branches, pairs)])
    (merged,) = pack([example([50, 51], branches[a], branches[b]) for a, b in pairs])
    for batch in (grouped, merged):
        assert batch.num_tokens == 2 + sum(len(branch) - 1 for branch in branches)
        assert [response for _, response in unpadded(batch)] == [tuple(branch) for branch in branches]
        assert batch.pairs.tolist() == [list(pair) for pair in pairs]
    assert grouped.pair_examples.tolist() == [0] * 6
    assert merged.pair_examples.tolist() == list(range(6))


def test_equal_prompts_of_different_examples_share_rows_wherever_they_stand():
    (batch,) = pack([example([1, 2], [3, 4], [5, 6]), example([9], [3, 4], [5]), example([1, 2], [7, 8], [3, 4])])
    assert batch.input_ids.tolist() == [1, 2, 3, 5, 7, 9, 3]
    assert batch.pairs.tolist() == [[0, 1], [3, 4], [2, 0]]


def test_a_branch_of_one_token_has_no_position_and_no_segment():
    (batch,) = pack([group([1, 2], [[3], [4], [5, 6]], [(0, 1), (0, 2)])])
    assert batch.input_ids.tolist() == [1, 2, 5]
    assert batch.segments.cu_seqlens_q.tolist() == [0, 3]
    assert batch.segments.parents.tolist() == [-1]
    assert batch.logit_rows.tolist() == [1, 1, 1, 2]
    assert batch.cu_targets.tolist() == [0, 1, 2, 4]


def test_share_prompts_false_copies_the_prompt_for_every_branch():
    shared, copied = pack([DESIGN]), pack([DESIGN], share_prompts=False)
    assert copied[0].input_ids.tolist() == [10, 11, 12, 20, 10, 11, 12, 30, 31]
    assert copied[0].segments.parents.tolist() == [-1, -1]
    assert copied[0].segments.runs.key_rows().tolist() == list(range(9))
    assert torch.equal(copied[0].targets, shared[0].targets)
    assert len(pack([DESIGN, example([1], [2], [3])], 9)) == 1
    assert len(pack([DESIGN, example([1], [2], [3])], 9, share_prompts=False)) == 2


def test_a_group_that_fits_stays_in_one_batch():
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 100, 20).tolist() for _ in range(30)]
    examples = [
        example(prompts[i % 30], rng.integers(0, 100, 8).tolist(), rng.integers(0, 100, 9).tolist()) for i in range(120)
    ]
    batches = pack(examples, 256, share="prompt")
    assert sum(batch.num_tokens for batch in batches) == 30 * (20 + 4 * (7 + 8))
    for prompt in range(30):
        assert sum(bool((batch.pair_examples % 30 == prompt).any()) for batch in batches) == 1


def test_a_group_larger_than_the_budget_is_split_between_components_first():
    # Three components of 10 rows each on a prompt of 4: two of them fit into 24 rows.
    branches = [[10 * k + i for i in range(6)] for k in range(6)]
    batches = pack([group([1, 2, 3, 4], branches, [(0, 1), (2, 3), (4, 5)])], 24)
    assert [batch.num_tokens for batch in batches] == [24, 14]
    # One component of four branches with every pair: no split avoids repeating branches, but pairs stay whole.
    pairs = [(a, b) for a in range(4) for b in range(a + 1, 4)]
    batches = pack([group([1, 2, 3, 4], branches[:4], pairs)], 19)
    assert sum(batch.num_pairs for batch in batches) == 6
    assert max(batch.num_tokens for batch in batches) <= 19


def test_a_pair_longer_than_the_budget_goes_alone():
    batches = pack([example([1], [2], [3]), example([4] * 9, [5] * 9, [6] * 9), example([7], [8], [9])], 8)
    assert [batch.num_tokens for batch in batches] == [25, 2]
    assert batches[0].pair_examples.tolist() == [1]
    # A prompt beyond the budget leaves no room to share, but for what adds no token.
    batches = pack([group([1] * 9, [[2], [3], [5, 6], [7, 8]], [(0, 2), (0, 1), (1, 3)])], 8)
    assert [batch.num_tokens for batch in batches] == [10, 10]
    assert sorted(batch.num_pairs for batch in batches) == [1, 2]


def test_contradicting_and_repeated_pairs_are_kept():
    (batch,) = pack([example([1], [2], [3]), example([1], [3], [2]), example([1], [2], [3])])
    assert batch.num_sequences == 2
    assert batch.pairs.tolist() == [[0, 1], [1, 0], [0, 1]]


@pytest.mark.parametrize("make", [list, tuple, torch.tensor, np.int32, np.int64, np.uint16, np.uint64])
def test_any_integer_sequence_is_accepted(make):
    (batch,) = pack([{key: make(value) for key, value in DESIGN.items()}])
    assert torch.equal(batch.input_ids, pack([DESIGN])[0].input_ids)


def test_a_table_may_mix_both_forms():
    empty = dict.fromkeys(("chosen_ids", "rejected_ids", "branches", "pairs"))
    (batch,) = pack([empty | DESIGN, empty | group([10, 11, 12], [[20, 21], [7]], [(0, 1)])])
    assert batch.pairs.tolist() == [[0, 1], [0, 2]]


def test_rows_of_a_strided_array_are_accepted():
    table = np.arange(12, dtype=np.int32).reshape(3, 4).T
    (batch,) = pack([example(table[0], table[1], table[2])])
    assert batch.input_ids.tolist() == [0, 4, 8, 1, 5, 2, 6]


def test_no_examples_make_no_batches():
    assert pack([]) == []
    assert pack(iter([]), 16) == []


def test_reference_logps_follow_their_sequences():
    refs = {"ref_chosen_logps": np.float32(-1.5), "ref_rejected_logps": torch.tensor(-2.5)}
    (batch,) = pack([DESIGN | refs, group([10, 11, 12], [[30, 31, 32], [7]], [(1, 0)], ref_logps=[-2.5004, -4.0])])
    assert batch.ref_logps.dtype == torch.float32
    assert batch.ref_logps.tolist() == [-1.5, -2.5, -4.0]
    (batch,) = pack([DESIGN | {"ref_chosen_logps": None, "ref_rejected_logps": None}])
    assert batch.ref_logps is None


def test_reference_logps_of_equal_branches_must_agree():
    refs = {"ref_chosen_logps": -1.5, "ref_rejected_logps": -2.5}
    other = {"ref_chosen_logps": -1.502, "ref_rejected_logps": -4.0}
    with pytest.raises(ValueError, match=r"examples\[2\]: reference log-prob -1\.502 .* examples\[1\] holds"):
        pack([example([1], [2], [3], **refs), DESIGN | refs, example([10, 11, 12], [20, 21], [7], **other)])


def test_to_moves_device_tensors_only():
    (batch,) = pack([DESIGN | {"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0}])
    moved = batch.to("meta")
    assert isinstance(moved, PackedBatch)
    for name in ("input_ids", "position_ids", "logit_rows", "targets", "ref_logps"):
        assert getattr(moved, name).device.type == "meta"
        assert getattr(moved, name).shape == getattr(batch, name).shape
    for name in ("cu_targets", "pairs", "pair_examples", "segments"):
        assert getattr(moved, name) is getattr(batch, name)
    assert pack([DESIGN])[0].to("cpu").ref_logps is None


def test_buffers_are_reused():
    buffers = PackBuffers()
    (first,) = pack([DESIGN], buffers=buffers)
    (second,) = pack([example([1, 2, 3], [4, 5], [6, 7, 8])], buffers=buffers)
    assert first.input_ids.data_ptr() == second.input_ids.data_ptr()
    assert second.input_ids.tolist() == first.input_ids.tolist() == [1, 2, 3, 4, 6, 7]
    many = pack([DESIGN, example([1, 2, 3], [4, 5], [6, 7, 8])], 6, buffers=buffers)
    assert [batch.num_pairs for batch in many] == [1, 1]
    assert unpadded(many[1])[0][0] == (1, 2, 3)


@examples_and_budget
def test_threads_write_the_same(examples, max_tokens, share):
    one, three = (pack(examples, max_tokens, share=share, num_threads=count) for count in (1, 3))
    for a, b in zip(one, three, strict=True):
        for name in ("input_ids", "position_ids", "logit_rows", "targets", "cu_targets", "pairs", "pair_examples"):
            assert torch.equal(getattr(a, name), getattr(b, name))
        assert torch.equal(a.segments.cu_seqlens_q, b.segments.cu_seqlens_q)
        assert torch.equal(a.segments.parents, b.segments.parents)


@given(st.lists(rows(), max_size=12), st.integers(1, 60), st.integers(1, 20))
def test_max_targets_is_kept(examples, max_tokens, max_targets):
    batches = pack(examples, max_tokens, max_targets=max_targets)
    assert sorted(batch_pairs(batches)) == sorted(pair_lists(examples))
    for batch in batches:
        pairs = batch_pairs([batch])
        assert batch.num_targets <= max_targets or batch.num_targets in {len(c) + len(r) for _, _, c, r in pairs}
        assert batch.num_tokens <= max_tokens or batch.num_tokens in {
            rows_of_pair(p, c, r, "prefix") for _, p, c, r in pairs
        }


def test_pin_memory_needs_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="pin_memory needs CUDA"):
        PackBuffers(pin_memory=True)
    with pytest.raises(ValueError, match="pin_memory needs CUDA"):
        pack([DESIGN])[0].pin_memory()


def test_keys_beyond_int32_are_refused():
    rows = 2**30
    bounds = torch.tensor([0, rows, rows + 1, rows + 2], dtype=torch.int32)
    segments = Segments(bounds, torch.tensor([-1, 0, 0], dtype=torch.int32))
    with pytest.raises(ValueError, match="the segments see 2147483650 keys; int32 allows"):
        _ = segments.runs
