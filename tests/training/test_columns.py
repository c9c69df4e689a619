"""Columns of pairs and lists in a model's call and in an optimizer step, however the step is cut."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from dpofast import PackedPreference, PreferenceLoss, attach_logprob_head, pack, preference_loss, sequence_logprobs
from dpofast.common.ranks import Ranks
from dpofast.losses.columns import PreferenceColumns
from dpofast.losses.functional import token_preference_loss
from dpofast.losses.pairs import StepTotals
from dpofast.losses.sequences import Tokens
from dpofast.training.coupled import coupled_shares, gathered
from dpofast.training.step import OptimizerStep, StepSettings
from tests.support.tiny import VOCAB, tiny_model

GROUPS = 4
# Each kind with the columns that it takes here.
LOSSES = {
    "sigmoid": ({"kind": "sigmoid"}, ("weight", "margin", "beta", "label_smoothing", "token_weights")),
    "sigmoid_norm": ({"kind": "sigmoid_norm"}, ("weight", "token_weights")),
    "kto_pair": ({"kind": "kto_pair"}, ("weight", "beta", "token_weights")),
    "kto_pair weighted": ({"kind": "kto_pair", "use_weighting": True}, ("weight", "token_weights")),
    "plackett_luce": ({"kind": "plackett_luce"}, ("weight", "token_weights", "lists", "ranks")),
    "mix": ({"kind": ("plackett_luce", "kto_pair")}, ("weight", "token_weights", "lists", "ranks")),
}


def examples():
    """Two pairs a prompt, of three responses: which are the group's list, best first."""
    generator = torch.Generator().manual_seed(3)

    def ids(low, high):
        return torch.randint(3, VOCAB, (int(torch.randint(low, high, (), generator=generator)),), generator=generator)

    rows = []
    for _ in range(GROUPS):
        prompt, best, *others = (part.tolist() for part in (ids(3, 8), ids(2, 6), ids(3, 9), ids(2, 7)))
        for other in others:
            logps = {"ref_chosen_logps": -4.0 * len(best), "ref_rejected_logps": -4.5 * len(other)}
            rows.append({"prompt_ids": prompt, "chosen_ids": best, "rejected_ids": other, **logps})
    return rows


def batches_of(groups_apart, names):
    """The examples packed, in one batch or a prompt at a time, with these columns, which follow from row and tokens."""
    rows = examples()
    parts = [rows[2 * g : 2 * g + 2] for g in range(GROUPS)] if groups_apart else [rows]
    generator = torch.Generator().manual_seed(4)
    drawn = torch.rand(4, 2 * GROUPS, generator=generator)
    of_ids = torch.randint(0, 3, (VOCAB,), generator=generator) / 2  # weights 0, 0.5 and 1
    batches = []
    for part in parts:
        (batch,) = pack(part)
        batch = replace(batch, pair_examples=batch.pair_examples + 2 * len(batches))
        columns = PreferenceColumns(token_weights=of_ids[batch.targets])
        if "lists" in names:
            triples = torch.cat([batch.pairs[::2], batch.pairs[1::2, 1:]], dim=1)
            batch = replace(batch, pairs=triples[:, [0, 2]], pair_examples=batch.pair_examples[::2])
            columns = columns._replace(lists=triples, ranks=torch.tensor([[0, 1, 1]]).expand(len(triples), 3).int())
        at = batch.pair_examples
        columns = columns._replace(
            weight=3 * drawn[0, at],
            margin=drawn[1, at],
            beta=0.05 + drawn[2, at],
            label_smoothing=drawn[3, at] / 2,
        )
        batches.append(replace(batch, columns=PreferenceColumns(**{name: getattr(columns, name) for name in names})))
    return batches


def model_with_head(padded=False):
    return attach_logprob_head(tiny_model().train(), padded=padded)


def gradients_of(model):
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def step_of(name, groups_apart, *, padded=False, token_statistics=False):
    """Losses, best-and-worst rewards and gradients of one optimizer step."""
    options, names = LOSSES[name]
    batches = batches_of(groups_apart, names)
    accelerator = Accelerator(cpu=True)
    settings = StepSettings(
        loss=PreferenceLoss(beta=0.3, **options),
        reference=None,
        ranks=Ranks.alone(),
        accelerator=accelerator,
        device=torch.device("cpu"),
        token_statistics=token_statistics,
    )
    model = model_with_head(padded)
    rows = sum(len(batch.pairs) for batch in batches)
    result = OptimizerStep(settings, model, batches, StepTotals(rows, rows, None)).run()
    return torch.cat(result.losses), torch.cat(result.rewards), gradients_of(model)


def by_hand(name):
    """The same from the log-probs of all tokens at once."""
    options, names = LOSSES[name]
    (batch,) = batches_of(False, names)
    model = model_with_head()
    stats = ("log_sum_sq_probs",) if "use_weighting" in options else ()
    tokens = model(packed=batch, stats=stats)
    output = token_preference_loss(
        tokens.logps,
        batch.cu_targets,
        batch.pairs,
        batch.ref_logps,
        loss=PreferenceLoss(beta=0.3, **options),
        log_sum_sq_probs=tokens.log_sum_sq_probs,
        columns=batch.columns,
    )
    output.loss.backward()
    return output.losses, output.of_pairs("rewards", batch.pairs, batch.columns.lists), gradients_of(model)


@pytest.mark.parametrize("name", LOSSES)
def test_results_do_not_depend_on_how_the_step_is_cut(name):
    expected = by_hand(name)
    cuts = ({"groups_apart": False}, {"groups_apart": True}, {"groups_apart": True, "padded": True})
    if "beta" not in LOSSES[name][1] or "lists" not in LOSSES[name][1]:
        cuts = (*cuts, {"groups_apart": True, "token_statistics": True})
    for cut in cuts:
        for value, other in zip(step_of(name, **cut), expected, strict=True):
            torch.testing.assert_close(value, other, atol=2e-6, rtol=1e-5, msg=f"{cut}")


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["sigmoid", "plackett_luce"])
def test_a_batchs_columns_reach_the_loss_in_one_pass(name, padded):
    """model(packed=batch, preference=...) against sequence_logprobs, which weights tokens, and preference_loss."""
    options, names = LOSSES[name]
    (batch,) = batches_of(False, names)
    model, loss = model_with_head(padded), PreferenceLoss(beta=0.3, **options)
    whole = model(packed=batch, preference=PackedPreference(batch.ref_logps, loss, 9))
    whole.loss.backward()
    gradients, other = gradients_of(model), copy.deepcopy(model)
    other.zero_grad()
    logps = sequence_logprobs(other(packed=batch), batch)
    steps = preference_loss(logps, batch.pairs, batch.ref_logps, loss=loss, num_pairs=9, columns=batch.columns)
    steps.loss.backward()
    for field in ("loss", "losses", "logps", "rewards"):
        torch.testing.assert_close(getattr(whole, field), getattr(steps, field), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients, gradients_of(other), atol=2e-6, rtol=1e-5)
    if name == "sigmoid":
        assert whole.rewards.shape == (2 * GROUPS, 2)


class SameTwice(Ranks):
    """Two ranks that hold the same micro-batches; values go through pickle, as between processes."""

    def __init__(self):
        """The second of the two."""
        self.rank, self.size = 1, 2

    def all_gather(self, value):
        """The value, twice."""
        return [pickle.loads(pickle.dumps(value)) for _ in range(2)]


def test_columns_are_gathered_and_joined_over_ranks():
    """A coupled mix over lists with betas: the shares of micro-batches of different widths are those of one of all."""
    names = ("weight", "beta", "token_weights", "lists", "ranks")
    loss = PreferenceLoss(kind=("plackett_luce", "kto_pair"), beta=0.3)
    parts = batches_of(True, names)[:2]
    # The second has a list of two, and its responses no token weights.
    narrow, two = parts[1].columns, parts[1].columns.lists[:, :2]
    parts[1] = replace(parts[1], pairs=two, columns=narrow._replace(lists=two, ranks=narrow.ranks[:, :2]))
    generator = torch.Generator().manual_seed(8)
    tokens = [
        Tokens(-torch.rand(part.num_targets, generator=generator), part.cu_targets, weights=part.columns.token_weights)
        for part in parts
    ]
    tokens[1] = replace(tokens[1], weights=None)
    rows, refs = [(part.pairs, part.columns) for part in parts], [part.ref_logps for part in parts]
    everyone, first = gathered(SameTwice(), tokens, rows, refs, torch.device("cpu"))
    assert first == 2 and len(everyone[0]) == 4
    totals = StepTotals(4)
    shares = coupled_shares(*everyone, loss, totals)

    sequences, targets = parts[0].num_sequences, parts[0].num_targets
    before = [0, sequences, sequences + 3, 2 * sequences + 3]
    lists = [
        [*(numbers + first for numbers in columns.lists[0].tolist()), -1][:3]
        for (_, columns), first in zip(rows * 2, before, strict=True)
    ]
    leaf = torch.cat([part.logps for part in tokens] * 2).requires_grad_()
    expected = token_preference_loss(
        leaf,
        torch.tensor([0, *torch.cat([part.cu_targets.diff() for part in tokens] * 2).cumsum(0)], dtype=torch.int32),
        torch.cat([pairs + first for (pairs, _), first in zip(rows * 2, before, strict=True)]),
        torch.cat(refs * 2),
        loss=loss,
        columns=PreferenceColumns(
            weight=torch.cat([columns.weight for _, columns in rows] * 2),
            beta=torch.cat([columns.beta for _, columns in rows] * 2),
            token_weights=torch.cat([tokens[0].weights, torch.ones_like(tokens[1].logps)] * 2),
            lists=torch.tensor(lists, dtype=torch.int32),
            ranks=torch.tensor([[0, 1, 1], [0, 1, -1]] * 2, dtype=torch.int32),
        ),
    )
    expected.loss.backward()
    torch.testing.assert_close(sum(share.output.loss for share in shares), expected.loss.detach())
    torch.testing.assert_close(torch.cat([share.coefficients for share in shares]), leaf.grad)
    torch.testing.assert_close(torch.cat([share.output.rewards for share in shares]), expected.rewards)
    torch.testing.assert_close(shares[0].output.logps, expected.logps[:sequences])
    torch.testing.assert_close(shares[0].coefficients, leaf.grad[:targets])
    # What a micro-batch reads of its share: the rewards of its own list, of two.
    share, columns = shares[1], parts[1].columns
    assert share.output.of_lists("rewards", columns.lists).shape == (1, 2)
    assert torch.equal(share.output.of_pairs("rewards", parts[1].pairs, columns.lists), share.output.rewards[:, :2])
