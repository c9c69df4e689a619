"""Columns where a loss could misread them: margins in a mix, numbers out of range, pairs beside other lists."""

import pytest
import torch

from dpofast import PreferenceLoss, preference_loss
from dpofast.losses.columns import PreferenceColumns

LOGPS = torch.tensor([-5.0, -7.0, -6.0, -9.0], dtype=torch.float64)
REF = torch.tensor([-5.5, -6.5, -6.2, -8.5], dtype=torch.float64)
PAIRS = torch.tensor([[0, 1], [2, 3]])
LISTS = torch.tensor([[0, 2, 1], [2, 3, -1]], dtype=torch.int32)
RANKS = torch.tensor([[0, 1, 2], [0, 1, -1]], dtype=torch.int32)


def losses(columns=PreferenceColumns(), **loss):  # noqa: B008
    return preference_loss(LOGPS, PAIRS, REF, loss=PreferenceLoss(**loss), columns=columns).losses


@pytest.mark.parametrize("other", [{"kind": "robust", "label_smoothing": 0.1}, {"kind": "ipo", "ipo_average": False}])
def test_a_margin_enters_the_kinds_of_a_mix_that_take_it_alone(other):
    margin = PreferenceColumns(margin=torch.tensor([1.0, -0.5]))
    smoothing = {key: value for key, value in other.items() if key != "kind"}
    alone = losses(**other)
    taking = losses(margin, kind="hinge")
    mixed = losses(margin, **{**smoothing, "kind": ["hinge", other["kind"]]})
    torch.testing.assert_close(mixed, taking + alone, atol=1e-14, rtol=0)


@pytest.mark.parametrize(
    ("column", "values", "loss", "message"),
    [
        ("beta", [-1.0, 0.1], {}, "beta: expected finite numbers above 0, got -1.0"),
        ("beta", [0.1, torch.nan], {}, "beta: expected finite numbers above 0, got nan"),
        ("weight", [1.0, -2.0], {}, "weight: expected 0 or more, got -2.0"),
        ("margin", [torch.inf, 0.0], {}, "margin: expected finite numbers, got inf"),
        ("label_smoothing", [0.9, 0.0], {}, r"label_smoothing: expected numbers in \[0, 0.5\] for kind 'sigmoid', got"),
        (
            "label_smoothing",
            [0.5, 0.0],
            {"kind": "robust", "label_smoothing": 0.1},
            r"label_smoothing: expected numbers in \[0, 0.5\) for kind 'robust', got 0.5",
        ),
    ],
)
def test_numbers_out_of_range(column, values, loss, message):
    with pytest.raises(ValueError, match=message):
        losses(PreferenceColumns(**{column: torch.tensor(values)}), **loss)


def test_pairs_are_the_best_and_the_worst_of_their_lists():
    columns = PreferenceColumns(lists=LISTS, ranks=RANKS)
    assert losses(columns, kind="plackett_luce").shape == (2,)
    with pytest.raises(ValueError, match="pairs: expected the first and the last sequence of every list"):
        preference_loss(LOGPS, PAIRS.flip(0), REF, loss=PreferenceLoss(kind="plackett_luce"), columns=columns)


def test_a_list_of_one_is_refused():
    one = PreferenceColumns(lists=LISTS[:, :1].contiguous(), ranks=RANKS[:, :1].contiguous())
    with pytest.raises(ValueError, match="lists: expected sequence numbers .* two or more a list"):
        losses(one, kind="plackett_luce")


@pytest.mark.parametrize("kind", ["plackett_luce", "infonca", "softmax_dpo"])
@pytest.mark.parametrize("margin", [10.0, 20.0, 60.0])
def test_pairs_that_are_won_by_far_keep_the_digits_of_sigmoid_in_float32(kind, margin):
    """log(1 + e^-20) is 0 in float32 where it is written as a logsumexp."""
    found = []
    for name in (kind, "sigmoid"):
        logps = torch.tensor([0.0, -margin], requires_grad=True)
        loss = PreferenceLoss(kind=name, beta=1.0)
        output = preference_loss(logps, torch.tensor([[0, 1]]), torch.zeros(2), loss=loss)
        output.loss.backward()
        found.append((output.loss.detach(), logps.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=0)
