"""bench/paper/rlhf.py: the rule of the claims, equal start and budget, the reward model, and the quick version."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from bench.paper import frontier, rlhf
from bench.paper.reward_model import RewardModel, RewardTraining, accuracy, train_reward_model
from bench.paper.rlhf_claims import FAILS, HOLDS, OPEN, combine, decide, paragraph
from bench.paper.rlhf_claims import claim as make_claim
from bench.paper.rlhf_runs import check_equal_budget, check_equal_start, flip, prompts_of, weights_fingerprint
from bench.paper.sampling import Samples
from dpofast.demo.language_model import small_llama, train_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([1.0, 1.1, 0.9], HOLDS),
        ([-1.0, -1.1, -0.9], FAILS),
        ([0.0, 2.0, 1.0], OPEN),  # 1 ± 0.577: within two standard errors
        ([0.0, 1.0, 1.0], OPEN),  # 0.667 ± 0.333: exactly two
        ([0.1, 1.0, 1.0], HOLDS),  # 0.7 ± 0.3
        ([5.0], OPEN),  # no standard error
    ],
)
def test_a_difference_decides_beyond_two_standard_errors(differences, verdict):
    found = decide("reward more", differences)
    mean = sum(differences) / len(differences)
    spread = sum((value - mean) ** 2 for value in differences) / max(1, len(differences) - 1)
    assert found["difference"] == (pytest.approx(mean), pytest.approx(math.sqrt(spread / len(differences))))
    assert found["verdict"] == verdict and found["seeds"] == len(differences)


@pytest.mark.parametrize(("count", "verdict"), [(1, HOLDS), (-2, FAILS), (0, OPEN)])
def test_a_count_decides_by_itself(count, verdict):
    assert decide("models fewer", [count], exact=True)["verdict"] == verdict


@pytest.mark.parametrize(
    ("verdicts", "verdict"),
    [
        ([HOLDS, OPEN], HOLDS),
        ([FAILS, OPEN, OPEN], FAILS),
        ([OPEN, OPEN], OPEN),
        ([HOLDS, FAILS, HOLDS], OPEN),
    ],
)
def test_a_claim_with_findings_for_and_against_it_is_not_decided(verdicts, verdict):
    assert combine([{"verdict": each} for each in verdicts]) == verdict


def test_a_paragraph_gives_every_figure_with_its_error():
    decided = make_claim("DPO is cheaper", [decide("CPU saved", [10.0, 12.0], unit="s"), decide("memory saved", [3.0])])
    assert paragraph(decided) == (
        "DPO is cheaper: holds. CPU saved +11 ± 1 s (holds); memory saved +3 (not decided here)."
    )


def checks(**changed):
    return {"checks": {"start": "w", "pairs": "p", "prompts": "q", **changed}}


def test_methods_that_begin_differently_are_refused():
    found = {
        "pool": checks(),
        "dpo_0.1_0.001_0": checks(),
        "rl_0.1_0.001_0": {"checks": {"start": "w", "prompts": "q"}},
    }
    check_equal_start(found)
    for what in ("start", "pairs", "prompts"):
        with pytest.raises(ValueError, match=f"{what}: expected the same for all methods of a seed, got pool: "):
            check_equal_start({**found, "rlhf_0.1_0.001_0": checks(**{what: "other"})})
    with pytest.raises(ValueError, match="dpo_1_0.001_0: expected a fingerprint of its pairs"):
        check_equal_start({**found, "dpo_1_0.001_0": {"checks": {"start": "w", "prompts": "q"}}})


def test_methods_with_another_budget_are_refused():
    dpo, pipeline = (
        {"points": [{"step": step} for step in (0, *rlhf.QUICK.looks[method])]} for method in ("dpo", "rlhf")
    )
    check_equal_budget({"dpo": [dpo, dpo], "rlhf": [pipeline, pipeline]}, rlhf.QUICK)
    with pytest.raises(ValueError, match="expected 2 tuning runs of each method, got {'dpo': 3, 'rlhf': 2}"):
        check_equal_budget({"dpo": [dpo] * 3, "rlhf": [pipeline] * 2}, rlhf.QUICK)
    longer = {"points": [*pipeline["points"], {"step": 99}]}
    with pytest.raises(ValueError, match=r"rlhf: expected looks after the steps \[0, 2, 5\], got \[0, 2, 5, 99\]"):
        check_equal_budget({"dpo": [dpo, dpo], "rlhf": [pipeline, longer]}, rlhf.QUICK)
    more = replace(rlhf.QUICK, looks={"dpo": (2, 4, 6), "rlhf": (2, 5)})
    with pytest.raises(ValueError, match="looks: expected as many of each method"):
        check_equal_budget({"dpo": [dpo, dpo], "rlhf": [pipeline, pipeline]}, more)


@pytest.mark.parametrize("size", [rlhf.FULL, rlhf.QUICK])
def test_the_sizes_give_every_method_the_budget(size):
    assert {len(set(grid)) for grid in size.grids.values()} == {size.tuning_runs}
    assert {len(size.looks[method]) for method in size.grids} == {len(size.looks["dpo"])}
    assert size.pool % 4 == 0 and max(size.best_of) <= size.pool


def test_a_larger_share_flips_what_a_smaller_one_flips():
    pairs = [{"prompt_ids": [n // 6], "chosen_ids": [n, 1], "rejected_ids": [n, 2]} for n in range(3000)]
    flipped = {share: flip(pairs, share, seed=3) for share in (0.0, 0.1, 0.3)}
    assert flipped[0.0] == pairs
    turned = {share: {n for n, p in enumerate(of) if p["chosen_ids"][1] == 2} for share, of in flipped.items()}
    assert turned[0.1] < turned[0.3]
    for share in (0.1, 0.3):
        assert len(turned[share]) / 3000 == pytest.approx(share, abs=5 * math.sqrt(share * (1 - share) / 3000))
        assert prompts_of(flipped[share]) == [[n] for n in range(500)]
        for n in turned[share]:
            assert flipped[share][n] == {"prompt_ids": [n // 6], "chosen_ids": [n, 2], "rejected_ids": [n, 1]}


def test_best_of_n_by_another_score_is_the_mean_over_all_choices():
    draws = torch.Generator().manual_seed(0)
    rewards, scores = (torch.randn(2, 7, generator=draws) for _ in range(2))
    for n in (1, 3, 7):
        means = []
        for row, by in zip(rewards.tolist(), scores.tolist(), strict=True):
            chosen = [row[max(choice, key=by.__getitem__)] for choice in itertools.combinations(range(7), n)]
            means.append(sum(chosen) / len(chosen))
        assert frontier.best_of_n(rewards, n, scores) == pytest.approx(sum(means) / 2)


@pytest.fixture(scope="module")
def small():
    tokenizer = train_tokenizer(["a b c d e f g h"], vocab_size=300)
    torch.manual_seed(0)
    return small_llama(tokenizer, 64, 2).eval(), tokenizer


def separable(count, seed):
    """Every chosen completion has a token of 20 to 29, every rejected one of 30 to 39; the rest is noise."""
    draws = torch.Generator().manual_seed(seed)

    def completion(low):
        length, place = (int(torch.randint(1, 6, (), generator=draws)) for _ in range(2))
        ids = torch.randint(40, 200, (length,), generator=draws).tolist()
        return [*ids[:place], int(torch.randint(low, low + 10, (), generator=draws)), *ids[place:]]

    return [{"prompt_ids": [40 + n % 50], "chosen_ids": completion(20), "rejected_ids": completion(30)}
            for n in range(count)]  # fmt: skip


@pytest.mark.slow(6)
def test_a_reward_model_learns_separable_pairs_from_the_references_weights(small):
    reference, tokenizer = small
    before, starts = weights_fingerprint(reference), []
    training = RewardTraining(epochs=2, learning_rate=3e-3, pairs_per_step=32)
    model = train_reward_model(
        reference,
        tokenizer,
        separable(800, 0),
        training,
        seed=0,
        on_step=lambda step, model: starts.append((step, weights_fingerprint(model))),
    )
    assert accuracy(model, separable(300, 1), tokenizer) > 0.9
    # one more model, in the reference's weights; the reference itself is as it was
    assert starts[0] == (0, before) == (0, weights_fingerprint(reference))
    assert starts[-1][0] == 50 and starts[-1][1] != before
    assert replace(training, least_steps=51).more_steps(800) == 51 and training.more_steps(800) == -1
    constant = accuracy(lambda samples: torch.zeros(len(samples.texts)), separable(10, 1), tokenizer)
    assert constant == 0.5


def test_a_score_does_not_depend_on_the_rows_beside_it(small):
    reference, _ = small
    torch.manual_seed(1)
    config = LlamaConfig.from_dict({**reference.config.to_dict(), "num_labels": 1})
    model = RewardModel(LlamaForSequenceClassification(config))
    samples = Samples([[50, 51], [52], [53]], [[60], [61, 62, 63, 64], [65, 0]], [""] * 3)
    together = model(samples)
    for n, alone in enumerate(zip(samples.prefixes, samples.completions, strict=True)):
        assert float(model(Samples([alone[0]], [alone[1]], [""]))) == pytest.approx(float(together[n]), abs=1e-5)
    assert len(set(together.tolist())) == 3


@pytest.mark.slow(50)
def test_the_quick_version_compares_goes_on_and_refuses_unequal_starts(tmp_path, capsys):
    assert rlhf.main(["--quick", "--work", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert (tmp_path / "rlhf.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((tmp_path / "paper.jsonl").read_text())
    assert {"device", "versions", "commit"} <= set(record) and record["versions"]["trl"]
    figures = record["figures"]
    assert figures["size"]["seeds"] == [0]
    for decided in figures["claims"]:
        assert f"{decided['claim']}: {decided['verdict']}." in said
    assert [decided["verdict"] for decided in figures["claims"]][0] == HOLDS  # counts need no second seed

    dpo, pipeline, rl = (figures["costs"][method] for method in ("dpo", "rlhf", "rl"))
    assert (dpo["models"], pipeline["models"]) == (1, 3)  # policy; and its reference, and the reward model
    assert list(pipeline["settings"]) == ["RewardConfig", "RLOOConfig"] and list(dpo["settings"]) == ["DPOConfig"]
    assert "beta" in dpo["settings"]["DPOConfig"] and "beta" in pipeline["settings"]["RLOOConfig"]
    # the pipeline pays for the labels that DPO pays for, and for the reward model
    cpu = {method: costs["cpu_seconds"] for method, costs in figures["costs"].items()}
    assert 0 == cpu["rl"]["before"][0] < cpu["dpo"]["before"][0] < cpu["rlhf"]["before"][0] and rl["runs"] == 2
    for costs in cpu.values():
        assert costs["one_run"][0] == pytest.approx(costs["before"][0] + costs["steps"][0])
        assert costs["all_runs"][0] == pytest.approx(costs["before"][0] + 2 * costs["steps"][0])
    assert 0.5 < figures["reward_model"]["accuracy"][0] <= figures["reward_model"]["judge_accuracy"][0] < 1

    starts = [point for point in figures["points"] if point["step"] == 0]
    assert len(starts) == 6 and {tuple(point["reward"]) for point in starts} == {tuple(figures["reference"]["reward"])}
    assert all(point["kl"][0] == 0 for point in starts)
    assert all(point["kl"][0] > 0 for point in figures["points"] if point["step"])
    # what was optimized is what rises most
    best = figures["best_of_n"][-1]
    assert best["modelled_z"][0] > best["true_z"][0] and best["by_judge"][0] > best["reward"][0]

    # What lies in the work folder is not computed again, and a seed gives its figures again.
    cell = tmp_path / "rlhf_0.5_0.001_0.json"
    first = json.loads(cell.read_text())
    kept = (tmp_path / "dpo_0.5_0.001_0.json").stat().st_mtime_ns
    cell.unlink()
    assert rlhf.main(["--quick", "--work", str(tmp_path)]) == 0
    again = json.loads(cell.read_text())
    assert (tmp_path / "dpo_0.5_0.001_0.json").stat().st_mtime_ns == kept
    clocks = ("cpu_seconds", "wall_seconds")
    for one, other in zip(first["figures"]["points"], again["figures"]["points"], strict=True):
        assert {k: v for k, v in one.items() if k not in clocks} == {k: v for k, v in other.items() if k not in clocks}
    again["figures"]["checks"]["start"] = "another model"
    cell.write_text(json.dumps(again))
    with pytest.raises(ValueError, match="start: expected the same for all methods of a seed"):
        rlhf.main(["--quick", "--work", str(tmp_path)])
