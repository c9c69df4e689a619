"""Scores and cached reference log-probs of lists, and of responses whose tokens have weights."""

import copy

import numpy as np
import pytest
import torch
from datasets import Dataset

from dpofast import attach_logprob_head, reference, tokenize_preferences
from dpofast.losses.config import PreferenceLoss
from dpofast.packing.pack import pack
from dpofast.scoring import ref_cache
from dpofast.scoring.fingerprints import ResponseFingerprints
from dpofast.scoring.ref_cache import add_reference_columns, reference_logps
from dpofast.scoring.score import Forward, score_rows
from dpofast.scoring.score_table import score_table
from tests.support.thread_ranks import in_threads
from tests.support.tiny import tiny_dataset, tiny_model
from tests.support.tiny_lists import (
    plackett_luce,
    plain_logps,
    plain_rows,
    tiny_columns,
    tiny_lists,
    weighted_sigmoid,
)

pytestmark = pytest.mark.slow(10)

FORWARD = Forward(max_tokens=64, device=torch.device("cpu"))
OPTIONS = {"beta": 0.3, "max_tokens": 64, "share": "prefix", "max_logits_bytes": None, "device": torch.device("cpu")}


@pytest.fixture(scope="module")
def models():
    policy, ref = attach_logprob_head(tiny_model()), attach_logprob_head(tiny_model())
    with torch.no_grad():
        policy.lm_head.weight.mul_(1.5)
    return policy, ref


@pytest.fixture
def computed(monkeypatch):
    """The number of rows of every window that the model computes."""
    rows, plain = [], ref_cache.response_logps

    def counting(table, *args):
        rows.append(len(table))
        return plain(table, *args)

    monkeypatch.setattr(ref_cache, "response_logps", counting)
    return rows


def tokens_of(rows):
    return tokenize_preferences(Dataset.from_list(rows), None)[0]


def truth(model, rows):
    """(K,) of every row best first, over padded rows."""
    with torch.no_grad():
        return [plain_logps(model, row) for row in plain_rows(rows)]


def in_source_order(values, row):
    """Values of the responses, best first, in the order of the row."""
    order = np.argsort([-score for score in row["scores"]], kind="stable")
    return [float(values[place]) for place in np.argsort(order)]


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("form", ["mappings", "dataset", "tokens"])
def test_scores_stand_in_the_order_of_the_rows_responses(models, form, weights):
    rows = tiny_lists(9, seed=1, weights=weights)
    forms = {"mappings": list, "dataset": Dataset.from_list, "tokens": tokens_of}
    found = list(score_rows(forms[form](rows), *models, window=4, **OPTIONS))
    assert len(found) == 9
    for row, scores, own, ref in zip(rows, found, *(truth(model, rows) for model in models), strict=True):
        assert scores["responses_logps"] == pytest.approx(in_source_order(own, row), abs=5e-5)
        assert scores["ref_responses_logps"] == pytest.approx(in_source_order(ref, row), abs=5e-5)
        rewards = in_source_order(0.3 * (own - ref), row)
        assert scores["responses_rewards"] == pytest.approx(rewards, abs=5e-5)
        assert scores["responses_tokens"] == [len(ids) for ids in row["responses_ids"]]
        assert scores["margins"] == pytest.approx(float(0.3 * ((own - ref)[0] - (own - ref)[-1])), abs=5e-5)
        assert ("row" in scores) == (form == "tokens")


def test_rows_bring_their_own_reference_and_beta(models):
    rows = [{**row, "beta": 0.5 + number} for number, row in enumerate(tiny_lists(4, seed=2))]
    for row in rows:
        row["ref_responses_logps"] = [-1.0 - place for place in range(len(row["responses_ids"]))]
    for form in (rows, tokens_of(rows)):
        for row, scores in zip(rows, score_rows(form, models[0], **OPTIONS), strict=True):
            assert scores["ref_responses_logps"] == row["ref_responses_logps"]
            differences = np.subtract(scores["responses_logps"], row["ref_responses_logps"])
            assert scores["responses_rewards"] == pytest.approx(row["beta"] * differences, abs=1e-4)
    pairs = tiny_columns(5, 0, "beta", "token_weights")
    for row, scores, own in zip(pairs, score_rows(pairs, *models, **OPTIONS), truth(models[0], pairs), strict=True):
        assert [scores["chosen_logps"], scores["rejected_logps"]] == pytest.approx(own.tolist(), abs=5e-5)
        difference = scores["chosen_logps"] - scores["ref_chosen_logps"]
        assert scores["chosen_rewards"] == pytest.approx(row["beta"] * difference, abs=1e-5)


def test_lists_among_pairs_are_refused(models):
    rows = [*tiny_lists(1), {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}]
    with pytest.raises(ValueError, match="responses_ids: expected it in every row or in none"):
        list(score_rows(rows, models[0], **OPTIONS))
    with pytest.raises(ValueError, match="weights: expected 2 numbers, one a token of the response"):
        rows = [{"prompt_ids": [1], "chosen_ids": [2, 3], "rejected_ids": [3], "chosen_weights": [1.0]}]
        list(score_rows(rows, models[0], **OPTIONS))


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_weights_of_one_response_alone_hold(models, side):
    row = {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9, 10], "rejected_ids": [11, 12]}
    weights = [2.0, *[0.0] * (len(row[f"{side}_ids"]) - 1)]
    rows = [row | {f"{side}_weights": weights}, row | {f"{side}_weights": None}]
    with torch.no_grad():
        plain, first = (
            [
                float(reference.padded_logprobs(models[1], **reference.padded_rows([(row["prompt_ids"], ids)])).sum())
                for ids in each
            ]
            for each in ((row["chosen_ids"], row["rejected_ids"]), ([row[f"{side}_ids"][0]],))
        )
    weighted = [2 * first[0], plain[1]] if side == "chosen" else [plain[0], 2 * first[0]]
    dataset = Dataset.from_list(rows)
    cached = add_reference_columns(dataset, models[1], FORWARD, cache_dir=None).to_list()
    scored = [list(score_rows(form, models[1], **OPTIONS)) for form in (dataset, rows, list(dataset))]
    for found, name in [(cached, "ref_{}_logps"), *((each, "{}_logps") for each in scored)]:
        for own, expected in zip(found, (weighted, plain), strict=True):
            assert [own[name.format(each)] for each in ("chosen", "rejected")] == pytest.approx(expected, abs=5e-5)
    loss = PreferenceLoss(kind="simpo", beta=0.3)
    numbered = dataset.add_column("row", [0, 1])
    table = score_table(list(score_rows(numbered, models[1], **OPTIONS)), numbered, loss)
    counts = [[3, 2], [3, 2]]
    counts[0][side == "rejected"] = 2  # what the tokens count together
    for index, (own, count) in enumerate(zip((weighted, plain), counts, strict=True)):
        logit = 0.3 * (own[0] / count[0] - own[1] / count[1]) - loss.simpo_gamma
        assert table.losses[index] == pytest.approx(float(np.log1p(np.exp(-logit))), abs=1e-4)


@pytest.mark.parametrize("form", [list, Dataset.from_list])
def test_ld_alpha_with_weights_or_lists_is_refused(models, form):
    rows = tiny_columns(5, 0, "token_weights").to_list()
    with pytest.raises(ValueError, match="ld_alpha: weights tokens itself, and these rows have weights"):
        list(score_rows(form(rows), models[0], ld_alpha=0.5, **OPTIONS))
    with pytest.raises(ValueError, match="ld_alpha: weights tokens itself, and these rows have weights"):
        add_reference_columns(tokens_of(rows), models[0], FORWARD, cache_dir=None, ld_alpha=0.5)
    with pytest.raises(ValueError, match="ld_alpha: weights tokens itself, and these rows have weights"):
        (batch,) = pack(form(rows), None)
        reference_logps(models[0], batch, None, ld_alpha=0.5)
    for most in (2, 4):
        rows = tiny_lists(5, most=most)
        with pytest.raises(ValueError, match="ld_alpha: .* and these rows are lists"):
            list(score_rows(form(rows), models[0], ld_alpha=0.5, **OPTIONS))
        with pytest.raises(ValueError, match="ld_alpha: .* and these rows are lists"):
            add_reference_columns(tokens_of(rows), models[0], FORWARD, cache_dir=None, ld_alpha=0.5)


@pytest.mark.parametrize("form", [list, Dataset.from_list])
@pytest.mark.parametrize("value", [-1.0, 0.0, float("nan"), float("inf")])
def test_a_rows_beta_is_checked_like_the_argument(models, form, value):
    pairs = tiny_columns(3, 0, "beta").to_list()
    for rows in (pairs, [row | {"beta": 0.2} for row in tiny_lists(3)]):
        rows[1]["beta"] = value
        with pytest.raises(ValueError, match=r"examples\[1\]: beta: expected a positive number, got"):
            list(score_rows(form(rows), *models, **OPTIONS))


@pytest.mark.parametrize("lists", [True, False])
def test_the_table_of_an_evaluation_has_the_losses_and_metrics_of_plain_loops(models, lists):
    names = ("weight", "margin", "beta", "label_smoothing", "token_weights")
    rows = tiny_lists(8, weights=True) if lists else tiny_columns(8, 0, *names).to_list()
    loss = PreferenceLoss(kind="plackett_luce" if lists else "sigmoid", beta=0.3)
    tokens = tokens_of(rows)
    table = score_table(list(score_rows(tokens, *models, **OPTIONS)), tokens, loss)
    loss_of = plackett_luce if lists else weighted_sigmoid
    ratios = [own - ref for own, ref in zip(*(truth(model, rows) for model in models), strict=True)]
    plain = plain_rows(rows)
    losses = [float(loss_of(ratio, row, 0.3)) for ratio, row in zip(ratios, plain, strict=True)]
    assert table.losses == pytest.approx(losses, abs=1e-4)
    assert table.lengths.tolist() == [[len(row.responses[0]), len(row.responses[-1])] for row in plain]
    betas = [row.numbers.get("beta", 0.3) for row in plain]
    margins = [beta * float(ratio[0] - ratio[-1]) for beta, ratio in zip(betas, ratios, strict=True)]
    assert table.margins == pytest.approx(margins, abs=1e-4)
    assert (table.lists is not None) == lists
    if lists:
        ratio, ranks = ratios[2].numpy(), np.array(plain[2].ranks)
        signs = np.sign(ratio[:, None] - ratio)[ranks[:, None] < ranks]
        assert table.lists.kendall_tau[2] == pytest.approx(signs.mean())


# ---- the reference cache --------------------------------------------------------------------------------------------


def cached(rows, model, folder, **options):
    dataset = add_reference_columns(tokens_of(rows), model, FORWARD, cache_dir=folder, **{"window": 4, **options})
    assert dataset.features["ref_responses_logps"].feature.dtype == "float32"
    return [row["ref_responses_logps"] for row in dataset.to_list()]


@pytest.mark.parametrize("folder", [None, "cache"])
@pytest.mark.parametrize("weights", [False, True])
def test_cached_log_probs_of_lists_are_the_models_own(tmp_path, models, folder, weights):
    rows = tiny_lists(11, seed=4, weights=weights)
    for _ in range(2):
        found = cached(rows, models[1], folder and tmp_path / folder)
        for own, expected in zip(found, truth(models[1], rows), strict=True):
            assert own == pytest.approx(expected.tolist(), abs=5e-5)


def test_other_weights_ranks_and_betas_compute_nothing_again(tmp_path, models, computed):
    rows = tiny_lists(10, seed=5)
    plain = cached(rows, models[1], tmp_path)
    assert sum(computed) == 10
    for row in rows:
        row["beta"], row["weight"] = 0.7, 2.0
        row["scores"] = [3 * score + 1 for score in row["scores"]]
        row["responses_weights"] = [[1.0] * len(ids) for ids in row["responses_ids"]]
    assert cached(rows, models[1], tmp_path) == plain  # weights of 1 change no bit
    for row in rows:
        row["responses_weights"] = [[0.5] * len(ids) for ids in row["responses_ids"]]
    halved = cached(rows, copy.deepcopy(models[1]), tmp_path)
    assert sum(computed) == 10
    for own, whole in zip(halved, plain, strict=True):
        assert own == pytest.approx([value / 2 for value in whole], abs=1e-6)
    rows[0]["responses_ids"].append([3, 3, 3])
    rows[0]["scores"].append(-9.0)
    rows[0]["responses_weights"].append([1.0] * 3)
    cached(rows, models[1], tmp_path)
    assert sum(computed) == 20


def test_which_responses_make_a_list_belongs_to_the_key():
    prompt, responses = [1, 2], [[3], [4], [5], [6]]
    one, other = (
        ResponseFingerprints.of(
            Dataset.from_list(
                [
                    {"prompt_ids": prompt, "responses_ids": responses[:cut], "ranks": list(range(cut))},
                    {"prompt_ids": prompt, "responses_ids": responses[cut:], "ranks": list(range(4 - cut))},
                ]
            )
        )
        for cut in (2, 1)
    )
    assert np.array_equal(one.tokens, other.tokens) and one.digest() != other.digest()


def test_the_key_of_pairs_is_what_it_was():
    key = "6893e12c86fdc6915b0eac2cc289f6ae56be7566cb99d5a351a3163e0c599f8e"
    assert ResponseFingerprints.of(tiny_dataset(13)).digest() == key
    rows = [{**row, "weight": 2.0, "chosen_weights": [1.0] * len(row["chosen_ids"])} for row in tiny_dataset(13)]
    rows = [{**row, "rejected_weights": [0.5] * len(row["rejected_ids"])} for row in rows]
    assert ResponseFingerprints.of(Dataset.from_list(rows)).digest() == key


def test_a_response_has_one_number_for_each_of_its_weights(tmp_path, models):
    row = {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9], "rejected_ids": [10]}
    weights = ([1.0, 0.0], [1.0, 1.0], [1.0, 0.0], [0.0, 1.0])
    rows = [{**row, "chosen_weights": own, "rejected_weights": [1.0]} for own in weights]
    found = add_reference_columns(tokens_of(rows), models[1], FORWARD, cache_dir=tmp_path, window=1)
    chosen = list(found["ref_chosen_logps"])
    assert chosen[0] == chosen[2] and len(set(chosen)) == 3 and len(set(found["ref_rejected_logps"])) == 1
    assert chosen[1] == pytest.approx(chosen[0] + chosen[3], abs=1e-5)


def test_ranks_share_the_windows_of_lists(tmp_path, models, computed):
    rows = tiny_lists(9, seed=6, weights=True)
    whole = cached(rows, models[1], None)
    computed.clear()
    assert in_threads(lambda ranks: cached(rows, models[1], tmp_path, ranks=ranks)) == [whole, whole]
    assert sum(computed) == 9


def test_lists_that_are_not_stored_best_first_are_refused(models):
    good = {"prompt_ids": [5, 6], "responses_ids": [[8, 9, 10], [11]], "ranks": [0, 1]}
    bad = {"prompt_ids": [5, 6], "responses_ids": [[11], [8, 9, 10]], "ranks": [1, 0]}
    with pytest.raises(ValueError, match=r"row 1: ranks: expected the best response first, got \[1, 0\]"):
        add_reference_columns(Dataset.from_list([good, bad]), models[1], FORWARD, cache_dir=None)
    with pytest.raises(ValueError, match="ranks: expected beside responses_ids"):
        dataset = Dataset.from_list([good]).remove_columns("ranks")
        add_reference_columns(dataset, models[1], FORWARD, cache_dir=None)
    sums = [add_reference_columns(tokens_of([row]), models[1], FORWARD, cache_dir=None) for row in (good, bad)]
    assert sums[0][0]["ref_responses_logps"] == sums[1][0]["ref_responses_logps"]
    expected = truth(models[1], [good | {"scores": [1.0, 0.0]}])[0].tolist()
    assert sums[0][0]["ref_responses_logps"] == pytest.approx(expected, abs=5e-5)
