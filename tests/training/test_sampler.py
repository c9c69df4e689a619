"""Which pairs make up a step, and how ranks share them."""

import numpy as np
import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen2Config

from dpofast.training.parallel.work import AttentionWork
from dpofast.training.sampler import PairLengths, StepSampler, rank_shares
from tests.support.tiny import tiny_dataset, tiny_pairs


def lengths_of(prompts, chosen, rejected):
    rows = [
        {"prompt_ids": [key] * size, "chosen_ids": [1] * c, "rejected_ids": [2] * r}
        for (key, size), c, r in zip(prompts, chosen, rejected, strict=True)
    ]
    return PairLengths.of(Dataset.from_list(rows))


def test_lengths_are_read_in_order_from_any_part_of_a_table():
    pairs = tiny_pairs(3000)
    dataset = Dataset.from_list(pairs)
    for part, expected in ((dataset, pairs), (dataset.select(range(7, 2500)), pairs[7:2500])):
        lengths = PairLengths.of(part)
        assert lengths.prompts.tolist() == [len(e["prompt_ids"]) for e in expected]
        assert lengths.chosen.tolist() == [len(e["chosen_ids"]) for e in expected]
        own = [len(e["prompt_ids"]) + len(e["chosen_ids"]) + len(e["rejected_ids"]) - 2 for e in expected]
        assert lengths.positions.tolist() == own
        keys = {}
        for key, example in zip(lengths.prompt_keys.tolist(), expected, strict=True):
            assert keys.setdefault(key, example["prompt_ids"]) == example["prompt_ids"]
    assert len(PairLengths.of(dataset.select([])).positions) == 0


@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=40),
    st.integers(1, 6),
)
def test_shares_part_a_step_and_keep_prompts_together(rows, num_ranks):
    prompts = [(key, 5 + key) for key, _, _ in rows]
    lengths = lengths_of(prompts, [c for _, c, _ in rows], [r for _, _, r in rows])
    step = np.random.default_rng(0).permutation(len(rows))
    shares = rank_shares(lengths, step, num_ranks)
    assert len(shares) == num_ranks
    assert sorted(np.concatenate(shares).tolist()) == list(range(len(rows)))
    owners = {}
    for rank, share in enumerate(shares):
        assert [i for i in step if i in set(share.tolist())] == share.tolist()  # in the step's order
        for index in share:
            assert owners.setdefault(rows[index][0], rank) == rank
    loads = [_positions(lengths, share) for share in shares]
    largest = max(
        _positions(lengths, np.array([i for i in step if rows[i][0] == key])) for key in range(1, 7) if key in owners
    )
    assert max(loads) <= sum(loads) / num_ranks + largest


def _positions(lengths, share):
    """Packed positions of some pairs, equal prompts once."""
    if not len(share):
        return 0
    _, first = np.unique(lengths.prompt_keys[share], return_index=True)
    return int((lengths.positions[share] - lengths.prompts[share]).sum() + lengths.prompts[share][first].sum())


def test_ranks_compute_about_as_many_positions():
    lengths = PairLengths.of(tiny_dataset(512))
    shares = rank_shares(lengths, np.arange(512), 8)
    loads = [_positions(lengths, share) for share in shares]
    assert max(loads) - min(loads) <= 2


@pytest.mark.parametrize(
    ("count", "size", "drop_last", "expected"), [(21, 8, False, 3), (21, 8, True, 2), (16, 8, False, 2)]
)
def test_the_order_is_that_of_trainers_own_sampler(count, size, drop_last, expected):
    theirs = SeedableRandomSampler(range(count), generator=torch.Generator(), data_seed=7)
    ours = StepSampler(count, size, seed=7, drop_last=drop_last)
    assert len(ours) == expected
    for epoch in range(3):
        ours.set_epoch(epoch)
        steps = [list(share) for share in ours]
        order = list(theirs)[: expected * size]
        assert [index for step in steps for index in step] == order
        assert [len(step) for step in steps[:-1]] == [size] * (expected - 1)


def test_ranks_see_the_same_steps():
    lengths = PairLengths.of(tiny_dataset(21))
    samplers = [StepSampler(21, 8, seed=3, lengths=lengths, rank=rank, num_ranks=3) for rank in range(3)]
    for parts, whole in zip(zip(*samplers, strict=True), StepSampler(21, 8, seed=3), strict=True):
        assert sorted(index for part in parts for index in part) == sorted(whole)
        assert all(np.array_equal(part.step, list(whole)) for part in parts)


SMALL = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}  # Qwen2.5 0.5B
SMALL |= {"num_attention_heads": 14, "num_key_value_heads": 2}


def _operations(lengths, share):
    """Operations of some pairs' forward: products with every layer's weights, and queries with the keys they see."""
    hidden, width, layers, keys = 896, 4864, 24, 2 * 64
    weights = layers * (2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * width)
    total = 0
    for index in share:
        prompt, response = int(lengths.prompts[index]), int(lengths.chosen[index])  # both responses are as long
        seen = sum(range(1, prompt + 1)) + 2 * sum(range(prompt + 1, prompt + response))
        total += 2 * weights * int(lengths.positions[index]) + layers * 2 * 2 * hidden * seen
    return total


def test_ranks_have_as_much_work_where_some_rows_are_long():
    rows = [(16_000, 193)] + 448 * [(256, 129)]  # 16,384 and 512 positions
    dataset = Dataset.from_list(
        [
            {"prompt_ids": [key + 1] * size, "chosen_ids": [1] * length, "rejected_ids": [2] * length}
            for key, (size, length) in enumerate(rows)
        ]
    )
    heaviest = {}
    for name, attention in (("work", AttentionWork.of(Qwen2Config(**SMALL))), ("positions", AttentionWork())):
        lengths = PairLengths.of(dataset, attention)
        shares = rank_shares(lengths, np.arange(len(rows)), 8)
        loads = [_operations(lengths, share) for share in shares]
        heaviest[name] = max(loads) * 8 / sum(loads)
    assert heaviest["work"] < 1.02 and heaviest["positions"] > 1.4


def test_short_rows_are_divided_by_positions():
    large = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8
    )
    lengths = PairLengths.of(tiny_dataset(512), AttentionWork.of(large))
    plain = PairLengths.of(tiny_dataset(512))
    for ours, theirs in zip(
        rank_shares(lengths, np.arange(512), 8), rank_shares(plain, np.arange(512), 8), strict=True
    ):
        assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        (MistralConfig(sliding_window=5, num_hidden_layers=2), [5, 5]),
        (Qwen2Config(num_hidden_layers=2), [None, None]),
        (
            Gemma3TextConfig(
                sliding_window=7, num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"]
            ),
            [7, None],
        ),
    ],
    ids=["mistral", "qwen2", "gemma3"],
)
def test_a_window_bounds_what_a_position_sees(config, windows):
    work = AttentionWork.of(config)
    (cost,) = {round(cost / sum(seen == window for seen in windows), 12) for window, cost in work.kinds}
    lengths = np.array([1, 4, 5, 6, 30])
    expected = [
        sum(min(i, length if window is None else window) for window in windows for i in range(1, length + 1))
        for length in lengths.tolist()
    ]
    np.testing.assert_allclose(work.of_lengths(lengths), cost * np.array(expected), rtol=1e-6)
