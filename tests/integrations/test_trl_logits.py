"""ScoredLogits against the logits that they stand for, under all that trl before 1.15 does with logits."""

import pytest
import torch
from torch.nn import functional as F

from dpofast import reference
from dpofast.integrations._trl.logits import scored_output

ROWS, WIDTH, VOCAB = 4, 6, 11


@pytest.fixture
def both():
    """Logits, what stands for them, labels (rows, width) and the mask of next-token labels (rows, width - 1)."""
    logits = torch.randn(ROWS, WIDTH, VOCAB)
    labels = torch.randint(0, VOCAB, (ROWS, WIDTH))
    labels[:, :2], labels[1, 4:] = -100, -100
    targets = labels[:, 1:]
    grids = reference.token_statistics(logits[:, :-1], targets, ignore_index=-100)
    grids["log_probs"] = reference.logprobs(logits[:, :-1], targets)
    return logits, scored_output(grids, labels, None, VOCAB, None).logits, labels, targets != -100


def test_shapes_and_slices(both):
    logits, scored, *_ = both
    for index in ((..., slice(None, -1), slice(None)), (slice(2), slice(None, -1)), (slice(None), slice(-3, None)), 0):
        assert scored[index].shape == logits[index].shape
    assert scored.size(0) == ROWS and scored.dtype == torch.float32 and scored.device.type == "cpu"
    assert scored.contiguous() is scored
    assert [part.shape for part in scored.chunk(2, dim=0)] == [part.shape for part in logits.chunk(2)]
    assert torch.flatten(scored, end_dim=1).shape == logits.flatten(end_dim=1).shape


def test_values(both):
    logits, scored, labels, mask = both
    logits, scored, targets = logits[:, :-1], scored[..., :-1, :].detach(), labels[:, 1:]
    safe = targets.masked_fill(~mask, 0)
    logps = logits.log_softmax(-1)
    torch.testing.assert_close(scored.log_softmax_at(safe)[mask], logps.gather(-1, safe[..., None]).squeeze(-1)[mask])
    torch.testing.assert_close(scored[mask].mean(-1), logits[mask].mean(-1))
    torch.testing.assert_close(scored[mask].mean(), logits[mask].mean())
    assert torch.equal((scored.argmax(dim=-1) == safe)[mask], (logits.argmax(-1) == safe)[mask])
    torch.testing.assert_close(scored.entropy()[mask], -(logps.exp() * logps).sum(-1)[mask])
    first = torch.logsumexp(2.0 * scored, dim=-1) - 2.0 * torch.logsumexp(scored, dim=-1)
    second = torch.logsumexp(2.0 * logits, dim=-1) - 2.0 * torch.logsumexp(logits, dim=-1)
    torch.testing.assert_close(first[mask], second[mask])
    normalized = torch.logsumexp(2 * F.log_softmax(scored, dim=-1), dim=-1)
    torch.testing.assert_close(normalized[mask], torch.logsumexp(2 * logps, dim=-1)[mask])
    torch.testing.assert_close(
        F.cross_entropy(scored[mask], targets[mask]), F.cross_entropy(logits[mask], targets[mask])
    )
    torch.testing.assert_close(
        F.cross_entropy(torch.flatten(scored, end_dim=1), targets.flatten(), ignore_index=-100),
        F.cross_entropy(logits.flatten(end_dim=1), targets.flatten(), ignore_index=-100),
    )


def test_the_last_positions_alone(both):
    _, scored, labels, _ = both
    grids = {"log_probs": scored.values["log_probs"][:, :-1]}
    assert scored_output(grids, labels, None, VOCAB, 3).logits.shape == (ROWS, 3, VOCAB)


def test_another_token_than_the_label_shows(both):
    _, scored, labels, mask = both
    wrong = (labels[:, 1:] + 1) % VOCAB
    assert scored[..., :-1, :].log_softmax_at(wrong)[mask].isnan().all()
    assert scored.mean(-1)[:, 0].isnan().all()  # no label there


def test_what_was_not_computed_is_refused(both):
    _, scored, labels, _ = both
    bare = scored_output({"log_probs": scored.values["log_probs"][:, :-1]}, labels, None, VOCAB, None).logits
    for ask, what in (
        (lambda: bare.mean(), "mean was asked"),
        (lambda: bare.argmax(dim=-1), "argmax was asked"),
        (lambda: bare.entropy(), "entropy was asked"),
        (lambda: torch.logsumexp(2.0 * bare, dim=-1), "logsumexp was asked"),
        (lambda: torch.softmax(scored, dim=-1), "softmax was asked of logits that are never built"),
        (lambda: torch.logsumexp(3.0 * scored, dim=-1), "times 3.0"),
        (lambda: scored[..., :5], "a part of the vocabulary"),
        (lambda: scored.mean(0), "expected dim -1 or none"),
        (lambda: scored.argmax(dim=0), "expected dim -1"),
        (lambda: scored.chunk(2, dim=2), "expected dim 0 or 1"),
        (lambda: F.cross_entropy(scored, labels, reduction="sum"), "reduction 'sum'"),
    ):
        with pytest.raises(ValueError, match=what):
            ask()
