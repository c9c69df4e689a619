"""Log-probs of kernels/exp_gemm.py without E against float64: on the GPU if there is one, else in the interpreter."""

import itertools
import math

import pytest
import torch

from dpofast.kernels.exp_gemm import exp_gemm
from dpofast.kernels.linear_tiles import ARCHITECTURES, LinearTile, linear_tile, takes_descriptors, vocab_splits
from tests.support.close import assert_same
from tests.support.linear_cases import assert_logps_as_good_as_torch, problem, tensor_core_error, truth
from tests.support.row_cases import IGNORED, OPTIONS, make_bias

# The interpreter is numpy, which warns about infinities in lanes that a mask or a where discards.
pytestmark = [pytest.mark.usefixtures("nan_empty"), pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")]

# The interpreter's tl.dot is wrong in bfloat16, which is tested on the GPU alone.
DTYPES = (torch.float32, torch.float16)
SMALL = LinearTile(16, 32, 16, num_warps=4, num_stages=2)
BOTH = (False, True)
TABLE = {
    (linear_tile(name, dtype, softcap=softcap, descriptors=bulk, stores=stores, even=even), bulk)
    for name, softcap, stores, even in itertools.product(ARCHITECTURES, BOTH, BOTH, BOTH)
    for dtype in (torch.float32, torch.float16)
    for bulk in {False, takes_descriptors(name, dtype)}
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("n", "d", "v"), [(1, 1, 7), (3, 16, 32), (17, 50, 100), (33, 48, 257), (5, 200, 1000)])
def test_logprobs_are_as_exact_as_torch(n, d, v, options, dtype, device):
    hidden, weight, targets = problem(n, d, v, device, dtype)
    options = make_bias(OPTIONS[options], v, device)
    for tile in (SMALL, None):
        result = exp_gemm(hidden, weight, targets, tile=tile, **options)
        assert_logps_as_good_as_torch(result, hidden, weight, targets, **options)


@pytest.mark.parametrize(("tile", "descriptors"), sorted(TABLE, key=repr))
def test_every_tile(tile, descriptors, device):
    # Rows, columns and depth each reach one element into a further tile. On a GPU, the shared memory of another
    # architecture's tile may not fit: there the compile tests and the test of the device's own tile stand in.
    dtype = torch.float32 if tile.BLOCK_V == 64 else torch.float16
    if device.type == "cuda":
        tile = LinearTile(tile.BLOCK_N, tile.BLOCK_V, tile.BLOCK_D, tile.num_warps, num_stages=1)
    hidden, weight, targets = problem(tile.BLOCK_N + 1, tile.BLOCK_D + 8, 2 * tile.BLOCK_V + 1, device, dtype)
    result = exp_gemm(hidden, weight, targets, tile=tile, descriptors=descriptors)
    assert_logps_as_good_as_torch(result, hidden, weight, targets)


@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("splits", [1, 2, 5, 40])
@pytest.mark.parametrize("v", [1, 90, 320])
def test_any_number_of_splits(v, splits, descriptors, device):
    # 40 splits leave most of them without a column.
    hidden, weight, targets = problem(20, 48, v, device, torch.float16)
    launch = {"tile": SMALL, "splits": splits, "descriptors": descriptors}
    options = make_bias(OPTIONS["all"], v, device)
    result = exp_gemm(hidden, weight, targets, **launch, **options)
    assert_logps_as_good_as_torch(result, hidden, weight, targets, **options)
    again = exp_gemm(hidden, weight, targets, **launch, **options)
    assert torch.equal(result.logps, again.logps) and torch.equal(result.lse, again.lse)


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_logits(dtype, device):
    hidden, weight, targets = problem(6, 40, 300, device, dtype, scale=1.0)
    hidden[0] *= 4000
    hidden[2] *= -4000
    targets[0] = (hidden[0].float() @ weight.float().t()).argmax()
    targets[2] = (hidden[2].float() @ weight.float().t()).argmin()
    result = exp_gemm(hidden, weight, targets, tile=SMALL, splits=3)
    assert result.lse[0] > 8e3 and result.logps[2] < -1.5e4
    assert_logps_as_good_as_torch(result, hidden, weight, targets)
    hidden[:] = 0  # equal logits
    result = exp_gemm(hidden, weight, targets, tile=SMALL)
    assert_logps_as_good_as_torch(result, hidden, weight, targets)


def test_a_certain_target_has_no_positive_logprob(device):
    hidden, weight, targets = problem(64, 100, 40, device, scale=200.0)
    targets = (hidden @ weight.t()).argmax(1)
    logps = exp_gemm(hidden, weight, targets, tile=SMALL).logps
    assert (logps <= 0).all() and (logps > -1e-3).any()
    one_word = exp_gemm(hidden, weight[:1], torch.zeros_like(targets))
    assert_logps_as_good_as_torch(one_word, hidden, weight[:1], torch.zeros_like(targets))
    assert (one_word.logps <= 0).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_row_breaks_only_itself(value, device):
    hidden, weight, targets = problem(20, 40, 100, device)
    clean = exp_gemm(hidden, weight, targets, tile=SMALL, splits=2)
    hidden[5, 7] = value
    result = exp_gemm(hidden, weight, targets, tile=SMALL, splits=2)
    others = torch.arange(20, device=device) != 5
    for got, expected in zip(result, clean, strict=True):
        assert got[5].isnan() and torch.equal(got[others], expected[others])


def test_ignored_rows_are_zero_whatever_they_hold(device):
    hidden, weight, targets = problem(20, 40, 100, device)
    hidden[1] = math.nan
    result = exp_gemm(hidden, weight, targets, tile=SMALL)
    assert result.logps[1] == 0 and result.lse[1] == 0
    assert result.logps.isfinite().all() and (result.logps[2:] < 0).all()
    targets[3] = 99
    other = exp_gemm(hidden, weight, targets, tile=SMALL, ignore_index=99)
    assert other.logps[3] == 0 and other.logps[1].isnan()
    ignored = exp_gemm(hidden.fill_(math.nan), weight, torch.full_like(targets, IGNORED))
    assert not ignored.logps.any() and not ignored.lse.any()


@pytest.mark.parametrize("target", [100, -1, 2**33 + 1, -(2**33)])
def test_a_target_outside_the_vocabulary_is_nan(target, device):
    hidden, weight, targets = problem(5, 40, 100, device)
    bias = torch.randn(100).to(device)
    clean = exp_gemm(hidden, weight, targets, bias=bias, tile=SMALL)
    targets[3] = target
    result = exp_gemm(hidden, weight, targets, bias=bias, tile=SMALL)
    others = torch.arange(5, device=device) != 3
    assert result.logps[3].isnan() and result.lse[3].isnan()
    assert torch.equal(result.logps[others], clean.logps[others])


def test_masked_words(device):
    hidden, weight, targets = problem(4, 40, 100, device)
    bias = torch.zeros(100, device=device)
    bias[50:] = -math.inf
    targets[2:] = torch.tensor([20, 60])
    # The first split's columns are all masked.
    result = exp_gemm(hidden, weight.flip(0), 99 - targets, bias=bias.flip(0), tile=SMALL, splits=4)
    exact = torch.log_softmax((hidden.double() @ weight.double().t())[:, :50], 1)
    torch.testing.assert_close(result.logps[2].double(), exact[2, 20], rtol=0, atol=1e-5)
    assert result.logps[3] == -math.inf
    nothing = exp_gemm(hidden, weight, targets, bias=torch.full_like(bias, -math.inf), tile=SMALL)
    assert nothing.logps[2].isnan() and nothing.lse[2].isnan()


@pytest.mark.parametrize("descriptors", [None, True])
def test_any_strides(descriptors, device):
    hidden, weight, targets = problem(20, 40, 100, device)
    plain = exp_gemm(hidden, weight, targets, tile=SMALL)
    aligned = {"hidden": (20, 48), "weight": (100, 64)}
    for name, rows in (("hidden", hidden), ("weight", weight)):
        padded = torch.full(aligned[name], math.nan, device=device)[:, : rows.shape[1]].copy_(rows)
        views = [padded]
        if descriptors is None:
            odd = torch.full((2 * len(rows), 83), math.nan, device=device)[::2, 3:43].copy_(rows)
            every_other = torch.full((len(rows), 80), math.nan, device=device)[:, ::2].copy_(rows)
            views += [odd, every_other, rows.t().contiguous().t()]
        for view in views:
            assert view.stride() != rows.stride()
            arguments = {"hidden": hidden, "weight": weight, name: view}
            got = exp_gemm(targets=targets, tile=SMALL, descriptors=descriptors, **arguments)
            assert_same(got.logps, plain.logps, name)
            assert_same(got.lse, plain.lse, name)
    repeated = exp_gemm(hidden[:1].expand(20, -1), weight, targets[:1].expand(20), tile=SMALL)
    assert_same(repeated.logps, plain.logps[:1].expand(20))
    strided = torch.stack([targets, targets + 1], 1)[:, 0]
    assert_same(exp_gemm(hidden, weight, strided, tile=SMALL).logps, plain.logps)


def test_no_rows(device):
    hidden, weight, targets = problem(0, 40, 100, device)
    result = exp_gemm(hidden, weight, targets)
    assert result.logps.shape == result.lse.shape == (0,)


def test_rows_beyond_32_bit_offsets(device, tmp_path):
    # Two rows 2^31 elements apart, in a sparse file on the CPU, which takes no more room than the pages touched.
    d, stride = 40, 2**30
    size = 2 * stride + d
    if device.type == "cpu":
        storage = torch.from_file(str(tmp_path / "rows"), shared=True, size=size, dtype=torch.float16)
    else:
        storage = torch.empty(size, dtype=torch.float16, device=device)
    far = storage.as_strided((3, d), (stride, 1))
    hidden, weight, _ = problem(3, d, 3, device, torch.float16)
    targets = torch.tensor([2, 1, 2], device=device)
    near = exp_gemm(hidden, weight, targets, tile=SMALL)
    for name, rows in (("hidden", hidden), ("weight", weight)):
        far.copy_(rows)
        for descriptors in (False, True):
            arguments = {"hidden": hidden, "weight": weight, name: far}
            got = exp_gemm(targets=targets, tile=SMALL, descriptors=descriptors, **arguments)
            assert_same(got.logps, near.logps, (name, descriptors))


H100 = {"slots": 132, "cache_bytes": 50 << 20}


def test_few_rows_still_fill_the_device():
    for row_tiles in (1, 2, 3, 5):
        splits = vocab_splits(row_tiles, 501, row_tile_bytes=1 << 20, **H100)
        assert 120 <= row_tiles * splits <= 132
    # Not more splits than columns to share.
    assert vocab_splits(1, 3, row_tile_bytes=1 << 20, **H100) == 3
    assert vocab_splits(5000, 1, row_tile_bytes=1 << 20, **H100) == 1


def test_many_rows_share_weight_tiles_and_stay_in_the_cache():
    for row_tiles in (26, 64, 500):
        splits = vocab_splits(row_tiles, 501, row_tile_bytes=1 << 20, **H100)
        together = 132 / splits
        assert 8 <= together <= 25
        waves = math.ceil(row_tiles * splits / 132)
        assert waves * 501 / splits <= 1.10 * row_tiles * 501 / 132
    # Hidden states too wide for the cache at any split: each weight tile still serves eight row tiles.
    assert vocab_splits(64, 501, row_tile_bytes=1 << 30, **H100) == 16


def test_only_aligned_rows_take_descriptors(device):
    hidden, weight, targets = problem(4, 41, 50, device)
    with pytest.raises(
        ValueError, match=r"descriptors: expected rows .* multiples of 16 bytes .* hidden with strides \(41, 1\)"
    ):
        exp_gemm(hidden, weight, targets, descriptors=True)
    with pytest.raises(ValueError, match=r"descriptors: .* do not overlap"):
        exp_gemm(hidden[:1, :40].expand(4, -1), weight[:, :40].contiguous(), targets, descriptors=True)


GOOD = {"hidden": torch.zeros(2, 5), "weight": torch.zeros(3, 5), "targets": torch.zeros(2, dtype=torch.int64)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(5)}, r"hidden: expected \(N, D\) with D >= 1 .* got \(5,\) torch.float32"),
        ({"hidden": torch.zeros(2, 0)}, r"hidden: .* got \(2, 0\)"),
        ({"hidden": torch.zeros(2, 5).double()}, r"hidden: .* torch.float64; .*reference"),
        ({"weight": torch.zeros(5)}, r"weight: expected \(V, D\) with V >= 1, got \(5,\)"),
        ({"weight": torch.zeros(0, 5)}, r"weight: expected \(V, D\) with V >= 1, got \(0, 5\)"),
        ({"weight": torch.zeros(3, 4)}, r"weight: expected \(3, 5\) float32 .* got \(3, 4\)"),
        ({"weight": torch.zeros(3, 5).half()}, r"weight: expected \(3, 5\) float32 .* torch.float16"),
        ({"weight": torch.zeros(3, 5, device="meta")}, r"weight: .* on cpu to match .* on meta"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, r"targets: expected \(2,\) int64 .* got \(3,\) torch.int64"),
        ({"targets": torch.zeros(2)}, r"targets: expected \(2,\) int64 .* got \(2,\) torch.float32"),
        ({"bias": torch.zeros(2)}, r"bias: expected \(3,\) float32 or bfloat16 or float16 .* got \(2,\)"),
        ({"temperature": 0.0}, r"temperature: expected a finite number above 0, got 0.0"),
        ({"softcap": -1.0}, r"softcap: expected a finite number above 0, got -1.0"),
        ({"logit_scale": math.inf}, r"logit_scale: expected a finite number, got inf"),
        ({"splits": 0}, r"splits: expected None or a number from 1 on, got 0"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        exp_gemm(**{**GOOD, **change})


@pytest.mark.gpu(twin="test_logprobs_are_as_exact_as_torch")
@pytest.mark.parametrize("descriptors", [None, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("options", ["plain", "all"])
@pytest.mark.parametrize(
    ("n", "d", "v"), [(300, 1024, 151_936), (1, 4096, 50_257), (2500, 576, 49_152), (130, 41, 999)]
)
def test_real_sizes_on_the_gpu(n, d, v, options, dtype, descriptors, device):
    hidden, weight, targets = problem(n, d, v, device, dtype)
    options = make_bias(OPTIONS[options], v, hidden.device)
    result = exp_gemm(hidden, weight, targets, descriptors=descriptors, **options)
    assert_logps_as_good_as_torch(result, hidden, weight, targets, **options)
    again = exp_gemm(hidden, weight, targets, descriptors=descriptors, **options)
    assert torch.equal(result.logps, again.logps)
    exact, _, z_max = truth(hidden, weight, targets, torch.float64, **options)
    sums = result.logps[:256].double().sum(), exact[:256].sum()
    assert (sums[0] - sums[1]).abs() < 1e-3 + 256 * tensor_core_error(hidden) * z_max
