"""A small random Llama and pairs of random words with log-normal lengths, as a RandomProfile of bench/cases.py says.

For measurements in which only shapes matter. The tokenizer has one word for every token id, so the text that both
trainers get has exactly the planned lengths.
"""

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bench.cases import SEED, RandomProfile

END, _PAD = 0, 1


def write_model(folder: Path, profile: RandomProfile) -> None:
    """Save the model (float32 safetensors) and its tokenizer."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=profile.vocab_size,
        hidden_size=profile.hidden_size,
        intermediate_size=4 * profile.hidden_size,
        num_hidden_layers=profile.layers,
        num_attention_heads=profile.hidden_size // 64,
        num_key_value_heads=max(1, profile.hidden_size // 128),
        eos_token_id=END,
        pad_token_id=_PAD,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    word_tokenizer(profile.vocab_size).save_pretrained(folder)


def word_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """One word for every token id."""
    words = Tokenizer(models.WordLevel({_word(i): i for i in range(vocab_size)}, unk_token=_word(_PAD)))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=_word(END), pad_token=_word(_PAD))


def _word(token: int) -> str:
    # A special token is found inside words too, so it must not begin one.
    return ("<end>", "<pad>")[token] if token <= _PAD else f"w{token}"


def random_rows(profile: RandomProfile, pairs: int) -> list[dict[str, np.ndarray]]:
    """Pairs as prompt, chosen, rejected: (L,) int64 ids each, without an end-of-sequence token."""
    rng = np.random.default_rng(SEED)
    system = rng.integers(2, profile.vocab_size, profile.system)
    rows: list[dict[str, np.ndarray]] = []
    while len(rows) < pairs:
        least, most = profile.turns
        history = system
        for _ in range(least if least == most else rng.integers(least, most + 1)):
            medians = (profile.prompt_median, profile.response_median, profile.response_median)
            message, chosen, rejected = (_draw(rng, profile, median) for median in medians)
            same = int(profile.fork * min(len(chosen), len(rejected)))
            rejected[:same] = chosen[:same]
            prompt = np.concatenate((history, message))
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
            history = np.concatenate((prompt, chosen))
    return rows[:pairs]


def random_lists(profile: RandomProfile, lists: int, responses: int) -> list[tuple[np.ndarray, list[np.ndarray]]]:
    """(prompt, its responses): (L,) int64 ids each, without end-of-sequence tokens; `turns` and `fork` are not used."""
    rng = np.random.default_rng(SEED)
    system = rng.integers(2, profile.vocab_size, profile.system)
    return [
        (
            np.concatenate((system, _draw(rng, profile, profile.prompt_median))),
            [_draw(rng, profile, profile.response_median) for _ in range(responses)],
        )
        for _ in range(lists)
    ]


def _draw(rng: np.random.Generator, profile: RandomProfile, median: int) -> np.ndarray:
    """Random ids of a log-normal length."""
    length = max(2, round(rng.lognormal(np.log(median), profile.sigma)))
    return rng.integers(2, profile.vocab_size, length)


def text_of(ids: np.ndarray) -> str:
    """The words of ids."""
    # The space makes prompt + response split where the two parts do.
    return "".join(f"{_word(token)} " for token in ids)


def build_random_pairs(profile: RandomProfile, pairs: int) -> list[dict[str, str]]:
    """The text of random_rows; a trainer adds one end-of-sequence token to each response."""
    return [{name: text_of(ids) for name, ids in row.items()} for row in random_rows(profile, pairs)]
