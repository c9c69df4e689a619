"""A loss of one's own: the same numbers as the kind that it copies, names, other processes, and what is refused."""

import dataclasses
import json
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from bench.cost import Cost
from dpofast import (
    DPOConfig,
    PreferenceLoss,
    linear_preference_loss,
    preference_loss,
    token_preference_loss,
)
from dpofast.losses.own_kinds import kind_of
from tests.support import own_losses
from tests.support.list_cases import columns_of, random_lists, random_logps
from tests.support.losses_cases import problem, reference_sums

MODULE = own_losses.__name__
# A function, and options that make a built-in kind of it.
COPIES = {
    "no declaration": (own_losses.dpo_by_hand, {"kind": "sigmoid"}),
    "margin, divergence, smoothing": (
        own_losses.sigmoid_by_hand,
        {"kind": "sigmoid", "label_smoothing": 0.1, "f_divergence_type": "js_divergence", "beta": 0.3},
    ),
    "no reference, lengths, an option": (own_losses.simpo_by_hand, {"kind": "simpo", "simpo_gamma": 0.7, "beta": 2.0}),
    "a mean over tokens": (own_losses.sft_by_hand, {"kind": "sft"}),
    "coupled": (own_losses.kto_by_hand, {"kind": "kto_pair"}),
    "all modifiers": (own_losses.dpo_by_hand, {"kind": "sigmoid", "ld_alpha": 0.3, "use_weighting": True}),
    "rpo": (own_losses.dpo_by_hand, {"kind": "sigmoid", "rpo_alpha": 0.5}),
    "lists": (own_losses.infonca_by_hand, {"kind": "infonca"}),
    "a name": (f"{MODULE}:dpo_by_hand", {"kind": "sigmoid"}),
    "a mix": ([own_losses.dpo_by_hand, "ipo"], {"kind": ["sigmoid", "ipo"], "weights": [0.5, 2.0]}),
}


def both(name):
    """The built-in loss and its copy."""
    function, options = COPIES[name]
    return PreferenceLoss(**options), PreferenceLoss(**{**options, "kind": function})


@pytest.mark.parametrize("name", [name for name in COPIES if name != "all modifiers"])
def test_of_sequence_sums_it_equals_the_built_in_kind_to_the_bit(name):
    policy, ref = random_logps(6)
    policy.requires_grad_()
    pairs = torch.tensor([[0, 1], [2, 3], [4, 5], [0, 5]], dtype=torch.int32)
    lengths, results = torch.tensor([3, 5, 2, 8, 4, 4]), []
    for loss in both(name):
        output = preference_loss(policy, pairs, ref, loss=loss, lengths=lengths)
        results.append((output.loss, output.losses, *torch.autograd.grad(output.loss, policy)))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("name", COPIES)
def test_of_tokens_it_equals_the_built_in_kind_to_the_bit(name):
    tokens, cu_targets, pairs, ref_tokens, log_sum_sq = problem(torch.float32)
    tokens.requires_grad_()
    results = []
    for loss in both(name):
        ref = reference_sums(ref_tokens, cu_targets, pairs, loss)
        known = {"loss": loss, "log_sum_sq_probs": log_sum_sq, "backend": "torch"}
        output = token_preference_loss(tokens, cu_targets, pairs, ref, **known)
        results.append((output.loss, output.losses, *torch.autograd.grad(output.loss, tokens)))
    assert all(map(torch.equal, *results))


def head_problem():
    """Hidden states and head of 28 targets, in which no component of pairs has more than ten; the reference's sums."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(28, 12, generator=generator), torch.randn(61, 12, generator=generator)
    cu_targets = torch.tensor([0, 5, 8, 9, 16, 16, 20, 22, 28], dtype=torch.int32)
    targets = torch.randint(61, (28,), generator=generator)
    return hidden, weight, targets, cu_targets, torch.tensor([[1, 2], [5, 6]], dtype=torch.int32), -10 * torch.rand(8)


@pytest.mark.parametrize("name", [name for name in COPIES if name != "all modifiers"])
def test_of_the_head_it_equals_the_built_in_kind_and_costs_the_same(name):
    hidden, weight, *known, ref = head_problem()
    results = []
    for loss in both(name):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        with Cost() as cost:
            given = ref if loss.needs_reference else None
            output = linear_preference_loss(*leaves, *known, given, loss=loss, max_logits_bytes=20 * 61 * 4)
            output.loss.backward()
        units = cost.gemm_units(28, 12, 61)
        assert units > 3 if loss.coupled else units == 3
        results.append((output.loss, output.losses, *(leaf.grad for leaf in leaves)))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("name", ["no declaration", "coupled", "lists"])
def test_it_compiles_without_a_graph_break(name):
    hidden, weight, *known, ref = head_problem()
    loss = both(name)[1]

    def function(h, w):
        return linear_preference_loss(h, w, *known, ref, loss=loss).loss

    grads = []
    for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        run(*leaves).backward()
        grads.append([leaf.grad for leaf in leaves])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_of_ragged_lists_it_equals_the_built_in_kind():
    lists = random_lists(1)
    columns, pairs = columns_of(lists)
    policy, ref = random_logps(sum(len(ranks) for _, ranks in lists))
    results = [
        preference_loss(policy, pairs, ref, loss=PreferenceLoss(kind=kind), columns=columns).losses
        for kind in ("infonca", own_losses.infonca_by_hand)
    ]
    assert torch.equal(*results)


# ---- names ----------------------------------------------------------------------------------------------------------


def test_the_loss_names_the_function_and_reads_back():
    loss = PreferenceLoss(kind=own_losses.dpo_by_hand, beta=0.3)
    assert loss.kind == f"{MODULE}:dpo_by_hand" and loss == PreferenceLoss(kind=loss.kind, beta=0.3)
    for again in (PreferenceLoss.decode(loss.encoded), pickle.loads(pickle.dumps(loss)), dataclasses.replace(loss)):
        assert again == loss and kind_of(again.kind) is kind_of(loss.kind)
    assert json.loads(loss.encoded)["kind"] == loss.kind


def losses_of(loss):
    policy, ref = random_logps(4)
    pairs = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
    return preference_loss(policy, pairs, ref, loss=PreferenceLoss.decode(loss.encoded)).losses


def scaled(factor):
    return lambda pairs, loss: factor * own_losses.dpo_by_hand(pairs, loss)


def test_functions_of_one_name_are_told_apart():
    """Closures, lambdas and partials share a name with others that compute something else."""
    one, two = (PreferenceLoss(kind=scaled(factor)) for factor in (1.0, 2.0))
    assert one.kind != two.kind and one != two
    torch.testing.assert_close(losses_of(two), 2 * losses_of(one))

    def thrice(pairs, loss, factor):
        return factor * own_losses.dpo_by_hand(pairs, loss)

    three, four = (PreferenceLoss(kind=partial(thrice, factor=factor)) for factor in (3.0, 4.0))
    torch.testing.assert_close(losses_of(three), 3 * losses_of(one))
    torch.testing.assert_close(losses_of(four), 4 * losses_of(one))
    torch.testing.assert_close(losses_of(PreferenceLoss(kind=Times(5.0))), 5 * losses_of(one))
    torch.testing.assert_close(losses_of(PreferenceLoss(kind=Times(6.0).call)), 6 * losses_of(one))


class Times:
    """A callable object, and one with a method."""

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, pairs, loss):
        return self.factor * own_losses.dpo_by_hand(pairs, loss)

    def call(self, pairs, loss):
        return self(pairs, loss)


def test_the_same_function_keeps_its_name():
    function, times = scaled(1.5), Times(2.5)
    assert PreferenceLoss(kind=function).kind == PreferenceLoss(kind=function).kind
    assert PreferenceLoss(kind=times.call).kind == PreferenceLoss(kind=times.call).kind


def test_a_notebooks_cell_that_runs_again_makes_the_same_loss():
    cell = "def my_loss(pairs, loss):\n    return -(pairs.beta * (pairs.chosen - pairs.rejected)).sigmoid().log()\n"
    space = {"__name__": "a_notebook"}
    names = []
    for source in (cell, cell, cell.replace("sigmoid", "tanh().exp")):
        exec(source, space)  # noqa: S102
        names.append(PreferenceLoss(kind=space["my_loss"]).kind)
    assert names == ["a_notebook:my_loss", "a_notebook:my_loss", "a_notebook:my_loss#2"]


def test_the_configuration_keeps_names_and_is_plain_data(tmp_path):
    config = DPOConfig(str(tmp_path), loss_type=[own_losses.dpo_by_hand, "ipo"], use_cpu=True, report_to="none")
    assert config.loss_type == [f"{MODULE}:dpo_by_hand", "ipo"]
    assert json.loads(config.to_json_string())["loss_type"] == config.loss_type
    assert pickle.loads(pickle.dumps(config)).preference_loss() == config.preference_loss()
    alone = DPOConfig(str(tmp_path), loss_type=own_losses.simpo_by_hand, use_cpu=True, report_to="none")
    assert not alone.preference_loss().needs_reference and alone.loss_type == [f"{MODULE}:simpo_by_hand"]


READ = """
import pickle, sys, torch
from dpofast import preference_loss
loss = pickle.loads(bytes.fromhex(sys.argv[1]))
try:
    logps = torch.tensor([-1.0, -2.0])
    print(preference_loss(logps, torch.tensor([[0, 1]]), torch.zeros(2), loss=loss).loss.item())
except ValueError as error:
    print(error)
"""


def in_another_process(loss):
    root = str(Path(__file__).resolve().parents[2])
    arguments = [sys.executable, "-c", READ, pickle.dumps(loss).hex()]
    ran = subprocess.run(arguments, capture_output=True, text=True, cwd=root)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


def test_another_process_imports_the_function_or_says_that_it_cannot():
    loss = PreferenceLoss(kind=own_losses.dpo_by_hand)
    here = preference_loss(torch.tensor([-1.0, -2.0]), torch.tensor([[0, 1]]), torch.zeros(2), loss=loss).loss
    assert float(in_another_process(loss)) == here.item()
    local = in_another_process(PreferenceLoss(kind=scaled(1.0)))
    assert local.startswith(f"kind: '{__name__}:scaled.<locals>.<lambda>") and "known only to the process" in local


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:loss", "'no_such_module:loss': there is no module 'no_such_module' where Python looks"),
        (f"{MODULE}.more:loss", f"there is no module '{MODULE}.more'"),
        (f"{MODULE}:dpo_by_hant", f"a function 'dpo_by_hant' in '{MODULE}', .*none .*; did you mean dpo_by_hand?"),
        (f"{MODULE}:not_a_function", "which has no function by it"),
        ("tests:", "kind: expected module:function, got 'tests:'"),
        (":loss", "kind: expected module:function, got ':loss'"),
        ("tests.losses:a.<locals>.b", "is known only to the process that made it: define it at the top level"),
    ],
)
def test_a_function_that_cannot_be_imported(name, message):
    with pytest.raises(ValueError, match=message):
        PreferenceLoss(kind=name)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("import no_such_package", "its module cannot be imported: No module named 'no_such_package'"),
        ("1 / 0", "its module cannot be imported: ZeroDivisionError: division by zero"),
        ("import sys; sys.exit(3)", "its module cannot be imported: SystemExit: 3"),
    ],
)
def test_a_module_that_cannot_be_imported(tmp_path, monkeypatch, body, message):
    name = f"broken_{len(body)}"
    (tmp_path / f"{name}.py").write_text(body)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=message):
        PreferenceLoss(kind=f"{name}:loss")
