"""Packing in a DataLoader, and steps that keep the pairs of one prompt together."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from dpofast import PackBuffers, PackedBatch, PackingCollator, PromptGroupSampler, group_by_prompt, pack
from tests.support.tiny import tiny_pairs


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_loader_yields_the_micro_batches_of_a_step(workers):
    examples = tiny_pairs(10)
    loader = DataLoader(examples, batch_size=4, collate_fn=PackingCollator(max_tokens=40), num_workers=workers)
    steps = list(loader)
    assert len(steps) == 3
    for k, step in enumerate(steps):
        expected = pack(examples[4 * k : 4 * k + 4], 40)
        assert [batch.input_ids.tolist() for batch in step] == [batch.input_ids.tolist() for batch in expected]
        assert all(batch.num_tokens <= 40 for batch in step)


def test_without_bounds_one_batch_comes():
    examples = tiny_pairs(3)
    batch = PackingCollator()(examples)
    assert isinstance(batch, PackedBatch) and batch.num_pairs == 3
    assert isinstance(PackingCollator(max_targets=1000)(examples), list)
    with pytest.raises(ValueError, match="examples: expected at least one for a single batch"):
        PackingCollator()([])


def test_options_reach_pack():
    buffers = PackBuffers()
    collate = PackingCollator(100, share_prompts=False, buffers=buffers, max_targets=50, num_threads=2)
    (batch,) = collate(tiny_pairs(1))
    assert torch.equal(batch.input_ids, pack(tiny_pairs(1), share_prompts=False)[0].input_ids)
    assert buffers.take(1, 1)[0].data_ptr() == batch.input_ids.data_ptr()
    with pytest.raises(ValueError, match="below vocab_size 4"):
        PackingCollator(100, vocab_size=4)(tiny_pairs(3))
    with pytest.raises(ValueError, match="max_tokens: expected None or an integer in"):
        PackingCollator(0)
    with pytest.raises(ValueError, match="max_targets: expected None or an integer in"):
        PackingCollator(1, max_targets=0)


@given(st.lists(st.integers(0, 6), max_size=40), st.integers(1, 8), st.integers(0, 3))
def test_steps_keep_prompts_together(prompts, pairs_per_step, seed):
    steps = group_by_prompt(prompts, pairs_per_step, seed=seed)
    assert sorted(i for step in steps for i in step) == list(range(len(prompts)))
    for step in steps:
        assert 1 <= len(step) <= pairs_per_step
        assert step.tolist() == sorted(step.tolist())
    for prompt in set(prompts):
        count = prompts.count(prompt)
        inside = [sum(prompts[i] == prompt for i in step) for step in steps]
        assert sum(n > 0 for n in inside) == -(-count // pairs_per_step)
    again = group_by_prompt(prompts, pairs_per_step, seed=seed)
    assert [step.tolist() for step in again] == [step.tolist() for step in steps]
    full = group_by_prompt(prompts, pairs_per_step, seed=seed, drop_last=True)
    assert [step.tolist() for step in full] == [s.tolist() for s in steps if len(s) == pairs_per_step]


def test_distinct_prompts_fill_every_step_but_the_last():
    assert [len(step) for step in group_by_prompt(range(10), 4)] == [4, 4, 2]
    orders = {tuple(np.concatenate(group_by_prompt(range(10), 4, seed=seed)).tolist()) for seed in range(4)}
    assert len(orders) > 1


@pytest.mark.parametrize("make", [list, tuple, np.array, torch.tensor])
def test_prompts_may_be_token_ids(make):
    prompts = [make(ids) for ids in ([1, 2], [3], [1, 2], [3], [1, 2, 3])]
    steps = group_by_prompt(prompts, 2)
    assert sorted(step.tolist() for step in steps) == [[0, 2], [1, 3], [4]]


def test_prompts_with_images_are_equal_where_text_and_images_are():
    ids, keys = [[1, 90], np.array([1, 90]), [1, 90], [2, 90]], [b"a", b"a", b"b", b"a"]
    prompts = [(one, key) for one, key in zip(ids, keys, strict=True)] + [([1, 90], b"b")]
    assert sorted(step.tolist() for step in group_by_prompt(prompts, 2)) == [[0, 1], [2, 4], [3]]
    assert sorted(PromptGroupSampler(prompts, 2)) == [[0, 1], [2, 4], [3]]


def test_sampler_changes_with_the_epoch_alone():
    prompts = [[i // 2] for i in range(12)]
    sampler = PromptGroupSampler(prompts, 4, seed=3)
    first = list(sampler)
    assert list(sampler) == first and len(sampler) == 3
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first
    other = PromptGroupSampler(prompts, 4, seed=3)
    other.set_epoch(1)
    assert list(other) == second
    loader = DataLoader(list(range(12)), batch_sampler=sampler, collate_fn=list)
    assert list(loader) == second


@pytest.mark.parametrize("size", [0, 1.5, True])
def test_bad_step_sizes(size):
    with pytest.raises(ValueError, match="pairs_per_step: expected an integer in"):
        group_by_prompt([1], size)
    with pytest.raises(ValueError, match="pairs_per_step: expected an integer in"):
        PromptGroupSampler([1], size)
