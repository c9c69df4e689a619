"""Each attention backend against attention written out in float64 from the position rule, and how one is chosen."""

import dataclasses

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from dpofast import pack
from dpofast.model.attention import flex as attention_flex
from dpofast.model.attention import sdpa as attention_sdpa
from dpofast.model.attention import varlen as attention_varlen
from dpofast.model.attention.flex import block_mask, flex_attention_packed
from dpofast.model.attention.interface import _attention_over, attention_report, choose_attention, packed_attention
from dpofast.model.attention.layout import AttentionOptions, PackedLayout
from dpofast.model.attention.sdpa import sdpa_attention
from dpofast.model.attention.varlen import varlen_attention

HEADS, KV_HEADS, WIDTH = 4, 2, 16
LENGTHS = {9: (4, 1, 6), 1: (3, 1), 14: (2, 2, 9, 1)}
LONG = {150: (90, 40, 260), 3: (5, 140), 128: (129, 129)}
OPTIONS = {
    "plain": AttentionOptions(),
    "scaled": AttentionOptions(scaling=0.5),
    "window": AttentionOptions(window=4),
    "softcap": AttentionOptions(softcap=2.0),
    "sinks": AttentionOptions(sinks=torch.tensor([0.5, -1.0, 2.0, 0.0])),
    "all": AttentionOptions(scaling=0.4, window=5, softcap=1.5, sinks=torch.tensor([0.1, 1.0, -2.0, 3.0])),
}


def packed_segments(lengths):
    """The segments of groups: prompt length -> response lengths."""
    examples = [
        {
            "prompt_ids": [prompt] * prompt,
            "branches": [[branch] * length for branch, length in enumerate(responses)],
            "pairs": [(0, branch) for branch in range(1, len(responses))],
        }
        for prompt, responses in lengths.items()
    ]
    (batch,) = pack(examples)
    return batch.segments


def random_inputs(segments, dtype=torch.float32, device="cpu", value_width=WIDTH):
    rows = int(segments.cu_seqlens_q[-1])
    shapes = (HEADS, WIDTH), (KV_HEADS, WIDTH), (KV_HEADS, value_width)
    return [torch.randn(1, heads, rows, width).to(device, dtype) for heads, width in shapes]


def written_out(query, key, value, segments, options):
    """Every segment's keys in order of position; scores, softcap, mask, sinks and softmax as they are defined."""
    outputs = []
    bounds = segments.cu_seqlens_q.tolist()
    for g, (low, high) in enumerate(segments.prefixes.tolist()):
        rows = [*range(low, high), *range(bounds[g], bounds[g + 1])]
        k, v = (tensor[:, :, rows].repeat_interleave(HEADS // KV_HEADS, dim=1) for tensor in (key, value))
        q = query[:, :, bounds[g] : bounds[g + 1]]
        scores = q @ k.transpose(2, 3) * (WIDTH**-0.5 if options.scaling is None else options.scaling)
        if options.softcap is not None:
            scores = options.softcap * torch.tanh(scores / options.softcap)
        distance = torch.arange(high - low, len(rows))[:, None] - torch.arange(len(rows))
        hidden = (distance < 0) | (distance >= (options.window or len(rows)))
        scores = scores.masked_fill(hidden.to(scores.device), -torch.inf)
        if options.sinks is not None:
            sink = options.sinks.to(scores).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat((scores, sink), dim=-1)
        outputs.append(scores.softmax(dim=-1)[..., : len(rows)] @ v)
    return torch.cat(outputs, dim=2).transpose(1, 2)


def gradients_of(attend, inputs, options, upstream):
    """The output of attend and the gradients of its inputs, the sinks among them."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    if options.sinks is not None:
        leaves.append(options.sinks.to(inputs[0]).detach().clone().requires_grad_())
        options = dataclasses.replace(options, sinks=leaves[-1])
    output = attend(*leaves[:3], options)
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream.to(output))]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(
    ("lengths", "score_bytes"),
    [(LENGTHS, 1 << 30), (LONG, 1 << 30), (LENGTHS, 1 << 9), (LONG, 1 << 18)],
    ids=["short", "long", "short in chunks", "long in chunks"],
)
def test_sdpa_equals_attention_written_out(lengths, score_bytes, options, monkeypatch):
    monkeypatch.setattr(attention_sdpa, "_SCORE_BYTES", score_bytes)
    segments = packed_segments(lengths)
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


def test_scores_of_a_long_prompt_are_not_kept_for_backward(monkeypatch):
    monkeypatch.setattr(attention_sdpa, "_SCORE_BYTES", 64 << 10)
    segments = packed_segments({500: (2, 3)})
    inputs = [tensor.requires_grad_() for tensor in random_inputs(segments)]
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        sdpa_attention(*inputs, PackedLayout(segments), AttentionOptions(softcap=2.0))
    largest = max(tensor.numel() for tensor in saved.values())
    assert largest <= 500 * HEADS * WIDTH < 500 * 500  # rows of K and V, never a block of scores


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("lengths", [LENGTHS, LONG], ids=["short", "long"])
def test_flex_equals_sdpa(options, lengths):
    segments = packed_segments(lengths)
    inputs = random_inputs(segments, value_width=32)
    layout = PackedLayout(segments)
    torch.testing.assert_close(
        flex_attention_packed(*inputs, layout, options), sdpa_attention(*inputs, layout, options), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("window", [None, 1, 4, 130, 300])
@pytest.mark.parametrize("lengths", [LENGTHS, LONG, {700: (1, 300), 260: (400, 130)}], ids=["short", "long", "wide"])
def test_the_blocks_that_flex_visits_are_those_with_visible_pairs(lengths, window):
    segments = packed_segments(lengths)
    rows = int(segments.cu_seqlens_q[-1])
    ours = block_mask(segments, window, torch.device("cpu"))
    slow = create_block_mask(ours.mask_mod, None, None, rows, rows, device="cpu")
    assert torch.equal(ours.to_dense(), slow.to_dense())
    # A block counted as full is visited without asking the mask: it must be full.
    count = -(-rows // 128)
    row, key = torch.arange(rows)[:, None], torch.arange(rows)
    visible = torch.zeros(128 * count, 128 * count, dtype=torch.bool)
    visible[:rows, :rows] = ours.mask_mod(0, 0, row, key)
    whole = visible.view(count, 128, count, 128).all(dim=3).all(dim=1)
    counts, columns = ours.full_kv_num_blocks[0, 0], ours.full_kv_indices[0, 0]
    marked = torch.zeros(count, count, dtype=torch.bool)
    for block in range(count):
        marked[block, columns[block, : counts[block]].long()] = True
    assert torch.equal(marked, whole)


def varlen_as_documented(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    """torch's varlen_attn as its documentation and FlashAttention's define it: bottom-right, windows inclusive."""
    assert query.ndim == key.ndim == value.ndim == 3 and cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert max_q == cu_seq_q.diff().max() and max_k == cu_seq_k.diff().max()
    assert cu_seq_k[-1] == len(key) == len(value) and cu_seq_q[-1] == len(query)
    if enable_gqa:
        key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value))
    assert query.shape[1:] == key.shape[1:]
    outputs = []
    for g in range(len(cu_seq_q) - 1):
        q, k, v = (
            tensor[bounds[g] : bounds[g + 1]].transpose(0, 1)
            for tensor, bounds in ((query, cu_seq_q), (key, cu_seq_k), (value, cu_seq_k))
        )
        distance = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1] - torch.arange(k.shape[1])
        left, right = window_size
        seen = ((left < 0) | (distance <= left)) & ((right < 0) | (distance >= -right))
        scores = (q @ k.transpose(1, 2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
        outputs.append((scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("has_gqa", [True, False])
@pytest.mark.parametrize("lengths", [LENGTHS, LONG, {6: (3, 1)}], ids=["short", "long", "no prefix"])
@pytest.mark.parametrize("window", [None, 1, 4, 1000])
def test_varlen_gets_the_arguments_that_its_documentation_asks_for(window, lengths, has_gqa, monkeypatch):
    monkeypatch.setattr(attention_varlen, "varlen_attn", varlen_as_documented)
    monkeypatch.setattr(attention_varlen, "_HAS_GQA", has_gqa)
    segments = packed_segments(lengths)
    inputs, options = random_inputs(segments), AttentionOptions(scaling=0.3, window=window)
    upstream = torch.randn(1, inputs[0].shape[2], HEADS, WIDTH)
    layout = PackedLayout(segments)
    results = [
        gradients_of(lambda q, k, v, o, attend=attend: attend(q, k, v, layout, o), inputs, options, upstream)
        for attend in (varlen_attention, sdpa_attention)
    ]
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_a_window_of_w_is_w_minus_1_keys_to_the_left():
    assert attention_varlen._keys_to_the_left(None, 9) == -1
    assert attention_varlen._keys_to_the_left(9, 9) == -1
    assert attention_varlen._keys_to_the_left(8, 9) == 7
    assert attention_varlen._keys_to_the_left(1, 9) == 0


@pytest.mark.gpu(twin="test_varlen_gets_the_arguments_that_its_documentation_asks_for")
@pytest.mark.parametrize(
    ("dtype", "name"),
    # FlexAttention compiles 15 s for every dtype and option: all options in one of them, and one of all in the others.
    [*((torch.bfloat16, name) for name in OPTIONS), (torch.float16, "plain"), (torch.float16, "all")]
    + [(torch.float32, "plain"), (torch.float32, "all")],
)
@pytest.mark.parametrize("lengths", [LENGTHS, LONG], ids=["short", "long"])
def test_cuda_backends_are_within_twice_the_error_of_sdpa(dtype, name, lengths, device):
    segments, options = packed_segments(lengths), OPTIONS[name]
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


class FakeTensor:
    """A tensor's device, dtype and shape, for choices on devices that are not here."""

    def __init__(self, device="cuda", dtype=torch.bfloat16, width=128):
        self.device, self.dtype, self.shape = torch.device(device), dtype, (1, 4, 10, width)


@pytest.fixture
def capability(monkeypatch):
    def pretend(major):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))

    pretend(9)
    return pretend


@pytest.mark.parametrize(
    ("tensor", "options", "backend", "why"),
    [
        ({}, {}, "varlen", "FlashAttention over all segments"),
        ({"dtype": torch.float16}, {"window": 4}, "varlen", "FlashAttention"),
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
