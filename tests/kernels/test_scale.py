"""kernels/scale.py against float64: on the GPU where there is one, in Triton's interpreter elsewhere."""

import pytest
import torch

from dpofast.kernels.scale import PROGRAMS, scale, scale_rows
from tests.support.row_cases import FLOATS, store_error

pytestmark = [pytest.mark.usefixtures("nan_empty"), pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")]

SHAPES = [(1, 1), (3, 5), (4, 256), (2, 257), (3, 2048), (2, 5001)]


def assert_rounded_once(got, exact, dtype, device):
    slack = store_error(dtype, device) * exact.abs() + torch.finfo(dtype).smallest_normal
    assert ((got.double() - exact).abs() <= slack).all()


@pytest.mark.parametrize("out_dtype", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_scaled_in_float32_and_rounded_once(shape, dtype, out_dtype, device):
    rows, coefficients = torch.randn(shape).to(device, dtype), torch.randn(shape[0]).to(device)
    out = torch.empty(shape, dtype=out_dtype, device=device)
    assert scale_rows(out, rows, coefficients) is out
    assert_rounded_once(out, rows.double() * coefficients.double().unsqueeze(1), out_dtype, device)


def test_a_row_whose_coefficient_is_zero_is_zero_whatever_it_holds(device):
    rows, coefficients = torch.randn(4, 300).to(device), torch.tensor([0.0, 2.0, -0.0, float("nan")], device=device)
    rows[0], rows[2, 7] = float("nan"), float("inf")
    out = scale_rows(torch.empty_like(rows), rows, coefficients)
    assert (out[[0, 2]] == 0).all() and torch.equal(out[1], 2 * rows[1]) and out[3].isnan().all()


def test_rows_in_place_and_of_any_strides(device):
    rows, coefficients = torch.randn(6, 700).to(device), torch.randn(6).to(device)
    expected = scale_rows(torch.empty_like(rows), rows, coefficients)
    turned = rows.t().contiguous().t()
    padded = torch.full((6, 720), float("nan"), device=device)[:, 3:703]
    assert torch.equal(scale_rows(padded, turned, coefficients), expected)
    every_other = torch.stack([coefficients, coefficients], 1)[:, 0]
    assert scale_rows(rows, rows, every_other) is rows and torch.equal(rows, expected)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2049,), (3, 4096)])
def test_a_tensor_is_scaled_in_place_and_rounded_once(shape, dtype, device):
    values = torch.randn(shape).to(device, dtype)
    factor = torch.tensor(0.3, device=device)
    exact, address = values.double() * factor.double(), values.data_ptr()
    assert scale(values, factor) is values and values.data_ptr() == address
    assert_rounded_once(values, exact, dtype, device)


def test_a_program_takes_further_blocks_where_there_are_more_than_programs(device, monkeypatch):
    monkeypatch.setattr("dpofast.kernels.scale.PROGRAMS", 2)
    values = torch.randn(5 * 2048 + 3).to(device)
    expected = values * 4
    assert PROGRAMS > 2 and torch.equal(scale(values, torch.tensor(4.0, device=device)), expected)


def test_a_factor_of_one_writes_nothing(device):
    values = torch.empty(5000, device=device)
    values.view(torch.int32).fill_(0x7FA00001)  # a signalling NaN, which arithmetic would make quiet
    scale(values, torch.ones((), device=device))
    assert (values.view(torch.int32) == 0x7FA00001).all()


def test_a_transposed_matrix_keeps_its_order(device):
    values = torch.randn(5, 3).to(device).t()
    expected = values * 2
    assert torch.equal(scale(values, torch.tensor(2.0, device=device)), expected)


def test_nothing_to_scale(device):
    empty = torch.empty(0, 5, device=device)
    assert scale(empty, torch.ones((), device=device)) is empty
    assert scale_rows(empty, empty.clone(), torch.empty(0, device=device)) is empty


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": torch.zeros(5)}, r"rows: expected \(R, D\), got \(5,\)"),
        ({"rows": torch.zeros(2, 5).double()}, r"rows: expected \(2, 5\) float32 or .* got \(2, 5\) torch.float64"),
        ({"out": torch.zeros(2, 4)}, r"out: expected \(2, 5\) .* got \(2, 4\)"),
        ({"coefficients": torch.zeros(2).half()}, r"coefficients: expected \(2,\) float32 .* torch.float16"),
    ],
)
def test_bad_rows(change, message):
    good = {"out": torch.zeros(2, 5), "rows": torch.zeros(2, 5), "coefficients": torch.zeros(2)}
    with pytest.raises(ValueError, match=message):
        scale_rows(**{**good, **change})


@pytest.mark.parametrize(
    ("values", "factor", "message"),
    [
        (torch.zeros(3).double(), torch.ones(()), r"values: expected \(3,\) float32 or .* torch.float64"),
        (torch.zeros(6)[::2], torch.ones(()), r"values: expected a contiguous tensor or its transpose, got .*\(2,\)"),
        (torch.zeros(3), torch.ones(1), r"factor: expected \(\) float32 .* got \(1,\)"),
        (torch.zeros(3), torch.ones((), dtype=torch.float64), r"factor: expected \(\) float32 .* torch.float64"),
    ],
)
def test_bad_values(values, factor, message):
    with pytest.raises(ValueError, match=message):
        scale(values, factor)
