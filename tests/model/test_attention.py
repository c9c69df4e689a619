"""Each attention backend against attention written out in float64 from the position rule, and how one is chosen."""

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpofast import pack
from dpofast.model.attention import flex as attention_flex
from dpofast.model.attention import sdpa as attention_sdpa
from dpofast.model.attention import varlen as attention_varlen
from dpofast.model.attention.flex import block_mask, flex_attention_packed
from dpofast.model.attention.interface import _attention_over, attention_report, choose_attention, packed_attention
from dpofast.model.attention.layout import AttentionOptions, PackedLayout
from dpofast.model.attention.sdpa import sdpa_attention
from tests.support.attention_cases import (
    HEADS,
    LENGTHS,
    LONG,
    OPTIONS,
    WIDTH,
    FakeTensor,
    gradients_of,
    packed_segments,
    random_inputs,
    visibility,
    written_out,
)
from tests.support.deep_examples import DEEP, LONG_DEEP, depth, tries


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(
    ("examples", "score_bytes"),
    [(LENGTHS, 1 << 30), (DEEP, 1 << 30), (LONG, 1 << 18), (DEEP, 1 << 9), (LONG_DEEP, 1 << 18)],
    ids=["short", "deep", "long in chunks", "deep in chunks", "long and deep in chunks"],
)
def test_sdpa_equals_attention_written_out(examples, score_bytes, options, monkeypatch):
    monkeypatch.setattr(attention_sdpa, "_SCORE_BYTES", score_bytes)
    segments = packed_segments(examples)
    inputs = random_inputs(segments, value_width=12)
    upstream = torch.randn(1, inputs[0].shape[2], HEADS, 12)
    layout = PackedLayout(segments)
    ours = gradients_of(lambda q, k, v, o: sdpa_attention(q, k, v, layout, o), inputs, options, upstream)
    exact = [tensor.double() for tensor in inputs]
    truth = gradients_of(lambda q, k, v, o: written_out(q, k, v, segments, o), exact, options, upstream)
    for got, expected in zip(ours, truth, strict=True):
        torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(sdpa_attention(*inputs, layout, options), ours[0])


@pytest.mark.parametrize("options", [{"softcap": 2.0}, {}, {"window": 300}], ids=["scores", "mask", "window"])
def test_scores_and_masks_of_a_long_prompt_are_not_kept_for_backward(options, monkeypatch):
    monkeypatch.setattr(attention_sdpa, "_SCORE_BYTES", 64 << 10)
    segments = packed_segments({500: (2, 90)})
    inputs = [tensor.requires_grad_() for tensor in random_inputs(segments)]
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        sdpa_attention(*inputs, PackedLayout(segments), AttentionOptions(**options))
    largest = max(tensor.numel() for tensor in saved.values())
    assert largest <= 600 * HEADS * WIDTH < 90 * 590  # rows of K and V, never a block of scores or of a mask


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("examples", [LENGTHS, DEEP, LONG_DEEP], ids=["short", "deep", "long and deep"])
def test_flex_equals_attention_written_out(options, examples):
    segments = packed_segments(examples)
    inputs = random_inputs(segments, value_width=32)
    exact = written_out(*(tensor.double() for tensor in inputs), segments, options)
    ours = flex_attention_packed(*inputs, PackedLayout(segments), options)
    torch.testing.assert_close(ours.double(), exact, atol=1e-5, rtol=1e-5)


def test_the_deep_examples_fork_within_prompts_and_within_responses():
    for examples in (DEEP, LONG_DEEP):
        (batch,) = pack(examples)
        segments, prompts = batch.segments, batch.position_ids[batch.logit_rows[batch.cu_targets[:-1].long()]]
        assert depth(segments) >= 5
        # positions after which rows fork, against the ends of the prompts
        forks = segments.depths[segments.parents >= 0]
        assert forks.min() - 1 < prompts[0] and bool((forks - 1 > prompts[0]).any())


def marked(mask):
    """Two (blocks, blocks) bool of a BlockMask: blocks that are visited with its mask_mod, and those without it."""
    found = []
    for counts, columns in (
        (mask.kv_num_blocks, mask.kv_indices),
        (mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        blocks = torch.zeros(columns.shape[2:], dtype=torch.bool)
        for row, count in enumerate(counts[0, 0].tolist()):
            blocks[row, columns[0, 0, row, :count].long()] = True
        found.append(blocks)
    return found


def assert_blocks_are_exact(segments, window, block):
    rows, seen = segments.num_rows, visibility(segments, window)
    ours = block_mask(segments, window, torch.device("cpu"))
    row, key = torch.arange(rows)[:, None], torch.arange(rows)
    assert torch.equal(ours.mask_mod(0, 0, row, key), seen)
    count = -(-rows // block)
    padded = torch.zeros(block * count, block * count, dtype=torch.bool)
    padded[:rows, :rows] = seen
    blocks = padded.view(count, block, count, block).transpose(1, 2).flatten(2)
    partial, full = marked(ours)
    # a block counted as full is visited without asking the mask: it must be full
    assert torch.equal(full, blocks.all(2)) and torch.equal(partial, blocks.any(2) & ~blocks.all(2))


# Letters of one row, of a block of 4, and around it; windows that end inside a block, inside ancestors and nowhere
@given(tries(stretch=(1, 3, 4, 9)), st.sampled_from([None, 1, 3, 4, 5, 10, 40]))
def test_the_blocks_that_flex_visits_are_those_with_visible_pairs(examples, window):
    with mock.patch.object(attention_flex, "_BLOCK", 4):
        assert_blocks_are_exact(packed_segments(examples), window, 4)


@pytest.mark.parametrize("window", [None, 1, 130, 300])
@pytest.mark.parametrize("examples", [LONG, LONG_DEEP, {700: (1, 300), 260: (400, 130)}], ids=["long", "deep", "wide"])
def test_blocks_are_of_128_rows(examples, window):
    assert_blocks_are_exact(packed_segments(examples), window, 128)


@pytest.mark.gpu(twin="test_flex_equals_attention_written_out")
@pytest.mark.parametrize(
    ("dtype", "name"),
    # FlexAttention compiles 15 s for every dtype and option: all options in one of them, and one of all in the others.
    [*((torch.bfloat16, name) for name in OPTIONS), (torch.float16, "plain"), (torch.float16, "all")]
    + [(torch.float32, "plain"), (torch.float32, "all")],
)
@pytest.mark.parametrize("examples", [LENGTHS, LONG_DEEP], ids=["short", "long and deep"])
def test_cuda_backends_are_within_twice_the_error_of_sdpa(dtype, name, examples, device):
    segments, options = packed_segments(examples), OPTIONS[name]
    inputs = random_inputs(segments, dtype, device)
    upstream = torch.randn(1, inputs[0].shape[2], HEADS, WIDTH)
    layout = PackedLayout(segments)
    truth = gradients_of(
        lambda q, k, v, o: written_out(q, k, v, segments, o), [t.double() for t in inputs], options, upstream
    )
    own = gradients_of(lambda q, k, v, o: sdpa_attention(q, k, v, layout, o), inputs, options, upstream)
    ours = gradients_of(lambda q, k, v, o: packed_attention(q, k, v, layout, o), inputs, options, upstream)
    for got, other, expected in zip(ours, own, truth, strict=True):
        error, allowed = ((t.double() - expected).abs().max() for t in (got, other))
        assert error <= 2 * allowed + torch.finfo(dtype).eps * expected.abs().max()


@pytest.fixture
def capability(monkeypatch):
    def pretend(major):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))

    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    pretend(9)
    return pretend


@pytest.mark.parametrize(
    ("tensor", "options", "backend", "why"),
    [
        ({}, {}, "varlen", "FA2 over all segments"),
        ({"dtype": torch.float16}, {"window": 4}, "varlen", "FA2"),
        ({}, {"softcap": 50.0}, "flex", "not varlen: it has no softcap"),
        ({}, {"sinks": torch.zeros(4)}, "flex", "not varlen: it has no sinks"),
        ({"width": 512}, {}, "flex", "not varlen: it needs a head_dim that is a multiple of 8, at most 256"),
        ({"width": 12}, {}, "sdpa", "not flex: it needs a head_dim of at least 16"),
        ({}, {"dropout": 0.1}, "sdpa", "not varlen: it has no dropout; not flex: it has no dropout"),
        ({"dtype": torch.float32}, {}, "sdpa", "not varlen: it needs 16-bit numbers"),
        ({"dtype": torch.float32}, {"softcap": 50.0}, "flex", "not varlen: it needs 16-bit numbers"),
        ({"dtype": torch.float64}, {"softcap": 50.0}, "sdpa", "not flex: it has no float64"),
        ({"device": "cpu"}, {}, "sdpa", "not varlen: it needs an NVIDIA GPU; not flex: it trains on a GPU only"),
    ],
)
def test_a_backend_is_chosen_by_what_it_can(capability, tensor, options, backend, why):
    fake = FakeTensor(**tensor)
    chosen, reason = choose_attention(fake, fake, AttentionOptions(**options))
    assert chosen == backend and why in reason


def test_an_older_gpu_or_an_older_torch_leaves_varlen_out(capability, monkeypatch):
    fake = FakeTensor()
    wide = FakeTensor(width=64)
    assert choose_attention(fake, wide, AttentionOptions()) == (
        "flex",
        "not varlen: it needs values as wide as queries",
    )
    capability(7)
    assert choose_attention(fake, fake, AttentionOptions()) == ("flex", "not varlen: it needs compute capability 8.0")
    monkeypatch.setattr(attention_varlen, "_PARAMETERS", {"query": None})
    assert "no scale and window_size" in choose_attention(fake, fake, AttentionOptions())[1]


def test_the_report_names_a_backend_for_each_kind_of_layer():
    report = attention_report(torch.device("cpu"))
    assert list(report) == ["16-bit", "16-bit, softcap or sinks", "float32"]
    assert all(line.startswith("sdpa: segment by segment; not varlen: ") for line in report.values())


def test_a_position_bias_is_refused():
    segments = packed_segments(LENGTHS)
    attend = _attention_over("sdpa")
    with pytest.raises(ValueError, match="Identity: packed attention has no position_bias"):
        attend(
            torch.nn.Identity(),
            *random_inputs(segments),
            None,
            packed_layout=PackedLayout(segments),
            position_bias=torch.zeros(1, HEADS, 1, 1),
        )


def test_autocast_decides_the_dtype():
    segments = packed_segments(LENGTHS)
    query, key, value = random_inputs(segments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = packed_attention(query, key, value.bfloat16(), PackedLayout(segments), AttentionOptions(softcap=2.0))
    assert mixed.dtype == torch.bfloat16


@pytest.mark.slow(17)
def test_flex_compiles_once_for_all_layers_and_batches_of_a_length(monkeypatch):
    compiled = attention_flex._compiled()
    monkeypatch.setattr(attention_flex, "flex_attention", compiled)
    counters = torch._dynamo.utils.counters["stats"]
    before = counters["unique_graphs"]
    for prompt in (9, 8):
        segments = packed_segments({prompt: (17 - prompt, 3)})
        inputs, options = random_inputs(segments), AttentionOptions(softcap=2.0, window=6)
        for _ in range(2):
            layout = PackedLayout(segments)
            torch.testing.assert_close(
                flex_attention_packed(*inputs, layout, options), sdpa_attention(*inputs, layout, options)
            )
    assert counters["unique_graphs"] == before + 1
    assert attention_flex._compiled() is compiled


@pytest.mark.slow(15)
def test_flex_compiles_a_kind_of_layer_twice_at_most_whatever_the_lengths(monkeypatch):
    """First for the lengths that it meets, then for any; rows of one block, as the check at attach has, are apart."""
    compiled = torch.compile(attention_flex.flex_attention, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(attention_flex, "flex_attention", compiled)
    counters = torch._dynamo.utils.counters["stats"]
    before = counters["unique_graphs"]
    kinds = AttentionOptions(softcap=2.0), AttentionOptions(softcap=2.0, window=100)
    for lengths in ({9: (4, 6)}, {150: (90, 40)}, {300: (10, 300), 260: (40, 130)}, {128: (129, 129)}, {200: (1, 100)}):
        segments = packed_segments(lengths)
        inputs, layout = random_inputs(segments), PackedLayout(segments)
        for options in kinds:
            flex_attention_packed(*inputs, layout, options)
    assert counters["unique_graphs"] - before <= 2 * len(kinds)
