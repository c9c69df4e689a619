"""The load-balancing loss of a mixture of experts over packed rows: against transformers' own over padded rows."""

import pytest
import torch
import transformers
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from dpofast import attach_logprob_head, pack
from dpofast.model.moe import balancing_coefficient, balancing_loss, row_weights
from tests.support.families import family_model
from tests.support.tiny import tiny_dataset, tiny_model, tiny_pairs
from tests.support.tiny_training import losses_of, make_trainer, weights_of

SGD = {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0}


def shared_pairs():
    examples = tiny_pairs(6)
    for example in examples[1:3]:
        example["prompt_ids"] = examples[0]["prompt_ids"]
    examples[2]["chosen_ids"] = examples[0]["chosen_ids"]  # one branch of two pairs
    return examples


def padded_rows(examples):
    """Every pair's two rows without their last token, and which of their positions are real."""
    rows = [torch.tensor((e["prompt_ids"] + e[side])[:-1]) for e in examples for side in ("chosen_ids", "rejected_ids")]
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return input_ids, (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe"])
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
