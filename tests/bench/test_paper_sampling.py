"""bench/paper: π_ref, prefixes, rewards, samples and their divergence, compared with enumerated values."""

import itertools
import math

import pytest
import torch
from transformers import LlamaForCausalLM

from bench.paper import review_lm
from bench.paper.reward import SCALE, reward, second_opinion
from bench.paper.sampling import Samples, distinct_n, evaluate, sample, sequence_kl
from tests.support.tiny import tiny_model, tiny_tokenizer


def other_model() -> LlamaForCausalLM:
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return model.eval()


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("reference")
    reviews = review_lm.made_up_reviews(300)
    return folder, reviews, *review_lm.reference(folder, True, reviews)


def test_the_reference_learns_the_reviews_and_is_read_again(learned, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, reviews, model, tokenizer = learned
    figures = review_lm.training_figures(folder)
    assert 1 < figures["held_out_perplexity"] < len(tokenizer) / 4
    assert figures["parameters"] == model.num_parameters()
    monkeypatch.setattr(review_lm, "_train", None)
    again, _ = review_lm.reference(folder, True, reviews)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    with pytest.raises(TypeError, match="not callable"):  # other reviews: trained again
        review_lm.reference(folder, True, reviews[:-1])


def test_prefixes_are_beginnings_and_held_out_ones_are_no_training_ones(learned) -> None:
    _, reviews, _, tokenizer = learned
    train, held_out = review_lm.split(reviews)
    assert not {r.film for r in train} & {r.film for r in held_out} and len(train) + len(held_out) == len(reviews)
    first = review_lm.prefixes(train, tokenizer, 60, 3)
    assert first == review_lm.prefixes(train, tokenizer, 60, 3) != review_lm.prefixes(train, tokenizer, 60, 4)
    second = review_lm.prefixes(held_out, tokenizer, 10, 3, excluded=first)
    assert not set(map(tuple, first)) & set(map(tuple, second))
    rows = review_lm.token_rows(reviews, tokenizer)
    for prefix in first + second:
        assert review_lm.SHORTEST_PREFIX <= len(prefix) <= review_lm.LONGEST_PREFIX
        assert any(row[: len(prefix)] == prefix and len(row) > len(prefix) + 1 for row in rows)
    assert len({len(prefix) for prefix in first}) > 3
    with pytest.raises(ValueError, match="10000 prefixes asked for, but the reviews give only"):
        review_lm.prefixes(train, tokenizer, 10000, 3)


def test_rewards_follow_the_lexicons() -> None:
    texts = ["A wonderful, brilliant film.", "A film.", "A terrible, boring disaster."]
    for judge, most in ((reward, SCALE), (second_opinion, 1.0)):
        good, neither, bad = judge(texts).tolist()
        assert most >= good > neither == 0 > bad >= -most
        assert judge(texts).dtype == torch.float32


def test_samples_are_the_models_own(learned) -> None:
    _, reviews, model, tokenizer = learned
    prefixes = review_lm.prefixes(reviews, tokenizer, 7, 0)
    samples = sample(model, tokenizer, prefixes, 5, 9, seed=2)
    assert samples == sample(model, tokenizer, prefixes, 5, 9, seed=2)
    assert samples != sample(model, tokenizer, prefixes, 5, 9, seed=3)
    assert samples.prefixes == [prefix for prefix in prefixes for _ in range(5)]
    for prefix, ids, text in zip(samples.prefixes, samples.completions, samples.texts, strict=True):
        assert tokenizer.eos_token_id not in ids[:-1]
        assert len(ids) == 9 or ids[-1] == tokenizer.eos_token_id
        assert text == tokenizer.decode(prefix + ids, skip_special_tokens=True)


def test_sampled_frequencies_are_the_models_probabilities() -> None:
    # Rows leave the batch at the end token; the cache must go on with the others' own keys. Two tokens of a
    # vocabulary of five can be counted out.
    torch.manual_seed(0)
    model = tiny_model(vocab_size=5, initializer_range=0.4).eval()
    prefix, count = [3, 4], 20000
    samples = sample(model, tiny_tokenizer(), [prefix], count, 2, seed=0)
    expected = {tuple(ids): math.exp(logp) for ids, logp in _responses(model, prefix, 2)}
    assert sum(expected.values()) == pytest.approx(1, abs=1e-5)
    for ids, probability in expected.items():
        error = math.sqrt(probability * (1 - probability) / count)
        assert samples.completions.count(list(ids)) / count == pytest.approx(probability, abs=5 * error)


@torch.no_grad()
def _responses(model: LlamaForCausalLM, prefix: list[int], most: int) -> list[tuple[list[int], float]]:
    """Every response of at most `most` tokens (end token 1), with its log-prob, one forward pass a token."""
    found = []
    for ids in itertools.product(range(model.config.vocab_size), repeat=most):
        ids = list(ids[: ids.index(1) + 1] if 1 in ids else ids)
        logp = 0.0
        for i, token in enumerate(ids):
            logp += float(model(torch.tensor([prefix + ids[:i]])).logits[0, -1].log_softmax(-1)[token])
        if (ids, logp) not in found:
            found.append((ids, logp))
    return found


@torch.no_grad()
def test_sequence_kl_is_a_slow_enumerations() -> None:
    policy, reference = tiny_model(vocab_size=5, initializer_range=0.4).eval(), tiny_model(vocab_size=5).eval()
    prefix, most = [3, 4, 0], 3
    ref_logps = {tuple(ids): logp for ids, logp in _responses(reference, prefix, most)}
    every = _responses(policy, prefix, most)
    exact = sum(math.exp(logp) * (logp - ref_logps[tuple(ids)]) for ids, logp in every)
    # The expectation over the policy of the per-token sums is the divergence of the sequences.
    samples = Samples([prefix] * len(every), [ids for ids, _ in every], [""] * len(every))
    weights = torch.tensor([math.exp(logp) for _, logp in every])
    assert float(weights @ sequence_kl(policy, reference, samples)) == pytest.approx(exact, rel=1e-4)


@torch.no_grad()
def test_sequence_kl_of_ragged_samples_is_each_ones_own() -> None:
    policy, reference = other_model(), tiny_model().eval()
    samples = Samples([[5, 6], [7], [8, 9, 10]], [[11, 12, 13], [14], [15, 1]], [""] * 3)
    found = sequence_kl(policy, reference, samples)
    for number, (prefix, ids) in enumerate(zip(samples.prefixes, samples.completions, strict=True)):
        total = 0.0
        for i in range(len(ids)):
            p, q = (m(torch.tensor([prefix + ids[:i]])).logits[0, -1].log_softmax(-1) for m in (policy, reference))
            total += float((p.exp() * (p - q)).sum())
        assert float(found[number]) == pytest.approx(total, rel=1e-4)
    assert float(sequence_kl(reference, reference, samples).abs().max()) == 0


def test_distinct_n() -> None:
    assert distinct_n([[1, 2, 1], [1, 2]], 1) == 2 / 5
    assert distinct_n([[1, 2, 1], [1, 2]], 2) == 2 / 3
    assert distinct_n([[1]], 2) == 0


def test_an_evaluation_has_every_figure_and_its_error(learned) -> None:
    _, reviews, model, tokenizer = learned
    figures = evaluate(model, model, tokenizer, review_lm.prefixes(reviews, tokenizer, 6, 0), seed=0)
    assert figures["kl"] == figures["kl_error"] == 0
    assert figures["reward_error"] > 0 and 1 <= figures["length"] <= 24
    assert {"second_opinion", "distinct_1", "distinct_2"} <= set(figures)
