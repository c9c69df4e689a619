"""kernels/preference.py against float64: on the GPU where there is one, in Triton's interpreter elsewhere."""

import math

import pytest
import torch

from dpofast import reference
from dpofast.kernels.preference import PairAdjacency, PairOptions, pair_adjacency, preference_sigmoid
from dpofast.losses.sequences import pair_logprobs

pytestmark = pytest.mark.usefixtures("nan_empty")

# Six pairs out of four branches, a plain pair, an empty sequence in a pair, and a sequence (6) in none.
LENGTHS = [3, 1, 300, 700, 40, 0, 5, 12]
PAIRS = [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3], [4, 7], [5, 7]]


def cumulative(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def batch(device, lengths=LENGTHS, pairs=PAIRS, scale=2.0):
    """Per-token log-probs, bounds, pairs and a reference close to the policy."""
    logps = -(torch.rand(sum(lengths)) * scale)
    cu_targets = cumulative(lengths)
    ref_logps = reference.sequence_logprobs(logps, cu_targets) + torch.randn(len(lengths))
    return logps.to(device), cu_targets.to(device), torch.tensor(pairs, dtype=torch.int32), ref_logps.to(device)


def run(logps, cu_targets, pairs, ref_logps, **options):
    adjacency = pair_adjacency(pairs, len(cu_targets) - 1).to(logps.device)
    return preference_sigmoid(logps, cu_targets, adjacency, ref_logps, **options)


def truth(logps, cu_targets, pairs, ref_logps, dtype, **options):
    sequence_logps = reference.sequence_logprobs(logps.to(dtype), cu_targets).requires_grad_()
    ref_logps = None if ref_logps is None else ref_logps.to(dtype)
    losses, rewards = reference.sigmoid_loss(sequence_logps, pairs.to(logps.device).long(), ref_logps, **options)
    (coefficients,) = torch.autograd.grad(losses.sum(), sequence_logps)
    return losses.detach(), coefficients, rewards, sequence_logps.detach()


def assert_as_good_as_torch(got, exact, framework, beta):
    """Error against float64 within twice float32 torch's own, plus one rounding of the longest sum and of the value."""
    rounding = 2.0**-23
    for name, value, target, own in zip(got._fields, got, exact, framework, strict=True):
        assert value.dtype == torch.float32 and value.shape == target.shape, name
        error, own_error = (value.double() - target).abs().max(), (own.double() - target).abs().max()
        floor = rounding * (beta * exact[-1].abs().max() + target.abs().max())
        assert error <= 2 * own_error + floor, f"{name}: error {error:.3g}, torch's {own_error:.3g}, floor {floor:.3g}"


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2, 0.5])
@pytest.mark.parametrize(("beta", "with_reference"), [(0.1, True), (2.5, True), (0.02, False)])
def test_every_output_is_as_exact_as_torch(beta, with_reference, label_smoothing, device):
    logps, cu_targets, pairs, ref_logps = batch(device)
    inputs = (logps, cu_targets, pairs, ref_logps if with_reference else None)
    options = {"beta": beta, "label_smoothing": label_smoothing}
    got = run(*inputs, **options)
    exact, framework = (truth(*inputs, dtype, **options) for dtype in (torch.float64, torch.float32))
    assert_as_good_as_torch(got, exact, framework, beta)
    assert got.coefficients[6] == 0
    assert got.sequence_logps[5] == 0


def test_coefficients_are_the_gradient_of_the_summed_losses(device):
    logps, cu_targets, pairs, ref_logps = (
        tensor.double() if tensor.is_floating_point() else tensor for tensor in batch(device)
    )
    got = run(logps.float(), cu_targets, pairs, ref_logps.float(), beta=0.3)
    step = 1e-5
    for sequence in (0, 2, 7):
        moved = [logps.clone(), logps.clone()]
        for sign, tokens in zip((1, -1), moved, strict=True):
            tokens[cu_targets[sequence]] += sign * step
        up, down = (truth(tokens, cu_targets, pairs, ref_logps, torch.float64, beta=0.3)[0].sum() for tokens in moved)
        torch.testing.assert_close(
            got.coefficients[sequence].item(), ((up - down) / (2 * step)).item(), rtol=1e-4, atol=0
        )


def test_policy_equal_to_reference_gives_log_2_and_no_margin(device):
    logps, cu_targets, pairs, _ = batch(device)
    no_pairs = pairs[:0]
    ref_logps = run(logps, cu_targets, no_pairs, None, beta=0.1).sequence_logps
    got = run(logps, cu_targets, pairs, ref_logps, beta=0.1)
    assert (got.rewards == 0).all()
    torch.testing.assert_close(got.pair_losses, torch.full_like(got.pair_losses, math.log(2)), rtol=3e-7, atol=0)
    assert got.coefficients[[4, 5]].tolist() == pytest.approx([-0.05, -0.05])
    assert got.coefficients[7].item() == pytest.approx(0.1)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_extreme_margins(label_smoothing, device):
    # One token a sequence, all against sequence 0, whose log-prob is 0: the margins are what stands here.
    margins = torch.tensor([1e4, 100.0, 20.0, 9.0, 1e-6, 0.0, -1e-6, -9.0, -20.0, -100.0, -1e4])
    logps = torch.cat([torch.zeros(1), -margins]).to(device)
    pairs = torch.tensor([[0, i + 1] for i in range(len(margins))], dtype=torch.int32)
    cu_targets = torch.arange(len(logps) + 1, dtype=torch.int32).to(device)
    inputs = (logps, cu_targets, pairs, None)
    options = {"beta": 1.0, "label_smoothing": label_smoothing}
    got = run(*inputs, **options)
    exact = truth(*inputs, torch.float64, **options)
    # Relative, element by element: the loss of a pair that is won by far is e^−u, not 0.
    for value, target in zip(got, exact, strict=True):
        torch.testing.assert_close(value.double(), target, rtol=1e-5, atol=1e-37)


def test_long_sequences_sum_as_exactly_as_torch(device):
    logps, cu_targets, pairs, _ = batch(device, [20_000, 9_999], [[0, 1]], scale=20.0)
    got = run(logps, cu_targets, pairs, None, beta=0.1).sequence_logps.double()
    exact = reference.sequence_logprobs(logps.double(), cu_targets)
    own = (reference.sequence_logprobs(logps, cu_targets).double() - exact).abs()
    assert ((got - exact).abs() <= 2 * own + 2.0**-23 * exact.abs()).all()


def test_results_repeat_and_do_not_depend_on_the_rest_of_the_batch(device):
    logps, cu_targets, pairs, ref_logps = batch(device)
    got = run(logps, cu_targets, pairs, ref_logps, beta=0.1)
    for first, again in zip(got, run(logps, cu_targets, pairs, ref_logps, beta=0.1), strict=True):
        assert torch.equal(first, again)
    group = logps[: cu_targets[4]]
    alone = run(group, cu_targets[:5], pairs[:6], ref_logps[:4], beta=0.1)
    for part, whole in zip(alone, got, strict=True):
        assert torch.equal(part, whole[: len(part)])


def test_nan_stays_in_its_pairs(device):
    logps, cu_targets, pairs, ref_logps = batch(device)
    logps[cu_targets[4]] = math.nan
    got = run(logps, cu_targets, pairs, ref_logps, beta=0.1)
    assert got.pair_losses.isnan().tolist() == [False] * 6 + [True, False]
    assert got.coefficients.isnan().nonzero().flatten().tolist() == [4, 7]
    assert got.rewards.isnan().nonzero().flatten().tolist() == [4]


def test_non_contiguous_input(device):
    logps, cu_targets, pairs, ref_logps = batch(device)
    spread = [torch.stack([tensor, tensor + 1], 1)[:, 0] for tensor in (logps, cu_targets, ref_logps)]
    got = run(spread[0], spread[1], pairs.t().contiguous().t(), spread[2], beta=0.1)
    for value, expected in zip(got, run(logps, cu_targets, pairs, ref_logps, beta=0.1), strict=True):
        assert torch.equal(value, expected)


def test_no_pairs_and_no_sequences(device):
    no_pairs = torch.empty(0, 2, dtype=torch.int32)
    got = run(torch.ones(2, device=device), cumulative([2]).to(device), no_pairs, None, beta=0.1)
    assert got.pair_losses.shape == (0,) and got.coefficients.tolist() == [0.0]
    assert got.sequence_logps.tolist() == [2.0] and got.rewards.tolist() == pytest.approx([0.2])
    got = run(torch.empty(0, device=device), cumulative([]).to(device), no_pairs, None, beta=0.1)
    assert [len(value) for value in got] == [0, 0, 0, 0]


def test_adjacency_lists_every_pair_from_both_sides():
    adjacency = pair_adjacency(torch.tensor([[2, 0], [0, 3], [2, 3]]), 5)
    assert adjacency.num_pairs == 3
    assert adjacency.offsets.tolist() == [0, 2, 2, 4, 6, 6]
    assert adjacency.entries.tolist() == [
        [3, 1, 1],
        [2, -1, 0],
        [0, 1, 0],
        [3, 1, 2],
        [0, -1, 1],
        [2, -1, 2],
    ]
    assert {tensor.dtype for tensor in adjacency} == {torch.int32}


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (torch.tensor([0, 1]), r"pairs: expected \(P, 2\) int32 or int64, got \(2,\)"),
        (torch.tensor([[0.0, 1.0]]), r"pairs: expected \(P, 2\) int32 or int64, got \(1, 2\) torch.float32"),
        (torch.empty(1, 2, dtype=torch.int32, device="meta"), r"pairs: expected a CPU tensor.* got one on meta"),
        (torch.tensor([[0, 1], [1, 3]]), r"pairs: expected sequences in \[0, 3\), got \[1, 3\] in pair 1"),
        (torch.tensor([[-1, 1]]), r"pairs: expected sequences in \[0, 3\), got \[-1, 1\] in pair 0"),
        (torch.tensor([[0, 1], [2, 2]]), r"pairs: expected two different sequences, got \[2, 2\] in pair 1"),
    ],
)
def test_bad_pairs(pairs, message):
    with pytest.raises(ValueError, match=message):
        pair_adjacency(pairs, 3)


ADJACENCY = pair_adjacency(torch.tensor([[0, 1]]), 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": 0.0}, r"beta: expected a finite number above 0, got 0.0"),
        ({"label_smoothing": 0.6}, r"label_smoothing: expected a number in \[0, 0.5\], got 0.6"),
        ({"logps": torch.zeros(2).half()}, r"logps: expected \(N,\) float32, got \(2,\) torch.float16"),
        ({"cu_targets": torch.tensor(3)}, r"cu_targets: expected \(S\+1,\) with S >= 0, got \(\)"),
        ({"cu_targets": torch.tensor([0, 1, 2])}, r"cu_targets: expected \(3,\) int32 .* torch.int64"),
        ({"ref_logps": torch.zeros(3)}, r"ref_logps: expected \(2,\) float32 .* got \(3,\)"),
        (
            {"adjacency": pair_adjacency(torch.tensor([[0, 1]]), 3)},
            r"adjacency.offsets: expected \(3,\) int32 .* got \(4,\)",
        ),
        (
            {"adjacency": PairAdjacency(ADJACENCY.offsets, ADJACENCY.entries[:, :2])},
            r"adjacency.entries: expected \(2, 3\) .* got \(2, 2\)",
        ),
        ({"adjacency": ADJACENCY.to("meta")}, r"adjacency.offsets: .* on cpu .* on meta"),
    ],
)
def test_bad_arguments(change, message):
    good = {"logps": torch.zeros(2), "cu_targets": cumulative([1, 1]), "adjacency": ADJACENCY, "beta": 0.1}
    with pytest.raises(ValueError, match=message):
        preference_sigmoid(**{**good, **change})


# With lengths and ld_alpha: sequences of at least one token, the log-probs of the reference by pair.
LD_LENGTHS, LD_PAIRS = [3, 1, 300, 700, 40, 5, 12], [[0, 1], [0, 2], [3, 2], [1, 3], [4, 5]]


def ld_batch(device, ld_alpha):
    """Policy and reference of a batch: the arguments of the kernel, and of the reference."""
    tokens, ref_tokens = (-2 * torch.rand(sum(LD_LENGTHS)) for _ in range(2))
    cu_targets, pairs = cumulative(LD_LENGTHS), torch.tensor(LD_PAIRS, dtype=torch.int32)
    positions = torch.cat([torch.arange(n, dtype=torch.int32) for n in LD_LENGTHS])
    options = {"lengths": cu_targets.diff().float().to(device)}
    if ld_alpha is None:
        ref = reference.sequence_logprobs(ref_tokens, cu_targets)
    else:
        ref = pair_logprobs(ref_tokens, cu_targets, pairs, ld_alpha=ld_alpha)
        options |= {"positions": positions.to(device), "ld_alpha": ld_alpha}
    return (tokens.to(device), cu_targets.to(device), pairs, ref.to(device)), options, (cu_targets, pairs, ref_tokens)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("ld_alpha", [None, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_lengths_and_ld_alpha(label_smoothing, ld_alpha, normalize, device):
    inputs, options, (cu_targets, pairs, ref_tokens) = ld_batch(device, ld_alpha)
    beta = 30.0 if normalize else 0.1
    got = run(*inputs, **options, beta=beta, label_smoothing=label_smoothing, normalize=normalize)
    tokens = inputs[0].cpu().double().requires_grad_()
    expected = reference.preference_loss(
        tokens,
        cu_targets,
        pairs,
        ref_tokens.double(),
        kind="sigmoid_norm" if normalize else "sigmoid",
        beta=beta,
        label_smoothing=label_smoothing,
        ld_alpha=ld_alpha,
    )
    (coefficients,) = torch.autograd.grad(expected * len(pairs), tokens)
    if ld_alpha is None:
        coefficients = coefficients[cu_targets[:-1].long()]
    torch.testing.assert_close(got.pair_losses.double().mean().cpu(), expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.coefficients.double().cpu(), coefficients, rtol=1e-4, atol=1e-6)
    if ld_alpha is not None:
        sums = pair_logprobs(tokens.detach(), cu_targets, pairs, ld_alpha=ld_alpha)
        torch.testing.assert_close(got.sequence_logps.double().cpu(), sums, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(got.rewards.double().cpu() / beta, sums - inputs[3].cpu(), rtol=1e-5, atol=2e-4)


def test_ld_alpha_of_1_changes_nothing(device):
    (logps, cu_targets, pairs, by_pair), options, _ = ld_batch(device, 1.0)
    ref_logps = torch.zeros(len(LD_LENGTHS), device=device)
    ref_logps[pairs.long()] = by_pair
    got, plain = (
        run(logps, cu_targets, pairs, by_pair, **options, beta=0.1),
        run(logps, cu_targets, pairs, ref_logps, beta=0.1),
    )
    assert torch.equal(got.pair_losses, plain.pair_losses)
    assert torch.equal(got.rewards, plain.rewards[pairs.long()])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalize": True}, "lengths: needed for normalize=True, ld_alpha=None, got None"),
        ({"ld_alpha": 0.5}, "lengths and positions: needed for normalize=False, ld_alpha=0.5, got None"),
        ({"ld_alpha": 1.5}, r"ld_alpha: expected a number in \[0, 1\] or None, got 1.5"),
        ({"lengths": torch.ones(3)}, r"lengths: expected \(2,\) float32 .* got \(3,\)"),
        ({"positions": torch.zeros(2)}, r"positions: expected \(2,\) int32 .* torch.float32"),
    ],
)
def test_bad_lengths_and_positions(change, message):
    with pytest.raises(ValueError, match=message):
        preference_sigmoid(torch.zeros(2), cumulative([1, 1]), ADJACENCY, **{"beta": 0.1, **change})


COLUMNS = ["weight", "margin", "beta", "label_smoothing", "token_weights"]


def columns_of(names, targets, pairs, device):
    """The kernel's arguments for these columns: a third of the targets masked, and one pair of weight 0."""
    drawn = torch.rand(len(COLUMNS) - 1, pairs)
    drawn[0, 1] = 0.0
    scaled = drawn * torch.tensor([[3.0], [2.0], [0.5], [0.5]]) + torch.tensor([[0.0], [-1.0], [0.01], [0.0]])
    options = PairOptions(
        *(row.to(device) if name in names else None for name, row in zip(COLUMNS, scaled, strict=False))
    )
    weights = torch.rand(targets).sub(0.3).clamp(min=0).to(device) if "token_weights" in names else None
    return {"of_pairs": options, "token_weights": weights}


def truth_of_columns(inputs, dtype, columns, *, lengths=None, normalize=False, positions=None, ld_alpha=None, **option):
    """PreferenceSigmoid's fields by torch in this dtype, from the equations, with coefficients of targets (N,)."""
    logps, cu_targets, pairs, ref_logps = (None if x is None else x.cpu() for x in inputs)
    of_pairs, weights = columns["of_pairs"], columns["token_weights"]
    tokens = logps.to(dtype).requires_grad_()
    owner = torch.repeat_interleave(torch.arange(len(cu_targets) - 1), cu_targets.diff())
    terms = tokens if weights is None else torch.where(weights.cpu() > 0, tokens * weights.cpu().to(dtype), 0.0)
    sums = torch.zeros(len(cu_targets) - 1, dtype=dtype).index_add(0, owner, terms)
    index = pairs.long()
    if ld_alpha is None:
        own, ref = sums[index], 0.0 if ref_logps is None else ref_logps.to(dtype)[index]
    else:
        own, ref = torch.zeros(len(pairs), 2, dtype=dtype), ref_logps.to(dtype)
        for p, sides in enumerate(index.tolist()):
            shared = min(float(lengths[s]) for s in sides)
            for side, s in enumerate(sides):
                part = slice(int(cu_targets[s]), int(cu_targets[s + 1]))
                own[p, side] = (tokens[part] * torch.where(positions.cpu()[part] < shared, 1.0, ld_alpha)).sum()
    margin, beta, smoothing = (
        torch.tensor(otherwise, dtype=dtype) if column is None else column.cpu().to(dtype)
        for column, otherwise in (
            (of_pairs.margin, 0.0),
            (of_pairs.beta, option["beta"]),
            (of_pairs.label_smoothing, option.get("label_smoothing", 0.0)),
        )
    )
    ratios = own - ref
    means = ratios / lengths.cpu().to(dtype)[index] if normalize else ratios
    u = beta * (means[:, 0] - means[:, 1]) - margin
    ls = torch.nn.functional.logsigmoid
    losses = -(1 - smoothing) * ls(u) - smoothing * ls(-u)
    if of_pairs.weight is not None:
        losses = losses * of_pairs.weight.cpu().to(dtype)
    (coefficients,) = torch.autograd.grad(losses.sum(), tokens)
    rewards = beta.expand(len(pairs))[:, None] * ratios
    if of_pairs.beta is None and ld_alpha is None:
        rewards = beta * (sums if ref_logps is None else sums - ref_logps.to(dtype))
    return losses.detach(), coefficients, rewards.detach(), (sums if ld_alpha is None else own).detach()


CASES = [[name] for name in COLUMNS] + [COLUMNS, ["weight", "beta"], ["margin", "token_weights"]]


@pytest.mark.parametrize("names", CASES, ids="+".join)
@pytest.mark.parametrize("variant", ["plain", "no reference", "per token", "ld", "ld per token"])
def test_columns_are_as_exact_as_torch(variant, names, device):
    ld_alpha = 0.3 if "ld" in variant else None
    inputs, options, _ = ld_batch(device, ld_alpha)
    if variant in ("plain", "no reference"):
        options = {}
    if variant == "no reference":
        inputs = (*inputs[:3], None)
    if ld_alpha is not None:
        names = [name for name in names if name != "token_weights"]
    columns = columns_of(names, len(inputs[0]), len(inputs[2]), device)
    options |= {"beta": 30.0 if "per token" in variant else 0.1, "normalize": "per token" in variant}
    got = run(*inputs, **options, **columns)
    exact, framework = (truth_of_columns(inputs, dtype, columns, **options) for dtype in (torch.float64, torch.float32))
    if got.coefficients.shape != exact[1].shape:  # of sequences: those of each one's first target
        first = inputs[1][:-1].long().cpu()
        exact, framework = ((a, b[first], *rest) for a, b, *rest in (exact, framework))
    beta = options["beta"] if "beta" not in names else float(columns["of_pairs"].beta.max())
    assert_as_good_as_torch(type(got)(*(value.cpu() for value in got)), tuple(exact), tuple(framework), beta)
    if "token_weights" in names:
        assert (got.coefficients[columns["token_weights"] == 0] == 0).all()


@pytest.mark.parametrize("variant", ["plain", "per token", "ld"])
def test_neutral_columns_change_no_bit(variant, device):
    inputs, options, _ = ld_batch(device, 0.3 if variant == "ld" else None)
    options |= {"beta": 0.1, "label_smoothing": 0.2, "normalize": variant == "per token"}
    plain = run(*inputs, **options)
    ones = torch.ones(len(inputs[2]), device=device)
    neutral = {"weight": ones, "margin": 0 * ones, "beta": 0.1 * ones, "label_smoothing": 0.2 * ones}
    for names in [*([name] for name in neutral), list(neutral)]:
        got = run(*inputs, **options, of_pairs=PairOptions(**{name: neutral[name] for name in names}))
        rewards = plain.rewards
        if "beta" in names and rewards.dim() == 1:
            rewards = rewards[inputs[2].long()]
        assert torch.equal(got.rewards, rewards)
        for field in ("pair_losses", "coefficients", "sequence_logps"):
            assert torch.equal(getattr(got, field), getattr(plain, field)), (field, names)
    if variant != "ld":
        got = run(*inputs, **options, token_weights=torch.ones_like(inputs[0]))
        assert torch.equal(got.coefficients, plain.coefficients.repeat_interleave(inputs[1].diff()))
        for field in ("pair_losses", "rewards", "sequence_logps"):
            assert torch.equal(getattr(got, field), getattr(plain, field)), field


def test_a_masked_target_may_be_infinite(device):
    (logps, cu_targets, pairs, ref_logps), _, _ = ld_batch(device, None)
    weights = torch.ones_like(logps)
    weights[::3] = 0.0
    broken = torch.where(weights == 0, -math.inf, logps)
    got, expected = (run(x, cu_targets, pairs, ref_logps, beta=0.1, token_weights=weights) for x in (broken, logps))
    for value, other in zip(got, expected, strict=True):
        assert torch.equal(value, other)
    assert (got.coefficients[::3] == 0).all()


def test_columns_that_are_not_contiguous(device):
    inputs, _, _ = ld_batch(device, None)
    columns = columns_of(COLUMNS, len(inputs[0]), len(inputs[2]), device)
    apart = {
        "of_pairs": PairOptions(*(torch.stack([x, x + 1], 1)[:, 0] for x in columns["of_pairs"])),
        "token_weights": torch.stack([columns["token_weights"]] * 2, 1)[:, 0],
    }
    for got, expected in zip(run(*inputs, beta=0.1, **apart), run(*inputs, beta=0.1, **columns), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_weights": torch.ones(3)}, r"token_weights: expected \(2,\) float32 .* got \(3,\)"),
        ({"token_weights": torch.ones(2).bool()}, r"token_weights: expected \(2,\) float32 .* torch.bool"),
        ({"of_pairs": PairOptions(margin=torch.ones(2))}, r"of_pairs.margin: expected \(1,\) float32 .* got \(2,\)"),
        ({"of_pairs": PairOptions(beta=torch.ones(1).double())}, r"of_pairs.beta: expected \(1,\) float32"),
        (
            {
                "token_weights": torch.ones(2),
                "ld_alpha": 0.5,
                "lengths": torch.ones(2),
                "positions": torch.zeros(2, dtype=torch.int32),
            },
            "token_weights: expected None beside ld_alpha",
        ),
    ],
)
def test_bad_columns(change, message):
    with pytest.raises(ValueError, match=message):
        preference_sigmoid(torch.zeros(2), cumulative([1, 1]), ADJACENCY, **{"beta": 0.1, **change})
