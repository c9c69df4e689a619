"""share: what sequences of a step compute once changes the work and no result, in training and evaluation."""

import pickle

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from dpofast import DPOConfig, pack
from dpofast.training.sampler import first_examples
from tests.support.tiny import tiny_dataset, tiny_dialogues, tiny_model
from tests.support.tiny_training import losses_of, make_trainer, weights_of

SGD = {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0}
LORA = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
CASES = {
    "plain": {},
    "one micro-batch": {"max_tokens": 10_000},
    "live reference": {"precompute_ref_log_probs": False},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "lora": {"peft_config": LORA},
    "lora, gradient checkpointing": {"peft_config": LORA, "gradient_checkpointing": True},
    "ld": {"ld_alpha": 0.3},
    "coupled": {"loss_type": "aot"},
    "balancing": {"family": "mixtral", "router_aux_loss_coef": 1.0},
    "balancing, coupled": {"family": "mixtral", "router_aux_loss_coef": 1.0, "loss_type": "aot"},
}


def dialogues(count):
    """Dialogues, some of which have a prompt, and then a response, in common."""
    rows = tiny_dialogues(count - 2)
    same, other = rows[0], rows[1]
    rows += [{**same, "rejected_ids": [5, 6]}, {**other, "chosen_ids": other["rejected_ids"], "rejected_ids": [7]}]
    return Dataset.from_list(rows)


def trained(output_dir, *, family="llama", **options):
    """Losses, weights, evaluation and computed positions of three steps of eight pairs."""
    torch.manual_seed(0)
    trainer = make_trainer(
        output_dir,
        model=tiny_model(family),
        train=dialogues(24),
        evaluation=dialogues(10),
        **{
            "max_tokens": 150,
            "per_device_train_batch_size": 8,
            "include_num_input_tokens_seen": "all",
            **SGD,
            **options,
        },
    )
    trainer.train()
    assert len(losses_of(trainer)) == 3
    return losses_of(trainer), weights_of(trainer), trainer.evaluate(), trainer.state.num_input_tokens_seen


@pytest.mark.slow(40)
@pytest.mark.parametrize("case", CASES)
def test_three_steps_are_the_same_whatever_is_shared(tmp_path, case):
    options = CASES[case]
    ways = [{"share": "prefix"}, {"share": "prompt"}, {"share": "none"}]
    if "family" not in options:  # the balancing loss is of packed rows only
        ways.append({"padded": True})
    (losses, weights, metrics, positions), *others = (trained(tmp_path / str(way), **options, **way) for way in ways)
    for other_losses, other_weights, other_metrics, _ in others:
        assert other_losses == pytest.approx(losses, abs=1e-5)
        torch.testing.assert_close(other_weights, weights, atol=1e-5, rtol=1e-5)
        for name in ("eval_loss", "eval_rewards/margins", "eval_logps/rejected"):
            assert other_metrics[name] == pytest.approx(metrics[name], abs=1e-4)
    of_prompts, of_none = others[0][3], others[1][3]
    assert positions < 0.8 * of_prompts and of_prompts < 0.8 * of_none


@pytest.mark.parametrize(
    ("given", "share"),
    [
        ({}, "prefix"),
        ({"share": "prompt"}, "prompt"),
        ({"share_prompts": True}, "prompt"),
        ({"share_prompts": False}, "none"),
        ({"share": "none", "share_prompts": False}, "none"),
    ],
)
def test_share_prompts_is_an_alias(tmp_path, given, share):
    args = DPOConfig(output_dir=str(tmp_path), use_cpu=True, **given)
    assert args.share == share
    options = {name: getattr(args, name) for name in ("share", "share_prompts")}
    assert DPOConfig(output_dir=str(tmp_path), use_cpu=True, **options).share == share


def test_pickled_arguments_of_before_share_was_an_option_still_work(tmp_path):
    args = DPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", share_prompts=False)
    del args.share
    trainer = make_trainer(tmp_path, train=tiny_dataset(4))
    old = type(trainer)(tiny_model(), args=pickle.loads(pickle.dumps(args)), train_dataset=tiny_dataset(4))
    assert (trainer.share, old.share) == ("prefix", "none")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"share": "all"}, "share: expected prefix, prompt or none, got 'all'"),
        ({"share": "prefix", "share_prompts": False}, "share_prompts: False means share='none', got share='prefix'"),
        ({"share": "none", "share_prompts": True}, "share_prompts: True means share='prompt', got share='none'"),
    ],
)
def test_contradictions_are_refused(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        DPOConfig(output_dir=str(tmp_path), use_cpu=True, **given)


@pytest.mark.parametrize(
    ("options", "positions"), [({}, 3 + 4 + 1), ({"share": "prompt"}, 3 + 4 + 5), ({"share": "none"}, 2 * 3 + 4 + 5)]
)
def test_the_warning_of_a_long_pair_counts_what_it_shares(tmp_path, recwarn, options, positions):
    """Responses 4 5 6 7 8 and 4 5 6 7 9 10 after a prompt of three tokens; their last tokens have no position."""
    long = {"prompt_ids": [3, 3, 3], "chosen_ids": [4, 5, 6, 7, 8], "rejected_ids": [4, 5, 6, 7, 9, 10]}
    data = Dataset.from_list([{**long, "prompt_ids": [3]}, long])
    make_trainer(tmp_path, train=data, max_tokens=positions, **options)
    assert not [str(each.message) for each in recwarn if "max_tokens" in str(each.message)]
    with pytest.warns(
        UserWarning, match=f"max_tokens: {positions - 1} is less than the {positions} positions of a long"
    ):
        make_trainer(tmp_path, train=data, max_tokens=positions - 1, **options)


def test_padded_rows_share_nothing(tmp_path):
    trainer = make_trainer(tmp_path, train=tiny_dataset(4), padded=True)
    assert trainer.share == trainer.args.share == "none"


@pytest.mark.parametrize("given", [{"share": "prefix"}, {"share": "prompt"}, {"share_prompts": True}])
def test_padded_rows_that_are_to_share_something_are_refused(tmp_path, given):
    with pytest.raises(ValueError, match="share: padded rows share nothing, got '.*' with padded=True: leave one out"):
        make_trainer(tmp_path, train=tiny_dataset(4), padded=True, **given)
    assert make_trainer(tmp_path, train=tiny_dataset(4), padded=True, share="none").share == "none"


@pytest.mark.parametrize("share", ["prefix", "prompt", "none"])
def test_the_first_examples_fill_the_positions_asked_for_and_no_more_than_needed(share):
    dataset = dialogues(200)

    def packed(examples):
        (batch,) = pack([{name: row[name] for name in dataset.column_names} for row in examples], share=share)
        return batch.num_tokens

    for positions in (1, 100, 1000):
        examples = first_examples(dataset, positions, share)
        assert packed(examples) >= positions
        assert examples.num_pairs == len(examples)
        assert len(examples) == 1 or packed(examples[: -1 - len(examples) // 10]) < positions
    assert len(first_examples(dataset, 10**9, share)) == 200
