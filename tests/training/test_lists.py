"""DPOTrainer on lists of responses and on pairs with columns: plain loops, cuts of a step, resuming, refusals."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset

from dpofast import DPOConfig, DPOTrainer, tokenize_preferences
from dpofast.losses.config import PreferenceLoss
from dpofast.training.checks.columns import check_column_names, check_column_values
from dpofast.training.sampler import PairLengths, StepDataset, StepSampler, first_examples
from tests.support.tiny_lists import (
    plackett_luce,
    plain_logps,
    plain_rows,
    plain_training,
    tiny_columns,
    tiny_list_dataset,
    tiny_lists,
    weighted_sigmoid,
)
from tests.support.tiny_training import losses_of, make_trainer, weights_of

pytestmark = pytest.mark.slow(60)

# Plain SGD: Adam divides a gradient that is all rounding by its own size.
SGD = {"optim": "sgd", "learning_rate": 0.1}
COLUMNS = ("weight", "margin", "beta", "label_smoothing", "token_weights")
CASES = {
    "plackett_luce": (lambda: tiny_list_dataset(10), {"loss_type": "plackett_luce"}, plackett_luce),
    "weighted tokens": (lambda: tiny_list_dataset(10, weights=True), {"loss_type": "plackett_luce"}, plackett_luce),
    "columns": (lambda: tiny_columns(10, 0, *COLUMNS), {}, weighted_sigmoid),
    **{name: (lambda name=name: tiny_columns(10, 0, name), {}, weighted_sigmoid) for name in COLUMNS},
}


def trained(folder, dataset, **options):
    trainer = make_trainer(folder, train=dataset, **{**SGD, **options})
    trainer.train()
    return trainer


@pytest.mark.parametrize("case", CASES)
def test_the_step_equals_a_plain_padded_loop(tmp_path, case):
    make, options, loss_of = CASES[case]
    expected_losses, expected_weights = plain_training(make(), 4, loss_of)
    order = {"train_sampling_strategy": "sequential", "lr_scheduler_type": "constant"}
    trainer = trained(tmp_path, make(), **order, **options)
    assert losses_of(trainer) == pytest.approx(expected_losses, abs=1e-5)
    torch.testing.assert_close(weights_of(trainer), expected_weights, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "loss"),
    [
        (lambda: tiny_list_dataset(12, weights=True), {"loss_type": ["plackett_luce", "sigmoid", "sft"]}),
        (lambda: tiny_list_dataset(12), {"loss_type": "infonca"}),
        (lambda: tiny_columns(12, 0, *COLUMNS), {"rpo_alpha": 0.5}),
        (lambda: tiny_columns(12, 0, "weight", "beta", "token_weights"), {"loss_type": "aot"}),
    ],
    ids=["mix", "infonca", "columns", "aot"],
)
def test_results_do_not_depend_on_how_the_step_is_cut(tmp_path, make, loss):
    expected = trained(tmp_path, make(), max_tokens=100_000, **loss)
    for options in (
        {"max_tokens": 1},
        {"max_tokens": 40, "token_statistics": True},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "share": "none"},
        {"precompute_ref_log_probs": False, "max_tokens": 40},
    ):
        trainer = trained(tmp_path, make(), **options, **loss)
        assert losses_of(trainer) == pytest.approx(losses_of(expected), abs=1e-5), options
        torch.testing.assert_close(weights_of(trainer), weights_of(expected), atol=1e-5, rtol=1e-5, msg=str(options))


def test_weights_of_1_and_margins_of_0_change_no_bit(tmp_path):
    plain = tiny_columns(8)
    rows = [
        {
            **row,
            **{"weight": 1.0, "margin": 0.0, "beta": 0.1, "label_smoothing": 0.0},
            "chosen_weights": [1.0] * len(row["chosen_ids"]),
            "rejected_weights": [1.0] * len(row["rejected_ids"]),
        }
        for row in plain
    ]
    one, other = trained(tmp_path, plain), trained(tmp_path, Dataset.from_list(rows))
    assert set(COLUMNS[:4]) < set(other.train_dataset.column_names)
    assert losses_of(one) == losses_of(other) and torch.equal(weights_of(one), weights_of(other))


def test_a_weight_of_0_leaves_the_row_out_and_the_divisor_as_it_is(tmp_path):
    rows = tiny_columns(4).to_list()
    options = {"max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    weights = Dataset.from_list([{**row, "weight": float(number < 3)} for number, row in enumerate(rows)])
    ours = trained(tmp_path, weights, **options)
    three = trained(tmp_path, Dataset.from_list(rows[:3]), learning_rate=0.1 * 3 / 4, **{**options, "optim": "sgd"})
    torch.testing.assert_close(weights_of(ours), weights_of(three), atol=1e-6, rtol=1e-6)
    assert losses_of(ours) == pytest.approx([3 / 4 * losses_of(three)[0]], abs=1e-6)


def test_sft_divides_by_the_weights_of_the_steps_chosen_tokens(tmp_path):
    dataset = tiny_columns(4, 0, "token_weights")
    trainer = trained(tmp_path, dataset, loss_type="sft", max_tokens=1)
    total = float(sum(np.sum(row["chosen_weights"]) for row in dataset))
    model = make_trainer(tmp_path, train=dataset, loss_type="sft").model
    with torch.no_grad():
        logps = sum(float(plain_logps(model, row)[0]) for row in plain_rows(dataset))
    assert losses_of(trainer) == pytest.approx([-logps / total], abs=1e-5)


@pytest.mark.parametrize("lists", [True, False])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, lists):
    dataset = tiny_list_dataset(12, weights=True) if lists else tiny_columns(12, 0, *COLUMNS)
    evaluation = tiny_list_dataset(5, seed=3) if lists else None
    options = {"loss_type": "plackett_luce"} if lists else {}
    options |= {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 2, "max_tokens": 40}
    whole = make_trainer(tmp_path, train=dataset, evaluation=evaluation, **options)
    whole.train()
    resumed = make_trainer(tmp_path, train=dataset, evaluation=evaluation, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses_of(resumed) == losses_of(whole) and torch.equal(weights_of(resumed), weights_of(whole))

    column = "scores" if lists else "weight"
    rows = dataset.to_list()
    rows[3][column] = [number + 0.5 for number in rows[3][column]] if lists else 1.5
    others = [Dataset.from_list(rows)]
    if not lists:
        others.append(dataset.rename_column("margin", "something"))
    for other in others:
        changed = make_trainer(tmp_path, train=other, evaluation=evaluation, **options)
        with pytest.raises(
            ValueError, match="resume_from_checkpoint: .* was written by another run: .*(train_dataset|columns)"
        ):
            changed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_an_evaluation_of_lists(tmp_path):
    evaluation = tiny_list_dataset(9, seed=3)
    trainer = make_trainer(
        tmp_path, train=tiny_list_dataset(12), evaluation=evaluation, loss_type="plackett_luce", num_train_epochs=4,
        eval_strategy="epoch", metric_for_best_model="rewards/kendall_tau",
    )  # fmt: skip
    trainer.train()
    found = {}
    for most in (1, 10_000):
        trainer.max_forward_tokens = most
        found[most] = trainer.evaluate()
    for name in found[1]:
        if "second" not in name and "runtime" not in name:
            assert found[1][name] == pytest.approx(found[10_000][name], abs=1e-5)
    for name in ("kendall_tau", "ndcg", "best_of_k", "accuracies"):
        assert f"eval_rewards/{name}" in found[1]
    table = trainer.pair_records["eval"].table()
    assert table.lists.responses.tolist() and len(table) == 9
    assert found[1]["eval_rewards/kendall_tau"] == pytest.approx(np.nanmean(table.lists.kendall_tau))
    assert trainer.pair_records["eval"].rewards().shape == (9, 2)  # what predict() returns


@pytest.mark.parametrize("list_pairs", ["all", "best_worst", "adjacent"])
def test_lists_become_pairs_for_a_loss_of_pairs(tmp_path, list_pairs):
    trainer = trained(tmp_path, tiny_list_dataset(6), list_pairs=list_pairs)
    assert "chosen_ids" in trainer.train_dataset.column_names and len(losses_of(trainer)) >= 2
    assert len(trainer.train_dataset) >= 6


def test_streamed_lists_train_alike(tmp_path):
    rows = tiny_lists(12, weights=True)
    options = {"loss_type": "plackett_luce", "max_steps": 3, "precompute_ref_log_probs": False}
    stored = trained(tmp_path, Dataset.from_list(rows), train_sampling_strategy="sequential", **options)
    streamed = trained(tmp_path, IterableDataset.from_generator(lambda: iter(rows)), **options)
    assert losses_of(streamed) == pytest.approx(losses_of(stored), abs=1e-6)


def test_lengths_of_lists_and_weights():
    rows = [
        {"prompt_ids": [1, 2], "responses_ids": [[3, 4, 5], [6], [7, 8]], "ranks": [0, 1, 2], "row": 0},
        {"prompt_ids": [1, 2], "responses_ids": [[3], [6, 9]], "ranks": [0, 1], "row": 1},
    ]
    lengths = PairLengths.of(Dataset.from_list(rows))
    assert lengths.positions.tolist() == [2 + 2 + 0 + 1, 2 + 0 + 1] and lengths.responses.tolist() == [3, 2]
    assert lengths.chosen.tolist() == [3, 1] and lengths.prompt_keys[0] == lengths.prompt_keys[1]
    weighted = [
        {**row, "responses_weights": weights}
        for row, weights in zip(rows, ([[0.5, 1, 0], [1], [1, 1]], None), strict=True)
    ]
    dataset = Dataset.from_list(weighted)
    lengths = PairLengths.of(dataset)
    assert lengths.chosen.tolist() == [1.5, 1.0]
    alone, shared = (StepDataset(dataset, each) for each in (None, lengths))
    (share,) = StepSampler(2, 2, strategy="sequential")
    for steps in (alone, shared):
        step = steps.__getitems__(share)
        assert step.num_chosen_tokens == 2.5 and step.num_pairs == 2
        assert [len(example["chosen_ids"]) for example in step] == [3, 1]
        assert [example["rejected_ids"].tolist() for example in step] == [[7, 8], [6, 9]]
    examples = first_examples(tokens_of(tiny_list_dataset(40)), 100, "prefix")
    assert 2 < len(examples) < 40


def tokens_of(dataset):
    return tokenize_preferences(dataset, None)[0]


def test_lists_for_a_loss_of_pairs_are_refused_before_anything_is_loaded(tmp_path):
    args = DPOConfig(output_dir=str(tmp_path / "out"), use_cpu=True, report_to="none")
    with pytest.raises(
        ValueError, match="train_dataset: lists of responses: .*'sigmoid' is a loss of pairs.*list_pairs.*plackett_luce"
    ):
        DPOTrainer("no/such/model", args=args, train_dataset=tiny_list_dataset(4))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="eval_dataset held: lists of responses"):
        DPOTrainer(
            "no/such/model", args=args, train_dataset=tiny_columns(4), eval_dataset={"held": tiny_list_dataset(4)}
        )


@pytest.mark.parametrize(
    ("columns", "loss", "message"),
    [
        (
            ["margin"],
            {"kind": "ipo"},
            r"data: column 'margin': margin: kind 'ipo' does not take it.*remove or rename the column \('margin'\)",
        ),
        (["label_smoothing"], {"kind": "hinge"}, "column 'label_smoothing': .*'hinge' does not take it"),
        (
            ["chosen_weights", "rejected_weights"],
            {"ld_alpha": 0.5},
            "column 'chosen_weights': token_weights: .*ld_alpha",
        ),
    ],
)
def test_columns_that_a_loss_does_not_take_are_refused(columns, loss, message):
    with pytest.raises(ValueError, match=message):
        check_column_names(["prompt_ids", "chosen_ids", "rejected_ids", *columns], PreferenceLoss(**loss), "data")


def test_lists_without_the_scores_that_a_loss_needs_are_refused():
    columns = ["prompt", "responses", "ranks"]
    with pytest.raises(ValueError, match="data: lists of responses: scores: kind 'infonca' needs the scores"):
        check_column_names(columns, PreferenceLoss(kind="infonca"), "data")
    check_column_names([*columns, "scores"], PreferenceLoss(kind="infonca"), "data")
    check_column_names(columns, PreferenceLoss(), "data", list_pairs="all")


def test_pairs_for_a_loss_that_needs_scores_are_refused_before_the_model_is_read(tmp_path):
    plain = {"output_dir": str(tmp_path / "out"), "use_cpu": True, "report_to": "none"}
    loss = {"loss_type": "tests.support.own_losses:gap_by_hand"}
    message = "train_dataset: scores: kind 'tests.support.own_losses:gap_by_hand' needs scores, and the rows are pairs"
    with pytest.raises(ValueError, match=message):
        DPOTrainer("no/such/model", args=DPOConfig(**loss, **plain), train_dataset=tiny_columns(4))
    args = DPOConfig(list_pairs="all", **loss, **plain)
    with pytest.raises(ValueError, match="are pairs.*which list_pairs='all' makes of lists"):
        DPOTrainer("no/such/model", args=args, train_dataset=tiny_list_dataset(4))
    check_column_names(["prompt", "chosen", "rejected"], PreferenceLoss(kind="infonca"), "data")


def test_values_that_a_loss_does_not_take_are_refused_with_their_row(tmp_path):
    rows = tiny_columns(5, 0, "label_smoothing").to_list()
    rows[3]["label_smoothing"] = 0.5
    tokens = tokens_of(Dataset.from_list(rows))
    check_column_values(tokens, PreferenceLoss(), "data")
    with pytest.raises(
        ValueError,
        match=r"data, row 3 .*label_smoothing: expected a number in \[0, 0.5\) for loss_type 'robust', got 0.5",
    ):
        check_column_values(tokens, PreferenceLoss(kind="robust", label_smoothing=0.1), "data")
    graded = tiny_lists(3)
    graded[2] = {"prompt_ids": [1], "responses_ids": [[5, 6], [5, 7], [5, 8]], "scores": [-1e6, 100.0, 90.0]}
    with pytest.raises(
        ValueError, match=r"row 2 .*scores: lipo_lambda's gains .* got 100/1; raise --score_temperature"
    ):
        make_trainer(tmp_path, train=Dataset.from_list(graded), loss_type="lipo_lambda")
    make_trainer(tmp_path, train=Dataset.from_list(graded), loss_type="lipo_lambda", score_temperature=100.0)
    tied = tiny_lists(3)
    tied[1] = {"prompt_ids": [1], "responses_ids": [[5, k] for k in range(10)], "scores": [1.0] * 9 + [0.0]}
    with pytest.raises(ValueError, match=r"row 1 .*plackett_luce takes up to 8 tied responses, got 9"):
        make_trainer(tmp_path, train=Dataset.from_list(tied), loss_type="plackett_luce")


def test_a_long_list_is_warned_of(tmp_path):
    with pytest.warns(
        UserWarning, match="max_tokens: 3 is less than the .* positions of a long list: such a list runs alone"
    ):
        make_trainer(tmp_path, train=tiny_list_dataset(4), loss_type="plackett_luce", max_tokens=3)


def test_the_model_card_names_lists(tmp_path):
    trainer = trained(tmp_path, tiny_list_dataset(4), loss_type="plackett_luce")
    trainer.save_model(str(tmp_path / "end"))
    text = (tmp_path / "end" / "README.md").read_text()
    assert "4 lists of" in text and "of 4 lists" in text and json.dumps("plackett_luce").strip('"') in text


@pytest.mark.parametrize("kind", ["pairs", "lists", "list_pairs"])
@pytest.mark.parametrize("null_first", [True, False])
@pytest.mark.parametrize("share", [[0, 1], [1, 0], [0], [1]])
def test_weights_that_are_null_in_one_row_are_read_as_they_are_stored(kind, null_first, share):
    row = {"prompt_ids": [10, 11]}
    if kind == "pairs":
        row |= {"chosen_ids": [20, 21, 1], "rejected_ids": [30, 1]}
        given = {"chosen_weights": [1.0, 0.0, 1.0], "rejected_weights": None}
    else:
        row |= {"responses_ids": [[20, 21, 1], [30, 1]], "ranks": [1, 2]}
        given = {"responses_weights": [[1.0, 0.0, 1.0], [0.5, 1.0]]}
    rows = [row | dict.fromkeys(given), row | given]
    rows = rows if null_first else rows[::-1]
    options = {"list_pairs": "all"} if kind == "list_pairs" else {}
    dataset, _ = tokenize_preferences(Dataset.from_list(rows), None, **options)
    (step_of_all,) = StepSampler(2, 2, strategy="sequential")
    step_of_all[:] = share
    step = StepDataset(dataset).__getitems__(step_of_all)
    names = [name for name in dataset.column_names if name.endswith("_weights")]
    assert names
    for example, index in zip(step, share, strict=True):
        for name in names:
            stored, read = dataset[index][name], example[name]
            assert (read is None) == (stored is None)
            if stored is not None:
                assert read == stored


@pytest.mark.parametrize("null_first", [True, False])
@pytest.mark.parametrize("stream", [False, True])
def test_training_takes_weights_that_are_null_in_one_row(tmp_path, null_first, stream):
    row = {"prompt_ids": [10, 11], "chosen_ids": [20, 21, 1], "rejected_ids": [30, 1]}
    rows = [row | {"chosen_weights": given, "rejected_weights": None} for given in (None, [1.0, 0.0, 1.0])]
    rows = rows if null_first else rows[::-1]
    ones = [
        row | {"chosen_weights": each["chosen_weights"] or [1.0] * 3, "rejected_weights": [1.0] * 2} for each in rows
    ]
    both = []
    for name, these in (("null", rows), ("ones", ones)):
        data = Dataset.from_list(these)
        data = IterableDataset.from_generator(data.__iter__, features=data.features) if stream else data
        options = {"per_device_train_batch_size": 2, "max_steps": 2, "train_sampling_strategy": "sequential"}
        both.append(weights_of(trained(tmp_path / name, data, **options)))
    torch.testing.assert_close(*both, rtol=0, atol=0)
