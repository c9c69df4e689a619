"""Packed attention by torch's varlen_attn: its arguments, its K/V rows, the choice of FlashAttention, and its costs."""

import pytest
import torch
from hypothesis import given
from torch.nn.attention import list_flash_attention_impls
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from bench.attention_case import attention_case
from dpofast.model.attention import gather as attention_gather
from dpofast.model.attention import varlen as attention_varlen
from dpofast.model.attention.flash import activate_flash_attention, active_flash_attention
from dpofast.model.attention.gather import KeyRows, gather_rows
from dpofast.model.attention.interface import choose_attention
from dpofast.model.attention.layout import AttentionOptions, PackedLayout
from dpofast.model.attention.varlen import varlen_attention
from tests.support.attention_cases import (
    HEADS,
    KV_HEADS,
    LENGTHS,
    WIDTH,
    FakeTensor,
    gradients_of,
    packed_segments,
    random_inputs,
    written_out,
)
from tests.support.deep_examples import DEEP, LONG_DEEP, tries
from tests.support.flash_stand_in import attended, flash_on_the_cpu
from tests.support.histories import histories


def checked(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size):
    """Attention as torch's documentation and FlashAttention's define it."""
    assert query.ndim == key.ndim == value.ndim == 3 and cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert max_q == cu_seq_q.diff().max() and max_k == cu_seq_k.diff().max()
    assert cu_seq_k[-1] == len(key) == len(value) and cu_seq_q[-1] == len(query)
    return attended(query, key, value, cu_seq_q, cu_seq_k, False, scale, *window_size)[0]


def torch_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    """No argument for grouped heads, and nothing compares their numbers."""
    return checked(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)


def torch_2_13(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    assert enable_gqa or query.shape[1] == key.shape[1]
    return checked(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)


def against_the_definition(segments, options):
    inputs = random_inputs(segments)
    upstream, layout = torch.randn(1, segments.num_rows, HEADS, WIDTH), PackedLayout(segments)
    ours = gradients_of(lambda q, k, v, o: varlen_attention(q, k, v, layout, o), inputs, options, upstream)
    exact = [tensor.double() for tensor in inputs]
    truth = gradients_of(lambda q, k, v, o: written_out(q, k, v, segments, o), exact, options, upstream)
    for got, expected in zip(ours, truth, strict=True):
        torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("release", [torch_2_11, torch_2_13])
@pytest.mark.parametrize(
    "examples", [LENGTHS, DEEP, LONG_DEEP, {6: (3, 1)}], ids=["short", "deep", "long and deep", "nothing shared"]
)
@pytest.mark.parametrize("window", [None, 1, 4, 1000])
def test_varlen_gets_the_arguments_that_its_documentation_asks_for(window, examples, release, monkeypatch):
    monkeypatch.setattr(attention_varlen, "varlen_attn", release)
    monkeypatch.setattr(attention_varlen, "_ASKS_FOR_GROUPS", release is torch_2_13)
    against_the_definition(packed_segments(examples), AttentionOptions(scaling=0.3, window=window))


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("window", [None, 4])
def test_torchs_own_varlen_attn_runs_on_what_it_gets(window, kernels, monkeypatch):
    """Up to FlashAttention itself, whose place a stand-in takes; K/V rows by torch and by the kernels."""
    monkeypatch.setattr(attention_gather, "_KERNELS_ON", ("cpu",) if kernels else ())
    with flash_on_the_cpu():
        against_the_definition(packed_segments(DEEP), AttentionOptions(scaling=0.3, window=window))


def test_checkpointed_layers_and_a_pass_without_gradients_give_the_same():
    segments = packed_segments(DEEP)
    layout, options = PackedLayout(segments), AttentionOptions()
    inputs = [tensor.requires_grad_() for tensor in random_inputs(segments)]

    def attend(*tensors):
        return varlen_attention(*tensors, layout, options)

    with flash_on_the_cpu():
        plain = attend(*inputs)
        upstream = torch.randn_like(plain)
        again = checkpoint(attend, *inputs, use_reentrant=False)
        for ours, expected in zip(
            torch.autograd.grad(again, inputs, upstream), torch.autograd.grad(plain, inputs, upstream), strict=True
        ):
            assert torch.equal(ours, expected)
        with torch.no_grad():
            assert torch.equal(attend(*inputs), plain)


def test_a_window_of_w_is_w_minus_1_keys_to_the_left():
    assert attention_varlen._keys_to_the_left(None, 9) == -1
    assert attention_varlen._keys_to_the_left(9, 9) == -1
    assert attention_varlen._keys_to_the_left(8, 9) == 7
    assert attention_varlen._keys_to_the_left(1, 9) == 0


# ---- K/V rows -------------------------------------------------------------------------------------------------------


@given(tries())
def test_key_rows_and_their_inverse(examples):
    segments = packed_segments(examples)
    rows, offsets, copies = KeyRows.of(segments)
    assert rows.dtype == offsets.dtype == copies.dtype == torch.int32
    paths = histories(segments)
    assert rows.tolist() == [row for stop in segments.runs.cu_seqlens_q[1:].tolist() for row in paths[stop - 1]]
    for row in range(segments.num_rows):
        of_row = copies[offsets[row] : offsets[row + 1]].tolist()
        assert of_row == [key for key, read in enumerate(rows.tolist()) if read == row] and of_row


def rows_of(examples, dtype=torch.float64, width=8):
    segments = packed_segments(examples)
    shape = int(segments.cu_seqlens_q[-1]), KV_HEADS, width
    return KeyRows.of(segments), [torch.randn(shape, dtype=dtype).requires_grad_() for _ in range(2)]


def test_the_gradient_of_gathered_rows():
    rows, (key, value) = rows_of(DEEP, width=1)
    assert torch.autograd.gradcheck(lambda k, v: gather_rows(k, v, rows), (key, value))
    only_key = gather_rows(key, value, rows)[0]
    grads = torch.autograd.grad(only_key.sum(), (key, value))
    assert torch.equal(grads[0][:, 0, 0], rows.offsets.diff().double()) and not grads[1].any()


def test_gathered_rows_have_first_derivatives_only():
    rows, (key, value) = rows_of({2: (2, 1)})
    (grad,) = torch.autograd.grad(gather_rows(key, value, rows)[0].square().sum(), key, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        grad.sum().backward()
    with pytest.raises(RuntimeError, match="no forward-mode derivatives"):
        torch.func.jvp(lambda k: gather_rows(k, value, rows)[0], (key,), (key,))


def test_gathered_rows_are_one_node_of_a_compiled_graph():
    rows, (key, value) = rows_of(DEEP, torch.float32)
    for op, inputs in (
        (attention_gather.gather_op, (key, value)),
        (attention_gather.sum_op, [torch.randn(len(rows.rows), KV_HEADS, 8) for _ in range(2)]),
    ):
        assert set(torch.library.opcheck(op, (*inputs, *rows)).values()) == {"SUCCESS"}

    def product(key, value):
        ours, other = gather_rows(2 * key, value, rows)
        return (ours * other).sum()

    compiled = torch.compile(product, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(
        torch.autograd.grad(compiled(key, value), (key, value)),
        torch.autograd.grad(product(key, value), (key, value)),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected)


# ---- costs ----------------------------------------------------------------------------------------------------------


def nbytes(*tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# Bytes that an operator reads and writes of K and V rows, from its arguments and those of its results.
TRAFFIC = {
    "gather_kv": lambda args, written: 2 * written,
    "sum_kv": lambda args, written: nbytes(*args[:2]) + written,
    "index_select": lambda args, written: 2 * written,
    "clone": lambda args, written: args[0].untyped_storage().nbytes() + written,
    "new_zeros": lambda args, written: written,
    "index_add": lambda args, written: 3 * nbytes(args[3]),  # read; read and written by atomics
}


class Launches(TorchDispatchMode):
    """The operators that launch something, in order, and the bytes of TRAFFIC."""

    def __init__(self):
        super().__init__()
        self.names, self.bytes = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and name not in ("detach", "empty_like", "new_empty"):
            self.names.append(name)
            written = nbytes(*(leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)))
            self.bytes += TRAFFIC.get(name, lambda args, written: 0)(args, written)
        return result


def by_torch(key, value, rows):
    """What the gather took the place of."""
    return key.index_select(0, rows.rows), value.index_select(0, rows.rows)


def by_torch_and_repeated(key, value, rows):
    """With a K/V head for each of the 32 query heads."""
    return tuple(part.repeat_interleave(4, dim=1) for part in by_torch(key, value, rows))


def launches(gather, case):
    rows = KeyRows(*(part.to("meta") for part in KeyRows.of(case.layout.segments)))
    key, value = (tensor[0].transpose(0, 1).detach().requires_grad_() for tensor in (case.key, case.value))
    with Launches() as forward:
        gathered = gather(key, value, rows)
    with Launches() as backward:
        torch.autograd.grad(gathered, (key, value), [torch.empty_like(part) for part in gathered])
    return forward, backward


def test_launches_and_bytes_of_the_key_rows_of_a_layer():
    """Llama-3.1-8B, 64 pairs of a shared prompt: 8 K/V heads of 128 in bfloat16, counted on meta tensors."""
    case = attention_case(pairs=64, prompt=200, responses=(320, 280), device="meta")
    row = 2 * 8 * 128 * 2  # bytes of K and V
    positions, keys = case.key.shape[2], len(case.layout.segments.runs.key_rows())
    assert (positions, keys) == (64 * 798, 64 * 998)
    forward, backward = launches(gather_rows, case)
    assert forward.names == ["gather_kv"] and forward.bytes == 2 * keys * row
    assert backward.names == ["sum_kv"] and backward.bytes == (keys + positions) * row
    forward, backward = launches(by_torch, case)
    assert len(forward.names) == 2 and forward.bytes == 2 * keys * row
    assert len(backward.names) == 4 and backward.bytes == (3 * keys + positions) * row
    forward, backward = launches(by_torch_and_repeated, case)
    assert len(forward.names) == 4 and forward.bytes == (2 + 1 + 4) * keys * row
    assert len(backward.names) == 6


def test_a_layer_launches_the_gather_and_flash_attention_alone():
    case = attention_case(pairs=4, prompt=20, responses=(10, 7), device="meta")
    tensors = [tensor.requires_grad_() for tensor in (case.query, case.key, case.value)]
    varlen_attention(*tensors, case.layout, AttentionOptions())  # the first layer, which makes the layout's indices
    with Launches() as forward:
        result = varlen_attention(*tensors, case.layout, AttentionOptions())
    with Launches() as backward:
        torch.autograd.grad(result, tensors, torch.empty_like(result))
    assert forward.names == ["gather_kv", "_varlen_attn"]
    # torch's own zeros: the gradients of the log-sum-exp and of the random state, which nothing uses
    assert backward.names == ["zeros", "zeros", "_varlen_attn_backward", "sum_kv"]


# ---- FlashAttention 2, 3, 4 -----------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    """Pretend a GPU: returns the setter of its compute capability."""

    def pretend(major, minor=0):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))

    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    pretend(9)
    return pretend


def layer(width=128):
    fake = FakeTensor(width=width)
    return fake, fake


def test_the_active_flash_attention_is_named(gpu):
    assert choose_attention(*layer(), AttentionOptions()) == ("varlen", "FA2 over all segments at once")
    with flash_on_the_cpu():
        assert active_flash_attention() == "stand-in"
        assert choose_attention(*layer(), AttentionOptions()) == ("varlen", "stand-in over all segments at once")
    assert active_flash_attention() == "FA2"


def test_an_unknown_flash_attention_is_refused(gpu):
    names = ", ".join(list_flash_attention_impls())
    assert "FA3" in names and "FA4" in names
    with pytest.raises(ValueError, match=f"flash_attention: expected one of {names}, got 'FA9'"):
        activate_flash_attention("FA9", torch.device("cuda"))


def test_a_device_that_its_kernels_do_not_run_on_is_refused(gpu):
    with pytest.raises(ValueError, match="flash_attention='FA3' needs an NVIDIA GPU, got cpu: leave it out"):
        activate_flash_attention("FA3", torch.device("cpu"))
    gpu(8, 6)
    with pytest.raises(ValueError, match=r"'FA3' needs compute capability 9.x, got 8.6: leave it out"):
        activate_flash_attention("FA3", torch.device("cuda"))
    with pytest.raises(ValueError, match=r"'FA4' needs compute capability 9.x or 10.x, got 8.6"):
        activate_flash_attention("FA4", torch.device("cuda"))


@pytest.mark.parametrize(("name", "package"), [("FA3", "flash_attn_interface"), ("FA4", "flash_attn")])
def test_a_package_that_is_not_installed_is_named(name, package, gpu):
    with pytest.raises(
        ValueError, match=f"flash_attention='{name}': No module named '{package}.*: install its package"
    ):
        activate_flash_attention(name, torch.device("cuda"))
    assert active_flash_attention() == "FA2"


def test_the_trainer_says_why_it_cannot_activate_one(tmp_path):
    from tests.support.tiny_training import make_trainer  # here: the tests of the GPU do without datasets

    with pytest.raises(ValueError, match="flash_attention='FA3' needs an NVIDIA GPU, got cpu: leave it out"):
        make_trainer(tmp_path, flash_attention="FA3")


def test_head_dims_and_builds_that_varlen_leaves_to_flex(gpu, monkeypatch):
    assert choose_attention(*layer(256), AttentionOptions()).backend == "varlen"
    assert choose_attention(*layer(208), AttentionOptions()).backend == "varlen"
    gpu(8, 9)
    assert choose_attention(*layer(208), AttentionOptions()) == (
        "flex",
        "not varlen: it needs compute capability 8.0 or 9.0 for a head_dim above 192 and up to 224",
    )
    monkeypatch.setattr("dpofast.model.attention.flash.current_flash_attention_impl", lambda: "FA4")
    assert "multiple of 8, at most 128" in choose_attention(*layer(256), AttentionOptions()).reason
    monkeypatch.undo()
    gpu(9)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert "this torch was built without FlashAttention" in choose_attention(*layer(), AttentionOptions()).reason


# ---- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu(twin="test_torchs_own_varlen_attn_runs_on_what_it_gets")
@pytest.mark.parametrize("width", [64, 128])
def test_grouped_heads_equal_repeated_ones(width, device):
    case = attention_case(pairs=3, prompt=70, responses=(40, 33), heads=8, kv_heads=2, head_dim=width, device=device)
    tensors = [tensor.requires_grad_() for tensor in (case.query, case.key, case.value)]
    options = AttentionOptions()
    grouped = varlen_attention(*tensors, case.layout, options)
    repeated = varlen_attention(
        tensors[0], *(tensor.repeat_interleave(4, dim=1) for tensor in tensors[1:]), case.layout, options
    )
    upstream = torch.randn_like(grouped)
    torch.testing.assert_close(grouped, repeated)
    for ours, expected in zip(
        torch.autograd.grad(grouped, tensors, upstream), torch.autograd.grad(repeated, tensors, upstream), strict=True
    ):
        torch.testing.assert_close(ours, expected, atol=2e-2, rtol=2e-2)


@pytest.mark.gpu(twin="test_the_gradient_of_gathered_rows")
def test_gradients_of_gathered_rows_are_the_same_to_the_bit(device):
    case = attention_case(pairs=16, prompt=300, responses=(100, 90), device=device)
    rows = KeyRows(*(part.to(device) for part in KeyRows.of(case.layout.segments)))
    key, value = (tensor[0].transpose(0, 1).detach().requires_grad_() for tensor in (case.key, case.value))
    gathered = gather_rows(key, value, rows)
    upstream = [torch.randn_like(part) for part in gathered]
    first = torch.autograd.grad(gathered, (key, value), upstream, retain_graph=True)
    for _ in range(3):
        again = torch.autograd.grad(gathered, (key, value), upstream, retain_graph=True)
        assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
