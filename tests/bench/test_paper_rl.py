"""bench/paper/rl.py: the RL loop that DPO is compared with, at sizes for tests."""

import copy

import pytest
import torch

from bench.paper.review_lm import made_up_reviews, prefixes, reference, split
from bench.paper.reward import reward
from bench.paper.rl import RLOOTrainer, train_rl
from bench.paper.sampling import evaluate, of_texts

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def toy(tmp_path_factory, one_thread):
    model, tokenizer = reference(tmp_path_factory.mktemp("reference"), quick=True)
    train, held_out = split(made_up_reviews())
    return model, tokenizer, prefixes(train, tokenizer, 64, 0), prefixes(held_out, tokenizer, 32, 0)


def run(toy, **options):
    model, tokenizer, train, _ = toy
    policy = copy.deepcopy(model)
    options = {"beta": 0.3, "steps": 2, "learning_rate": 2e-3, "seed": 0, "max_new_tokens": 16, **options}
    return policy, train_rl(policy, model, tokenizer, train, of_texts(reward), **options)


@pytest.mark.slow(7)
def test_it_raises_the_reward_and_a_stronger_penalty_keeps_it_nearer(toy):
    model, tokenizer, _, held_out = toy
    before = copy.deepcopy(model.state_dict())
    start = evaluate(model, model, tokenizer, held_out, 0, max_new_tokens=16)
    weak, strong = (
        evaluate(run(toy, beta=beta, steps=12)[0], model, tokenizer, held_out, 0, max_new_tokens=16)
        for beta in (0.1, 10.0)
    )
    assert weak["reward"] > start["reward"] + 0.5
    assert 0 < strong["kl"] < weak["kl"] / 2
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_tokens_are_counted_exactly_and_are_at_least_one_a_completion(toy, monkeypatch):
    tokens, lengths = [], []
    generate = RLOOTrainer._generate_single_turn

    def recorded(self, prompt_ids, *rest):
        assert prompt_ids[0] == prompt_ids[3] != prompt_ids[4]
        assert all(ids in toy[2] for ids in prompt_ids)
        completions = generate(self, prompt_ids, *rest)
        lengths.append([len(ids) for ids in completions])
        return completions

    monkeypatch.setattr(RLOOTrainer, "_generate_single_turn", recorded)
    policy, result = run(toy, on_step=lambda _, step, so_far: tokens.append((step, so_far)))
    assert tokens == [(0, 0), (1, sum(lengths[0])), (2, sum(map(sum, lengths)))]
    assert result.generated_tokens == tokens[-1][1] and result.steps == len(result.rewards) == 2
    assert [len(of_step) for of_step in lengths] == [64, 64] and 1 <= min(map(min, lengths))
    assert max(map(max, lengths)) <= 16
    assert result.kls[0] == pytest.approx(0, abs=1e-4) and result.kls[1] != 0
    # nothing of trl's is left on the model
    assert "forward" not in vars(policy) and policy.config._name_or_path == toy[0].config._name_or_path


def test_a_seed_gives_the_same_run_whatever_is_sampled_after_a_step(toy):
    def disturb(policy, step, tokens):
        policies.append(torch.rand(7))

    policies = []
    (one, first), (two, second), (_, other) = run(toy), run(toy, on_step=disturb), run(toy, seed=1)
    assert first == second != other and len(policies) == 3
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({"beta": 0.0}, lambda train: train, "beta: expected more than 0"),
        ({}, lambda train: [[], *train], "prefixes: expected at least one token"),
        ({}, lambda train: train[:15], "prefixes: expected at least a step's 16, got 15"),
    ],
)
def test_what_it_cannot_run_with_is_said(toy, options, change, message):
    model, tokenizer, train, held_out = toy
    with pytest.raises(ValueError, match=message):
        run((model, tokenizer, change(train), held_out), **options)
