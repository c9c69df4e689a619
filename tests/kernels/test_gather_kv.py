"""kernels/gather_kv.py against indexing and float64: on a GPU where there is one, else in Triton's interpreter."""

import pytest
import torch

from dpofast.kernels.gather_kv import gather_kv, sum_kv
from tests.support.row_cases import FLOATS, store_error

pytestmark = pytest.mark.usefixtures("nan_empty")

# Source rows of the keys of four runs of a trie: rows 0-1 begin all of them, row 2 two and row 5 the two others; row 8
# is alone, and row 9 has no reader.
ROWS = [0, 1, 2, 3, 0, 1, 2, 4, 0, 1, 5, 6, 0, 1, 5, 7, 8]
T = 10


def inverse(rows, count):
    """offsets and copies of the kernel's docstring, by their definition."""
    readers = [[key for key, row in enumerate(rows) if row == t] for t in range(count)]
    offsets = torch.tensor([0, *(len(copies) for copies in readers)]).cumsum(0)
    return offsets.int(), torch.tensor([key for copies in readers for key in copies], dtype=torch.int32)


def by_definition(grad, rows, count):
    """Sums of the copies' gradients in float64."""
    sums = torch.zeros(count, *grad.shape[1:], dtype=torch.float64)
    return sums.index_add_(0, torch.tensor(rows), grad.cpu().double())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("heads", "width"), [(1, 1), (3, 24), (2, 64), (1, 80), (8, 128), (1, 256)])
def test_the_forward_copies_rows(heads, width, dtype, device):
    key, value = (torch.randn(T, heads, width).to(device, dtype) for _ in range(2))
    rows = torch.tensor(ROWS, dtype=torch.int32, device=device)
    got = gather_kv(key, value, rows)
    assert torch.equal(got[0], key[rows.long()]) and torch.equal(got[1], value[rows.long()])
    assert got[0].is_contiguous() and got[1].is_contiguous()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("heads", "width"), [(1, 1), (3, 24), (2, 64), (1, 80), (8, 128), (1, 256)])
def test_the_backward_is_the_sum_rounded_once(heads, width, dtype, device):
    grads = [torch.randn(len(ROWS), heads, width).to(device, dtype) for _ in range(2)]
    got = sum_kv(*grads, *(part.to(device) for part in inverse(ROWS, T)))
    for ours, grad in zip(got, grads, strict=True):
        exact = by_definition(grad, ROWS, T)
        # At most four addends: float32 rounds thrice.
        slack = (store_error(dtype, device) + 3 * torch.finfo(torch.float32).eps) * exact.abs() + 1e-6
        assert ours.dtype == dtype and ((ours.cpu().double() - exact).abs() <= slack).all()
        assert (ours[9] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_branches_lose_less_than_atomics_in_16_bits(dtype, device):
    """A prompt of 33 rows with 40 branches; atomic additions into 16 bits round after each, in no fixed order."""
    rows = [*range(33), *(row for _ in range(39) for row in range(33))]
    grads = [torch.randn(len(rows), 2, 16).to(device, dtype) for _ in range(2)]
    parts = [part.to(device) for part in inverse(rows, 33)]
    got = sum_kv(*grads, *parts)
    for ours, grad in zip(got, grads, strict=True):
        exact = by_definition(grad, rows, 33)
        chain = torch.zeros(33, 2, 16, dtype=dtype)
        for addend in grad.cpu().view(40, 33, 2, 16):
            chain += addend
        error, others = ((x.cpu().double() - exact).square().mean().sqrt() for x in (ours, chain))
        assert error <= 0.6 * others
    for _ in range(3):
        assert all(torch.equal(*pair) for pair in zip(got, sum_kv(*grads, *parts), strict=True))


def test_any_strides(device):
    key = torch.randn(1, 3, T, 24, device=device)[0].transpose(0, 1)  # as a layer has them, heads outside
    value = torch.randn(T, 3, 48, device=device)[:, :, ::2]
    rows = torch.tensor(ROWS, dtype=torch.int32, device=device)
    got = gather_kv(key, value, rows)
    assert torch.equal(got[0], key[rows.long()]) and torch.equal(got[1], value[rows.long()])
    parts = [part.to(device) for part in inverse(ROWS, T)]
    grads = [torch.randn(len(ROWS), 24, 3, device=device).transpose(1, 2) for _ in range(2)]
    plain = sum_kv(*(grad.contiguous() for grad in grads), *parts)
    assert all(torch.equal(*pair) for pair in zip(sum_kv(*grads, *parts), plain, strict=True))


def test_empty(device):
    none = torch.empty(0, dtype=torch.int32, device=device)
    empty = torch.empty(0, 2, 8, device=device)
    assert gather_kv(torch.ones(3, 2, 8, device=device), torch.ones(3, 2, 8, device=device), none)[0].shape == (0, 2, 8)
    unread = sum_kv(empty, empty, torch.zeros(4, dtype=torch.int32, device=device), none)
    assert all(torch.equal(grad, torch.zeros(3, 2, 8, device=device)) for grad in unread)
    assert sum_kv(empty, empty, torch.zeros(1, dtype=torch.int32, device=device), none)[0].shape == (0, 2, 8)


@pytest.mark.gpu(twin="test_the_forward_copies_rows")
def test_rows_beyond_int32_entries(device):
    rows = torch.tensor([0, (1 << 21) + 5, 0, 3], dtype=torch.int32, device=device)
    key = torch.zeros((1 << 21) + 6, 8, 128, dtype=torch.bfloat16, device=device)
    key[-1] = 7
    got = gather_kv(key, key, rows)
    assert torch.equal(got[0], key[rows.long()]) and torch.equal(got[1], key[rows.long()])


INDEX = torch.zeros(4, dtype=torch.int32)
GATHER = {"key": torch.zeros(3, 2, 8), "value": torch.zeros(3, 2, 8), "rows": INDEX}
SUM = {"grad_key": torch.zeros(4, 2, 8), "grad_value": torch.zeros(4, 2, 8), "offsets": INDEX, "copies": INDEX}


@pytest.mark.parametrize(
    ("launch", "good", "change", "message"),
    [
        (gather_kv, GATHER, {"key": torch.zeros(3, 8)}, r"key: expected \(rows, heads, head_dim\) .* got \(3, 8\)"),
        (gather_kv, GATHER, {"key": torch.zeros(3, 2, 8).double()}, r"key: expected .* got \(3, 2, 8\) torch.float64"),
        (gather_kv, GATHER, {"value": torch.zeros(3, 2, 4)}, r"value: expected \(3, 2, 8\) float32 .* got \(3, 2, 4\)"),
        (gather_kv, GATHER, {"rows": INDEX.long()}, r"rows: expected \(4,\) int32 .* got \(4,\) torch.int64"),
        (sum_kv, SUM, {"grad_key": torch.zeros(4, 8)}, r"grad_key: expected \(rows, heads, head_dim\)"),
        (sum_kv, SUM, {"grad_value": torch.zeros(4, 2, 8).half()}, r"grad_value: expected \(4, 2, 8\) float32"),
        (sum_kv, SUM, {"offsets": INDEX[:0]}, r"offsets: expected \(1,\) int32 .* got \(0,\)"),
        (sum_kv, SUM, {"copies": INDEX[:3]}, r"copies: expected \(4,\) int32 .* got \(3,\)"),
    ],
)
def test_bad_arguments(launch, good, change, message):
    with pytest.raises(ValueError, match=message):
        launch(**{**good, **change})
