"""Columns of pairs and lists in the losses: by hand in float64, and neutral values that change no bit."""

import pytest
import torch

from dpofast import PreferenceLoss, preference_loss
from dpofast.losses.coefficients import pair_terms, runs_fused
from dpofast.losses.columns import NO_COLUMNS, PreferenceColumns
from dpofast.losses.functional import token_preference_loss
from dpofast.losses.pairs import StepTotals
from dpofast.losses.sequences import Tokens, segment_sums
from tests.support.columns_cases import (
    LISTS,
    list_columns,
    list_problem,
    pair_columns,
    pair_losses,
    plackett_luce_losses,
    token_weights,
    weighted_lengths,
    weighted_sums,
)
from tests.support.losses_cases import LENGTHS, LOSSES, problem, reference_sums

PLACKETT_LUCE = PreferenceLoss(kind="plackett_luce", beta=0.3)


def run(tokens, cu_targets, pairs, ref, *, upstream=1.7, **options):
    """The output, and the gradient of upstream · loss."""
    leaf = tokens.clone().requires_grad_()
    output = token_preference_loss(leaf, cu_targets, pairs, ref, **options)
    (gradient,) = torch.autograd.grad(output.loss * upstream, leaf)
    return output, gradient


def assert_same_bits(got, expected, pairs):
    """Outputs and gradients; rewards of pairs, which a column beta makes (P, 2)."""
    for field in ("loss", "losses", "logps"):
        assert torch.equal(getattr(got[0], field), getattr(expected[0], field)), field
    assert torch.equal(got[0].of_pairs("rewards", pairs), expected[0].of_pairs("rewards", pairs))
    assert torch.equal(got[1], expected[1])


# Losses whose column can be told from the option in float32 only by a rounding of the option: a beta of 0.25 has none,
# and 0.3 is multiplied as float32 either way where nothing but β·Δ is computed of it.
NEUTRAL = {
    "sigmoid": {"kind": "sigmoid", "beta": 0.3, "label_smoothing": 0.125},
    "sigmoid without smoothing": {"kind": "sigmoid", "beta": 0.3},
    "sigmoid per token": {"kind": "sigmoid_norm", "beta": 0.3, "label_smoothing": 0.125},
    "js_divergence": {"kind": "sigmoid", "beta": 0.3, "f_divergence_type": "js_divergence"},
    "rpo": {"kind": "sigmoid", "rpo_alpha": 0.4},
    "wpo": {"kind": "sigmoid", "use_weighting": True},
    "ld": {"kind": "sigmoid", "ld_alpha": 0.3, "label_smoothing": 0.125},
    "ipo": {"kind": "ipo", "beta": 0.25},
    "cal_dpo": {"kind": "cal_dpo", "beta": 0.25},
    "aot": {"kind": "aot", "beta": 0.3, "label_smoothing": 0.125},
    "cpo": {"kind": "cpo", "beta": 0.3},
    "orpo": {"kind": "orpo", "beta": 0.3},
    "sft": {"kind": "sft"},
    "hinge": {"kind": "hinge", "beta": 0.3},
    "plackett_luce": {"kind": "plackett_luce", "beta": 0.3},
}


def neutral_columns(loss, pairs):
    """The columns that say what the loss says already."""
    ones = torch.ones(pairs)
    columns = {"weight": ones, "beta": ones * loss.beta}
    if loss.ld_alpha is None:
        columns["token_weights"] = torch.ones(sum(LENGTHS))
    if loss.kind in ("sigmoid", "hinge"):
        columns["margin"] = torch.zeros(pairs)
    if loss.kind in ("sigmoid", "sigmoid_norm", "aot"):
        columns["label_smoothing"] = ones * loss.label_smoothing
    return columns


BACKENDS = [(name, "torch") for name in NEUTRAL]
BACKENDS += [(name, "triton") for name in NEUTRAL if runs_fused(PreferenceLoss(**NEUTRAL[name]), "triton")]


@pytest.mark.parametrize(("name", "backend"), BACKENDS)
def test_columns_that_say_nothing_new_change_no_bit(name, backend, device):
    loss = PreferenceLoss(**NEUTRAL[name])
    tokens, cu_targets, pairs, ref_tokens, log_sum_sq = problem(torch.float32)
    ref = reference_sums(ref_tokens, cu_targets, pairs, loss)
    tokens, log_sum_sq = tokens.to(device), log_sum_sq.to(device)
    options = {"loss": loss, "log_sum_sq_probs": log_sum_sq, "num_pairs": 7, "backend": backend}
    known = (tokens, cu_targets, pairs, None if ref is None else ref.to(device))
    expected = run(*known, **options)
    columns = {column: values.to(device) for column, values in neutral_columns(loss, len(pairs)).items()}
    for column in columns:
        got = run(*known, **options, columns=PreferenceColumns(**{column: columns[column]}))
        assert_same_bits(got, expected, pairs)
    assert_same_bits(run(*known, **options, columns=PreferenceColumns(**columns)), expected, pairs)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("kind", ["sigmoid", "sigmoid_norm", "hinge", "sft"])
def test_every_column_by_hand(kind, backend, device):
    """Values and gradients against the equations in float64, of float32 tokens and of float64 ones."""
    loss = PreferenceLoss(kind=kind, beta=0.3, label_smoothing=0.1 if kind.startswith("sigmoid") else 0.0)
    columns = pair_columns()
    if kind not in ("sigmoid", "hinge"):
        columns = columns._replace(margin=None)
    if not kind.startswith("sigmoid"):
        columns = columns._replace(label_smoothing=None)
    tokens, cu_targets, pairs, ref_tokens, _ = problem()
    weights = columns.token_weights
    for dtype in (torch.float32, torch.float64):
        if dtype == torch.float64 and backend == "triton":
            continue  # the kernel is float32
        wide = tokens.to(dtype).double().requires_grad_()
        ref = weighted_sums(ref_tokens, cu_targets, weights).to(dtype)
        sums, lengths = weighted_sums(wide, cu_targets, weights), weighted_lengths(cu_targets, weights)
        losses = pair_losses(kind, sums, ref.double(), lengths, pairs, columns, 0.3, loss.label_smoothing)
        (losses.sum() / 7 * 1.7).backward()
        moved = columns.moved(lambda column: column.to(device))
        known = (tokens.to(device, dtype), cu_targets, pairs, ref.to(device))
        output, gradient = run(*known, loss=loss, num_pairs=7, columns=moved, backend=backend)
        if kind == "sft":  # its divisor is the step's, which num_pairs belongs to
            output, gradient = run(*known, loss=loss, columns=moved, backend=backend)
            wide.grad *= 7 / len(pairs)
        tolerance = {"atol": 2e-6, "rtol": 2e-6} if dtype == torch.float32 else {"atol": 1e-12, "rtol": 1e-12}
        torch.testing.assert_close(output.losses.double().cpu(), losses.detach(), **tolerance)
        torch.testing.assert_close(output.logps.double().cpu(), sums.detach(), **tolerance)
        torch.testing.assert_close(gradient.double().cpu(), wide.grad, **tolerance)
        rewards = columns.beta[:, None].double() * (sums.detach() - ref.double())[pairs.long()]
        torch.testing.assert_close(output.rewards.double().cpu(), rewards, **tolerance)
        assert (gradient.cpu()[weights == 0] == 0).all()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_norm", "sigmoid weighted", "sigmoid rpo", "sft", "mpo"])
def test_masked_tokens_are_left_out_of_every_sum(name, backend, device):
    """Masks of 0 and 1: the loss of the tokens that are left; the gradient of the others is 0, also at −inf."""
    loss = PreferenceLoss(**LOSSES[name])
    tokens, cu_targets, pairs, ref_tokens, log_sum_sq = problem(torch.float32)
    mask = (token_weights() > 0).float()
    kept = mask > 0
    tokens[~kept] = -torch.inf
    sizes = segment_sums(mask, cu_targets)
    left = torch.tensor([0, *sizes.cumsum(0)]).to(torch.int32)
    ref = None if not loss.needs_reference else segment_sums(ref_tokens[kept], left).to(device)
    options = {"loss": loss, "num_pairs": 7, "backend": backend}

    def weighted(values):
        return values.to(device) if loss.use_weighting else None

    got, gradient = run(
        tokens.to(device),
        cu_targets,
        pairs,
        ref,
        log_sum_sq_probs=weighted(log_sum_sq),
        columns=PreferenceColumns(token_weights=mask.to(device)),
        **options,
    )
    expected, short = run(
        tokens[kept].to(device), left, pairs, ref, log_sum_sq_probs=weighted(log_sum_sq[kept]), **options
    )
    for field in ("loss", "losses", "logps", "rewards"):
        torch.testing.assert_close(getattr(got, field), getattr(expected, field), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(gradient[kept.to(device)], short, atol=1e-7, rtol=1e-5)
    assert (gradient[~kept.to(device)] == 0).all()


def test_lengths_are_sums_of_weights():
    weights = torch.tensor([0.5, 0.0, 1.0, 0.0, 0.0, 3.0, 9.0])
    cu_targets = torch.tensor([0, 3, 5, 7], dtype=torch.int32)
    counted = torch.tensor([True] * 6 + [False])
    tokens = Tokens(torch.zeros(7), cu_targets, counted, weights=weights)
    assert tokens.lengths().tolist() == [1.5, 1.0, 3.0]
    assert Tokens(torch.zeros(7), cu_targets, counted).lengths().tolist() == [3.0, 2.0, 1.0]


def test_a_mean_over_chosen_tokens_takes_their_weights():
    """sft of a step of two calls: its divisor is a sum of weights, which may be a fraction."""
    tokens, cu_targets, pairs, _, _ = problem()
    weights, loss = token_weights(), PreferenceLoss(kind="sft")
    chosen = float(weighted_lengths(cu_targets, weights)[pairs[:, 0].long()].sum())
    whole, gradient = run(tokens, cu_targets, pairs, None, loss=loss, columns=PreferenceColumns(token_weights=weights))
    expected = -weighted_sums(tokens, cu_targets, weights)[pairs[:, 0].long()].sum() / chosen
    torch.testing.assert_close(whole.loss, expected, atol=1e-12, rtol=1e-12)
    parts = [
        run(
            tokens,
            cu_targets,
            part,
            None,
            loss=loss,
            columns=PreferenceColumns(token_weights=weights),
            num_pairs=len(pairs),
            num_chosen_tokens=chosen,
        )
        for part in pairs.split(2)
    ]
    torch.testing.assert_close(sum(part.loss for part, _ in parts), whole.loss, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(sum(part for _, part in parts), gradient, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_weight_of_0_leaves_the_pair_out(backend, device):
    tokens, cu_targets, pairs, ref_tokens, _ = problem(torch.float32)
    ref = segment_sums(ref_tokens, cu_targets).to(device)
    weight = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0], device=device)
    known = {"num_pairs": len(pairs), "backend": backend, "loss": PreferenceLoss(beta=0.3)}
    got, gradient = run(tokens.to(device), cu_targets, pairs, ref, columns=PreferenceColumns(weight=weight), **known)
    kept = pairs[weight.cpu() > 0]
    expected, expected_gradient = run(tokens.to(device), cu_targets, kept, ref, **known)
    assert torch.equal(got.losses[weight > 0], expected.losses) and (got.losses[weight == 0] == 0).all()
    torch.testing.assert_close(got.loss, expected.loss, atol=0, rtol=2e-7)
    assert torch.equal(gradient, expected_gradient)


@pytest.mark.parametrize("with_columns", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lists_from_tokens_and_from_sequences_by_hand(dtype, with_columns):
    tokens, cu_targets, pairs, ref_tokens, _ = list_problem()
    drawn = pair_columns(len(pairs))
    columns = list_columns(weight=drawn.weight, beta=drawn.beta, token_weights=token_weights())
    if not with_columns:
        columns = list_columns()
    wide = tokens.to(dtype).double().requires_grad_()
    ref = weighted_sums(ref_tokens, cu_targets, columns.token_weights).to(dtype)
    sums = weighted_sums(wide, cu_targets, columns.token_weights)
    losses = plackett_luce_losses(sums, ref.double(), columns, 0.3)
    (expected,) = torch.autograd.grad(losses.sum() / 9 * 1.7, wide)
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 1e-12, "rtol": 1e-12}
    options = {"loss": PLACKETT_LUCE, "num_pairs": 9, "columns": columns}
    by_tokens, gradient = run(tokens.to(dtype), cu_targets, pairs, ref, **options)
    leaf = tokens.to(dtype).requires_grad_()
    logps = segment_sums(leaf, cu_targets, columns.token_weights)
    by_sequences = preference_loss(logps, pairs, ref, **options)
    (by_sums,) = torch.autograd.grad(by_sequences.loss * 1.7, leaf)
    rewards = 0.3 * (sums.detach() - ref.double())
    if with_columns:
        lists = torch.tensor(LISTS)
        of_lists = columns.beta.double()[:, None] * (sums.detach() - ref.double())[lists.clamp(min=0)]
        rewards = torch.where(lists >= 0, of_lists, 0.0)
    for output, grad in ((by_tokens, gradient), (by_sequences, by_sums)):
        torch.testing.assert_close(output.losses.double(), losses.detach(), **tolerance)
        torch.testing.assert_close(output.loss.double(), losses.detach().sum() / 9, **tolerance)
        torch.testing.assert_close(output.logps.double(), sums.detach(), **tolerance)
        torch.testing.assert_close(output.rewards.double(), rewards, **tolerance)
        torch.testing.assert_close(grad.double(), expected, **tolerance)
    assert by_tokens.of_lists("rewards", columns.lists).shape == (4, 4)
    best_and_worst = by_tokens.of_pairs("rewards", pairs, columns.lists)
    at_pairs = (
        rewards[pairs.long()]
        if not with_columns
        else torch.stack(
            [rewards[:, 0], rewards.gather(1, (torch.tensor(LISTS) >= 0).sum(1, keepdim=True) - 1)[:, 0]], dim=1
        )
    )
    torch.testing.assert_close(best_and_worst.double(), at_pairs, **tolerance)


def test_a_mix_sees_the_best_and_the_worst_of_a_list():
    tokens, cu_targets, pairs, ref_tokens, _ = list_problem()
    ref = segment_sums(ref_tokens, cu_targets)
    mix = PreferenceLoss(kind=("plackett_luce", "sigmoid"), weights=(1.0, 0.5), beta=0.3)
    got, gradient = run(tokens, cu_targets, pairs, ref, loss=mix, columns=list_columns())
    ranked, of_ranked = run(tokens, cu_targets, pairs, ref, loss=PLACKETT_LUCE, columns=list_columns())
    paired, of_paired = run(tokens, cu_targets, pairs, ref, loss=PreferenceLoss(beta=0.3))
    torch.testing.assert_close(got.losses, ranked.losses + 0.5 * paired.losses, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(gradient, of_ranked + 0.5 * of_paired, atol=1e-12, rtol=1e-12)


def test_pairs_are_lists_of_two():
    tokens, cu_targets, pairs, ref_tokens, _ = problem()
    ref = segment_sums(ref_tokens, cu_targets)
    got = run(tokens, cu_targets, pairs, ref, loss=PLACKETT_LUCE)
    expected = run(tokens, cu_targets, pairs, ref, loss=PreferenceLoss(beta=0.3))
    torch.testing.assert_close(got[0].losses, expected[0].losses, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(got[1], expected[1], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("of_lists", [False, True])
def test_rows_apart_add_up_to_all_of_them(of_lists):
    """Whole components apart, as micro-batches and blocks of the head take them: the columns follow their rows."""
    loss = PLACKETT_LUCE if of_lists else PreferenceLoss(beta=0.3)
    tokens, cu_targets, pairs, ref_tokens, _ = list_problem() if of_lists else problem()
    columns = pair_columns(len(pairs))
    if of_lists:
        lists = torch.tensor([[1, 0, 2], [2, 0, -1], [5, 4, 3], [7, 6, 5]], dtype=torch.int32)
        pairs = torch.tensor([[1, 2], [2, 0], [5, 3], [7, 5]], dtype=torch.int32)
        columns = columns._replace(
            margin=None,
            label_smoothing=None,
            lists=lists,
            ranks=torch.tensor([[0, 1, 1], [0, 1, -1], [0, 1, 2], [0, 0, 1]]),
        )
    ref = weighted_sums(ref_tokens, cu_targets, columns.token_weights)
    whole, gradient = run(tokens, cu_targets, pairs, ref, loss=loss, columns=columns)
    parts = []
    for first, last in ((0, 3), (3, 8)):
        inside = (pairs[:, 0] >= first) & (pairs[:, 0] < last)
        targets = slice(int(cu_targets[first]), int(cu_targets[last]))
        part = columns.of_rows(inside, targets, first)
        parts.append(
            (
                part,
                run(
                    tokens[targets],
                    cu_targets[first : last + 1] - targets.start,
                    pairs[inside] - first,
                    ref[first:last],
                    loss=loss,
                    columns=part,
                    num_pairs=len(pairs),
                ),
                inside,
            )
        )
    torch.testing.assert_close(sum(run.loss for _, (run, _), _ in parts), whole.loss, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(torch.cat([g for _, (_, g), _ in parts]), gradient, atol=1e-12, rtol=1e-12)
    for _, (output, _), inside in parts:
        torch.testing.assert_close(output.rewards, whole.rewards[inside], atol=1e-12, rtol=1e-12)
    order = torch.cat([inside.nonzero()[:, 0] for _, _, inside in parts])
    joined = PreferenceColumns.joined([part for part, _, _ in parts], [0, 3])
    assert joined.given == columns.given
    for name, value in columns._asdict().items():
        if value is not None:
            expected = value if name == "token_weights" else value[order]
            assert torch.equal(getattr(joined, name), expected), name


def test_columns_of_some_micro_batches_do_not_join():
    with pytest.raises(ValueError, match="beta: expected in every micro-batch of the step or in none, got it in some"):
        PreferenceColumns.joined([PreferenceColumns(beta=torch.ones(2)), NO_COLUMNS], [0, 4])


@pytest.mark.parametrize("kind", ["sigmoid", "plackett_luce"])
def test_sequences_that_no_row_names(kind):
    """A block of the head may have them alone: no losses, and coefficients of 0."""
    tokens, cu_targets, pairs, _, _ = problem()
    columns = NO_COLUMNS if kind == "sigmoid" else list_columns()._replace(ranks=None, lists=None)
    terms = pair_terms(
        Tokens(tokens, cu_targets), pairs[:0], None, PreferenceLoss(kind=kind), StepTotals(3), "torch", columns
    )
    assert terms.losses.shape == (0,) and (terms.coefficients == 0).all() and len(terms.logps) == len(LENGTHS)


def test_sequence_log_probs_hold_the_token_weights_already():
    tokens, cu_targets, pairs, ref_tokens, _ = problem()
    columns = pair_columns()
    ref = weighted_sums(ref_tokens, cu_targets, columns.token_weights)
    logps = segment_sums(tokens, cu_targets, columns.token_weights)
    got = preference_loss(logps, pairs, ref, columns=columns)
    expected, _ = run(tokens, cu_targets, pairs, ref, columns=columns)
    assert torch.equal(got.losses, expected.losses) and torch.equal(got.rewards, expected.rewards)
    with pytest.raises(ValueError, match=r"token_weights: kind 'sigmoid_norm' divides by lengths, .*columns._replace"):
        loss = PreferenceLoss(kind="sigmoid_norm")
        preference_loss(logps, pairs, ref, loss=loss, lengths=torch.ones(8), columns=columns._replace(margin=None))


LIST_COLUMNS = list_columns()


@pytest.mark.parametrize(
    ("loss", "columns", "message"),
    [
        ({}, {"weight": torch.ones(3)}, r"weight: expected shape \(4,\), one a pair, got \(3,\)"),
        ({}, {"beta": torch.ones(4, 2)}, r"beta: expected shape \(4,\), one a pair, got \(4, 2\)"),
        ({}, {"token_weights": torch.ones(4)}, r"token_weights: expected shape \(30,\), got \(4,\)"),
        ({"kind": "ipo"}, {"margin": torch.ones(4)}, "margin: kind 'ipo' does not take it; it is for sigmoid, hinge"),
        ({"kind": "hinge"}, {"label_smoothing": torch.ones(4)}, "label_smoothing: kind 'hinge' does not take it"),
        (
            {"ld_alpha": 0.5},
            {"token_weights": torch.ones(30)},
            "token_weights: kind 'sigmoid' does not take it; it is for every kind without ld_alpha",
        ),
        (
            {},
            LIST_COLUMNS._asdict(),
            r"lists: kind 'sigmoid' is a loss of pairs: turn lists into pairs with list_pairs .* plackett_luce",
        ),
        (
            {"kind": "plackett_luce"},
            {"lists": LIST_COLUMNS.lists},
            "lists: expected beside ranks, and both beside scores",
        ),
        (
            {"kind": "plackett_luce"},
            {"lists": LIST_COLUMNS.lists, "ranks": LIST_COLUMNS.ranks[:, :3]},
            r"ranks: expected shape \(4, K\), one row a pair, got \(4, 3\)",
        ),
        (
            {"kind": "plackett_luce"},
            {"lists": LIST_COLUMNS.lists + 1, "ranks": LIST_COLUMNS.ranks},
            r"lists: expected sequence numbers in \[0, 8\), two or more a list, filled with -1 where ranks are",
        ),
        *(
            (
                {"kind": "plackett_luce"},
                {"lists": LIST_COLUMNS.lists[:, :3], "ranks": torch.tensor([[0, 1, 2], [0, 1, -1], ranks, [0, 1, -1]])},
                rf"ranks: expected those of a list from 0 up, without gaps, .*, got \{ranks} in list 2",
            )
            for ranks in ([1, 0, 2], [0, 2, 3], [1, 2, 3], [0, 0, 2], [0, 1, 0])
        ),
    ],
)
def test_columns_that_do_not_fit(loss, columns, message):
    tokens, cu_targets, pairs, ref_tokens, _ = list_problem()
    ref = segment_sums(ref_tokens, cu_targets)
    loss = PreferenceLoss(**loss)
    if loss.ld_alpha is not None:
        ref = ref[pairs.long()]
    with pytest.raises(ValueError, match=message):
        token_preference_loss(tokens, cu_targets, pairs, ref, loss=loss, columns=PreferenceColumns(**columns))


@pytest.mark.parametrize("value", [0.0, -1.5, float("nan"), float("inf")])
def test_a_sum_of_chosen_weights_is_above_0(value):
    with pytest.raises(ValueError, match="num_chosen_tokens: expected a sum of token weights above 0, got"):
        StepTotals(3, value)
