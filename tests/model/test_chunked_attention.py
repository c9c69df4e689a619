"""Chunked attention in each backend against the rule written out: a row sees its path in its own chunk of positions."""

import dataclasses
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from dpofast import pack
from dpofast.model.attention import flex as attention_flex
from dpofast.model.attention.chunks import runs_of
from dpofast.model.attention.flex import block_mask, flex_attention_packed
from dpofast.model.attention.layout import AttentionOptions, PackedLayout
from dpofast.model.attention.sdpa import sdpa_attention
from dpofast.model.attention.varlen import varlen_attention
from tests.support.attention_cases import HEADS, KV_HEADS, LONG, WIDTH, gradients_of, packed_segments, random_inputs
from tests.support.flash_stand_in import flash_on_the_cpu
from tests.support.histories import histories

pytestmark = pytest.mark.slow(30)

OPTIONS = [AttentionOptions(), AttentionOptions(scaling=0.4, window=3)]


@st.composite
def tries(draw):
    """The segments of pairs over two letters, which begin alike and fork anywhere."""
    words = st.lists(st.sampled_from([3, 4]), min_size=1, max_size=12)
    pairs = draw(
        st.lists(st.tuples(words, words, words).filter(lambda pair: pair[1] != pair[2]), min_size=1, max_size=5)
    )
    examples = [{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in pairs]
    (batch,) = pack(examples, share="prefix")
    return batch.segments


def visible(segments, chunk, window):
    """(T, T) bool, from the path of every row."""
    seen = torch.zeros(segments.num_rows, segments.num_rows, dtype=torch.bool)
    for row, path in enumerate(histories(segments)):
        own = len(path) - 1
        for position, key in enumerate(path):
            seen[row, key] = position // chunk == own // chunk and own - position < (window or len(path))
    return seen


def written_out(query, key, value, seen, options):
    key, value = (part.repeat_interleave(HEADS // KV_HEADS, dim=1) for part in (key, value))
    scores = query @ key.transpose(2, 3) * (options.scaling or WIDTH**-0.5)
    return (scores.masked_fill(~seen, -torch.inf).softmax(dim=-1) @ value).transpose(1, 2)


@given(tries(), st.integers(1, 9))
def test_a_run_is_cut_where_a_chunk_begins(segments, chunk):
    runs, seen = runs_of(segments, chunk), visible(segments, chunk, None)
    keys = runs.key_rows().split(runs.cu_seqlens_k.diff().tolist())
    rows = torch.arange(segments.num_rows).split(runs.cu_seqlens_q.diff().tolist())
    assert len(keys) == len(rows) == len(runs.range_counts) and runs.range_counts.sum() == len(runs.ranges)
    for own, theirs in zip(rows, keys, strict=True):
        for number, row in enumerate(own):
            first = theirs[: len(theirs) - len(own) + number + 1]
            assert torch.equal(first.sort().values, seen[row].nonzero().squeeze(1))


@pytest.mark.parametrize("attend", [sdpa_attention, varlen_attention])
@given(tries(), st.integers(1, 9), st.sampled_from(OPTIONS))
def test_values_and_gradients_are_those_of_the_rule(attend, segments, chunk, options):
    options = dataclasses.replace(options, chunk=chunk)
    inputs = random_inputs(segments)
    upstream = torch.randn(1, segments.num_rows, HEADS, WIDTH)
    seen, layout = visible(segments, chunk, options.window), PackedLayout(segments)
    with flash_on_the_cpu():
        ours = gradients_of(lambda q, k, v, o: attend(q, k, v, layout, o), inputs, options, upstream)
    exact = [tensor.double() for tensor in inputs]
    truth = gradients_of(lambda q, k, v, o: written_out(q, k, v, seen, o), exact, options, upstream)
    for got, expected in zip(ours, truth, strict=True):
        torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attend", [sdpa_attention, flex_attention_packed])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("chunk", [7, 128, 200])
def test_long_rows_too(attend, options, chunk):
    segments = packed_segments(LONG)
    options = dataclasses.replace(options, chunk=chunk)
    inputs = random_inputs(segments)
    seen = visible(segments, chunk, options.window)
    exact = written_out(*(tensor.double() for tensor in inputs), seen, options)
    torch.testing.assert_close(attend(*inputs, PackedLayout(segments), options).double(), exact, atol=1e-5, rtol=1e-5)


@given(tries(), st.integers(1, 9), st.sampled_from([None, 1, 3]))
def test_the_blocks_that_flex_visits_are_those_with_visible_pairs(segments, chunk, window):
    rows, seen = segments.num_rows, visible(segments, chunk, window)
    with mock.patch.object(attention_flex, "_BLOCK", 4):
        ours = block_mask(segments, window, torch.device("cpu"), chunk)
    row, key = torch.arange(rows)[:, None], torch.arange(rows)
    assert torch.equal(ours.mask_mod(0, 0, row, key), seen)
    slow = create_block_mask(lambda b, h, q, k: seen[q, k], None, None, rows, rows, device="cpu", BLOCK_SIZE=4)
    for name in ("kv_num_blocks", "full_kv_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(slow, name))
    assert torch.equal(ours.to_dense(), slow.to_dense())


def test_full_and_chunked_layers_share_no_cache():
    segments = packed_segments({9: (4, 1, 6)})
    inputs, layout = random_inputs(segments), PackedLayout(segments)
    for attend in (sdpa_attention, varlen_attention, flex_attention_packed):
        for chunk in (None, 4, 5, None):
            options = AttentionOptions(chunk=chunk)
            exact = written_out(*inputs, visible(segments, chunk or 99, None), options)
            with flash_on_the_cpu():
                torch.testing.assert_close(attend(*inputs, layout, options), exact, atol=1e-5, rtol=1e-5)
