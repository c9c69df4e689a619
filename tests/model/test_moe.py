"""The load-balancing loss of a mixture of experts over packed rows: against transformers' own over padded rows."""

import pytest
import torch
import transformers
from datasets import Dataset
from hypothesis import given
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from dpofast import attach_logprob_head, pack
from dpofast.model.moe import balancing_coefficient, balancing_loss, row_weights
from tests.support.deep_examples import tries
from tests.support.families import family_model
from tests.support.histories import histories
from tests.support.ranks_cases import RunsOutOfMemory
from tests.support.tiny import tiny_dataset, tiny_model, tiny_pairs
from tests.support.tiny_training import losses_of, make_trainer, weights_of

SGD = {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0}


def shared_pairs():
    examples = tiny_pairs(6)
    for example in examples[1:3]:
        example["prompt_ids"] = examples[0]["prompt_ids"]
    examples[2]["chosen_ids"] = examples[0]["chosen_ids"]  # one branch of two pairs
    # forks late, and goes on a whole pair's sequence
    late = {**examples[3], "chosen_ids": [*examples[3]["rejected_ids"], 5], "rejected_ids": examples[3]["rejected_ids"]}
    later = {**examples[4], "prompt_ids": [*examples[5]["prompt_ids"], *examples[5]["chosen_ids"]]}
    return [*examples, late, later]


def padded_rows(examples):
    """Every pair's two rows without their last token, and which of their positions are real."""
    rows = [torch.tensor((e["prompt_ids"] + e[side])[:-1]) for e in examples for side in ("chosen_ids", "rejected_ids")]
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return input_ids, (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe", "qwen3-next", "qwen3.5-moe", "granite-hybrid"])
def test_it_equals_transformers_over_padded_rows(family):
    examples = shared_pairs()
    model = attach_logprob_head(family_model(family))
    (batch,) = pack(examples)
    packed = model(packed=batch, balance=True)
    packed.aux_loss.backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    input_ids, mask = padded_rows(examples)
    padded = model(input_ids=input_ids, attention_mask=mask, output_router_logits=True)
    torch.testing.assert_close(packed.aux_loss, padded.aux_loss, atol=1e-5, rtol=1e-5)
    padded.aux_loss.backward()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, dict(model.named_parameters())[name].grad, atol=1e-6, rtol=1e-4, msg=name)


def test_rows_count_as_often_as_a_padded_batch_holds_them():
    examples = shared_pairs()
    (batch,) = pack(examples)
    weights = row_weights(batch)
    assert weights.sum() == sum(
        2 * len(e["prompt_ids"]) + len(e["chosen_ids"]) + len(e["rejected_ids"]) - 2 for e in examples
    )
    prompt = len(examples[0]["prompt_ids"])
    assert weights[:prompt].tolist() == [6.0] * prompt


@given(tries())
def test_a_row_counts_once_for_each_use_of_a_sequence_whose_path_it_is_on(examples):
    (batch,) = pack(examples)
    expected, paths = [0.0] * batch.num_tokens, histories(batch.segments)
    for sequence in batch.pairs.flatten().tolist():
        for row in paths[batch.logit_rows[batch.cu_targets[sequence + 1] - 1]]:
            expected[row] += 1
    assert row_weights(batch).tolist() == expected


def test_the_formula():
    logits = tuple(torch.randn(11, 4) for _ in range(3))
    expected = load_balancing_loss_func(logits, 4, 2)
    torch.testing.assert_close(balancing_loss(logits, 2, torch.ones(11)), expected)
    even = (torch.zeros(8, 4),)
    assert balancing_loss(even, 4, torch.ones(8)).item() == pytest.approx(4.0)


@pytest.mark.parametrize("options", [{}, {"token_statistics": True}, {"loss_type": "aot"}], ids=str)
def test_the_trainer_adds_it(tmp_path, options):
    runs = {}
    for coefficient in (0.0, None, 0.5):
        model = family_model("mixtral")
        trainer = make_trainer(tmp_path, model=model, router_aux_loss_coef=coefficient, **SGD, **options)
        trainer.train()
        runs[coefficient] = trainer
    own = family_model("mixtral").config.router_aux_loss_coef
    assert 0 < own < 0.5
    assert "aux_loss" not in runs[0.0].state.log_history[0] and runs[0.5].state.log_history[0]["aux_loss"] > 0
    # one step moves the weights by the gradient, which is linear in the coefficient
    moved = [(weights_of(runs[c]) - weights_of(runs[0.0])).norm() for c in (None, 0.5)]
    assert 0 < moved[0] < moved[1]
    # the logged loss includes it, in training and in evaluation, as TRL's does
    first = runs[0.5].state.log_history[0]
    assert first["loss"] == pytest.approx(losses_of(runs[0.0])[0] + 0.5 * first["aux_loss"], abs=1e-5)
    without, with_it = (
        make_trainer(
            tmp_path,
            model=family_model("mixtral"),
            router_aux_loss_coef=coefficient,
            evaluation=tiny_dataset(5),
            **options,
        ).evaluate()
        for coefficient in (0.0, 0.5)
    )
    assert with_it["eval_loss"] == pytest.approx(without["eval_loss"] + 0.5 * with_it["eval_aux_loss"], abs=1e-5)


def uneven_experts():
    """A Mixtral whose router prefers some experts, so that each micro-batch has shares of its own."""
    return tiny_model("mixtral", num_hidden_layers=2, initializer_range=0.3)


def restated(examples, coefficient):
    """The step's loss, its balancing loss and gradients by name, in float64: a plain forward of each row alone."""
    model = uneven_experts().double()
    model.set_experts_implementation("eager")  # the grouped GEMM takes no float64
    routed, margins = [], []
    for example in examples:
        logps = []
        for side in ("chosen_ids", "rejected_ids"):
            ids = torch.tensor(example["prompt_ids"] + example[side])
            output = model(input_ids=ids[None, :-1], output_router_logits=True)
            predicted = output.logits[0, len(example["prompt_ids"]) - 1 :].log_softmax(-1)
            logps.append(predicted.gather(-1, torch.tensor(example[side])[:, None]).sum())
            routed.append(torch.cat(output.router_logits).softmax(-1))
        margins.append(logps[0] - logps[1])
    margins, routed = torch.stack(margins), torch.cat(routed)
    chosen = torch.zeros_like(routed).scatter(-1, routed.topk(2).indices, 1.0)
    balancing = routed.shape[-1] * (chosen.mean(0) * routed.mean(0)).sum()
    # the policy is its own reference
    preference = -torch.nn.functional.logsigmoid(0.1 * (margins - margins.detach())).mean()
    loss = preference + coefficient * balancing
    loss.backward()
    return loss.item(), balancing.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def one_step(folder, examples, **options):
    """A step of SGD over all the examples; returns its log, the gradients, and the calls of the model that trained."""
    model, calls = uneven_experts(), []
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = make_trainer(
        folder,
        model=model,
        **{"train": Dataset.from_list(examples), "per_device_train_batch_size": len(examples), "max_steps": 1},
        **{"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0},
        **{"router_aux_loss_coef": 2.0, **options},
    )

    def called(module, args, kwargs):
        if module.training:
            calls.append(kwargs)

    model.register_forward_pre_hook(called, with_kwargs=True)
    trainer.train()
    return (
        trainer.state.log_history[0],
        {name: before[name] - p.detach() for name, p in model.named_parameters()},
        calls,
    )


@pytest.mark.parametrize(
    "options",
    [
        *({"max_tokens": most} for most in (1, 40, 4096)),
        {"max_tokens": 40, "precompute_ref_log_probs": False, "gradient_checkpointing": True},
        {"max_tokens": 40, "token_statistics": True},
    ],
    ids=str,
)
def test_it_is_that_of_the_whole_step_however_it_is_split(tmp_path, options):
    examples = shared_pairs()
    loss, balancing, expected = restated(examples, 2.0)
    log, gradients, calls = one_step(tmp_path, examples, **options)
    assert log["aux_loss"] == pytest.approx(balancing, abs=1e-5) and log["loss"] == pytest.approx(loss, abs=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name].double(), gradient, atol=1e-5, rtol=1e-5, msg=name)
    assert (len(calls) == 1) == (options["max_tokens"] == 4096)


def test_micro_batches_alone_would_give_another_loss():
    """What the test above tells apart."""
    examples = shared_pairs()
    model = attach_logprob_head(uneven_experts())
    parts = pack(examples, max_tokens=40)
    alone = [(model(packed=batch, balance=True).aux_loss.item(), batch.num_pairs) for batch in parts]
    mean = sum(value * pairs for value, pairs in alone) / len(examples)
    assert len(parts) > 1 and abs(mean - restated(examples, 2.0)[1]) > 0.01


def test_a_step_of_one_micro_batch_runs_once_and_computes_what_the_batch_alone_does(tmp_path):
    examples = shared_pairs()
    _, gradients, calls = one_step(tmp_path, examples, max_tokens=4096)
    assert len(calls) == 1 and calls[0]["balance"] is True
    model = attach_logprob_head(uneven_experts())
    alone = model(**calls[0])
    (alone.loss + 2.0 * alone.aux_loss).backward()
    for name, weight in model.named_parameters():
        before = weight.detach()
        assert torch.equal(gradients[name], before - (before - weight.grad)), name  # to the last bit
    _, _, calls = one_step(tmp_path, examples, max_tokens=40)
    counted = [call for call in calls if "count_routing" in call]
    assert calls[: len(counted)] == counted and len(calls) == 2 * len(counted) > 2  # before the first gradient
    _, _, calls = one_step(tmp_path, examples, max_tokens=40, router_aux_loss_coef=0.0)
    assert len(calls) == len(counted)


@pytest.mark.parametrize("loss_type", ["sigmoid", "aot"])
def test_evaluation_is_as_exact(tmp_path, loss_type):
    examples = shared_pairs()
    loss, balancing, _ = restated(examples, 2.0)
    found = [
        make_trainer(
            tmp_path,
            model=uneven_experts(),
            evaluation=Dataset.from_list(examples),
            **{"router_aux_loss_coef": 2.0, "loss_type": loss_type, "max_tokens": most},
        ).evaluate()
        for most in (1, 40, 4096)
    ]
    for metrics in found:
        assert metrics["eval_aux_loss"] == pytest.approx(balancing, abs=1e-5)
        assert metrics["eval_loss"] == pytest.approx(loss, abs=1e-5)


def test_a_count_that_runs_out_of_memory_is_done_again_in_smaller_parts(tmp_path):
    runs = []
    for most in (None, 30):
        model = uneven_experts()
        if most is not None:
            RunsOutOfMemory(model, most=most, rank=0)
        runs.append(make_trainer(tmp_path, model=model, max_tokens=40, router_aux_loss_coef=2.0, **SGD))
        runs[-1].train()
    assert runs[0].max_tokens == 40 and runs[1].max_tokens <= 30
    assert losses_of(runs[1]) == pytest.approx(losses_of(runs[0]), abs=1e-5)
    torch.testing.assert_close(weights_of(runs[1]), weights_of(runs[0]), atol=1e-5, rtol=1e-5)


def test_addends_add_up_where_a_prompt_has_responses_in_several_batches():
    examples = shared_pairs()
    model = attach_logprob_head(uneven_experts())
    (whole,), parts = pack(examples), pack(examples, max_tokens=1)
    counts = model(packed=whole, count_routing=True)
    of_parts = [model(packed=batch, count_routing=True) for batch in parts]
    assert len(parts) > 1 and torch.equal(sum(part.chosen for part in of_parts), counts.chosen)
    assert sum(part.total for part in of_parts) == counts.total == counts.chosen.sum() / 2
    addends = sum(model(packed=batch, balance=counts).aux_loss for batch in parts)
    torch.testing.assert_close(addends, model(packed=whole, balance=True).aux_loss, atol=1e-6, rtol=1e-6)
    with pytest.raises(ValueError, match="count_routing: expected no stats, preference or balance beside it"):
        model(packed=whole, count_routing=True, balance=True)


def test_bad_coefficients(tmp_path):
    with pytest.raises(ValueError, match="router_aux_loss_coef: expected a mixture-of-experts model"):
        make_trainer(tmp_path, router_aux_loss_coef=0.1)
    with pytest.raises(ValueError, match="padded rows give no load-balancing loss; set it to 0"):
        make_trainer(tmp_path, model=family_model("mixtral"), padded=True)
    with pytest.raises(ValueError, match="balance: expected packed rows"):
        attach_logprob_head(tiny_model(), padded=True)(packed=pack(tiny_pairs(2))[0], balance=True)


def test_a_weight_without_experts_to_weigh_is_refused():
    dbrx = transformers.DbrxConfig()
    assert balancing_coefficient(dbrx, None) == balancing_coefficient(dbrx, 0.0) == 0.0
    with pytest.raises(
        ValueError, match="router_aux_loss_coef: expected a model whose config says.*dbrx does not: set it"
    ):
        balancing_coefficient(dbrx, 0.01)
    with pytest.raises(ValueError, match="expected a model with experts in some layer, got none: set it to 0"):
        balancing_loss((), 2, torch.ones(3))
