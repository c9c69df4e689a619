"""Sample completions from a small model, and evaluate them: exact divergence from the reference, reward, diversity."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from bench.paper.experiment import mean_and_error
from bench.paper.reward import reward, second_opinion

# Rows sampled at once, and logits (rows × positions × vocabulary) of one model while two are compared.
_ROWS = 256
_LOGITS = 1 << 25


@dataclass(frozen=True)
class Samples:
    """B completions; those of one prefix stand together.

    Attributes:
        prefixes: token ids that each began with.
        completions: the sampled token ids, at least one; the end token is the last one, unless the length ran out.
        texts: prefix and completion, without special tokens.
    """

    prefixes: list[list[int]]
    completions: list[list[int]]
    texts: list[str]


Score = Callable[[Samples], Tensor]  # one number for each sample, (B,) float32


def of_texts(reward: Callable[[Sequence[str]], Tensor]) -> Score:
    """A reward of texts as a score of samples."""
    return lambda samples: reward(samples.texts)


LEXICONS: dict[str, Score] = {"reward": of_texts(reward), "second_opinion": of_texts(second_opinion)}


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prefixes: Sequence[Sequence[int]],
    per_prefix: int,
    max_new_tokens: int,
    seed: int,
) -> Samples:
    """per_prefix completions of every prefix from the model itself: temperature 1, no truncation of its distribution.

    Prefixes of one length run together, so that no row is padded, and rows that have ended leave the batch.
    """
    model.eval()
    draws = torch.Generator().manual_seed(seed)
    rows = [list(prefix) for prefix in prefixes for _ in range(per_prefix)]
    completions: list[list[int]] = [[] for _ in rows]
    by_length: dict[int, list[int]] = {}
    for number, row in enumerate(rows):
        by_length.setdefault(len(row), []).append(number)
    for numbers in by_length.values():
        for start in range(0, len(numbers), _ROWS):
            alive = torch.tensor(numbers[start : start + _ROWS])
            ids = torch.tensor([rows[number] for number in alive])
            cache = DynamicCache(config=model.config)
            for _ in range(max_new_tokens):
                logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
                drawn = torch.multinomial(logits.float().softmax(-1), 1, generator=draws)
                for number, token in zip(alive.tolist(), drawn[:, 0].tolist(), strict=True):
                    completions[number].append(token)
                going = (drawn[:, 0] != tokenizer.eos_token_id).nonzero()[:, 0]
                if len(going) == 0:
                    break
                if len(going) < len(alive):
                    cache.batch_select_indices(going)
                alive, ids = alive[going], drawn[going]
    whole = [prefix + completion for prefix, completion in zip(rows, completions, strict=True)]
    return Samples(rows, completions, tokenizer.batch_decode(whole, skip_special_tokens=True))


@torch.no_grad()
def sequence_kl(policy: PreTrainedModel, reference: PreTrainedModel, samples: Samples) -> Tensor:
    """(B,) float32, nats: Σ_t KL(π(·|prefix, y_<t) ‖ π_ref(·|prefix, y_<t)) over the positions of each completion.

    Each position's divergence is exact, a sum over the vocabulary. For completions sampled from the policy the mean is
    an unbiased estimate of KL(π(y|x) ‖ π_ref(y|x)), and varies less than the mean of log-ratios.
    """
    policy.eval(), reference.eval()
    lengths = [len(p) + len(c) for p, c in zip(samples.prefixes, samples.completions, strict=True)]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    result = torch.empty(len(order))
    size = max(1, min(_ROWS, _LOGITS // (max(lengths) * reference.config.vocab_size)))
    for start in range(0, len(order), size):
        numbers = order[start : start + size]
        # The last token is only a target.
        rows = [torch.tensor((samples.prefixes[n] + samples.completions[n])[:-1]) for n in numbers]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        first = torch.tensor([len(samples.prefixes[n]) - 1 for n in numbers])
        count = torch.tensor([len(samples.completions[n]) for n in numbers])
        position = torch.arange(ids.shape[1])
        scored = (position >= first[:, None]) & (position < (first + count)[:, None])
        p, q = (
            model(input_ids=ids, use_cache=False).logits[scored].float().log_softmax(-1)
            for model in (policy, reference)
        )
        per_token = torch.zeros(ids.shape)
        per_token[scored] = (p.exp() * (p - q)).sum(-1)
        result[numbers] = per_token.sum(1)
    return result


def distinct_n(completions: Sequence[Sequence[int]], n: int) -> float:
    """Distinct n-grams over all n-grams of the completions (Li et al., arXiv 1510.03055); 0 without any."""
    grams = [tuple(ids[i : i + n]) for ids in completions for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def evaluate(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prefixes: Sequence[Sequence[int]],
    seed: int,
    *,
    per_prefix: int = 4,
    max_new_tokens: int = 24,
    scores: Mapping[str, Score] = LEXICONS,
) -> dict[str, float]:
    """What the policy says to the prefixes.

    Returns:
        each of the scores, kl (nats a completion) and length (tokens), means over completions, each with its standard
        error over prefixes under "<name>_error"; distinct_1 and distinct_2, over all completions.
    """
    samples = sample(policy, tokenizer, prefixes, per_prefix, max_new_tokens, seed)
    values = {
        **{name: score(samples) for name, score in scores.items()},
        "kl": sequence_kl(policy, reference, samples),
        "length": torch.tensor([float(len(ids)) for ids in samples.completions]),
    }
    result = {f"distinct_{n}": distinct_n(samples.completions, n) for n in (1, 2)}
    for name, value in values.items():
        by_prefix = value.view(len(prefixes), per_prefix).mean(1).tolist()
        result[name], result[f"{name}_error"] = mean_and_error(by_prefix)
    return result
