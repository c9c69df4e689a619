"""An artificial language of 41 words whose responses have a length and a quality, and a small Llama trained on it.

A prompt is one topic. A response has SHORTEST to LONGEST words, of the topic or fillers, and END. Its quality is the
rate of words that are of the topic: the language itself has few, USUAL.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from dpofast import attach_logprob_head, pack

END, PAD = 0, 1
TOPICS, WORDS_OF_TOPIC, FILLERS = 8, 3, 7
_WORDS = 2 + TOPICS
_FILLERS = _WORDS + TOPICS * WORDS_OF_TOPIC
VOCABULARY = _FILLERS + FILLERS
SHORTEST, LONGEST, USUAL = 4, 20, 0.1
_MOST = 48  # tokens that are sampled


def prompt_of(topic: int) -> list[int]:
    """The token of a topic."""
    return [2 + topic]


def words_of(topic: int) -> list[int]:
    """The tokens that are of a topic."""
    return list(range(_WORDS + topic * WORDS_OF_TOPIC, _WORDS + (topic + 1) * WORDS_OF_TOPIC))


def response(topic: int, draw: np.random.Generator, *, rate: float = USUAL) -> list[int]:
    """Words, each of the topic with probability rate, and END."""
    length = int(draw.integers(SHORTEST, LONGEST + 1))
    own, fillers = draw.choice(words_of(topic), length), _FILLERS + draw.integers(FILLERS, size=length)
    return [*np.where(draw.random(length) < rate, own, fillers).tolist(), END]


def trained_model(*, steps: int, seed: int) -> LlamaForCausalLM:
    """About 50,000 weights that have learned the language from scratch, with dpofast's log-prob head attached."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    model = attach_logprob_head(LlamaForCausalLM(config))
    draw = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    for _ in range(steps):
        # two responses to a prompt, as a pair whose order means nothing here
        examples = [
            {"prompt_ids": prompt_of(t), "chosen_ids": response(t, draw), "rejected_ids": response(t, draw)}
            for t in draw.integers(TOPICS, size=32).tolist()
        ]
        (batch,) = pack(examples, 10_000)
        loss = -model(packed=batch).logps.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


@dataclass(frozen=True)
class Written:
    """What a model writes: mean words of a response, and the share of all words that are of the topic."""

    length: float
    rate: float


@torch.no_grad()
def write(model: LlamaForCausalLM, *, count: int, seed: int) -> Written:
    """`count` sampled responses, to all topics alike."""
    torch.manual_seed(seed)
    topics = [number % TOPICS for number in range(count)]
    prompts = torch.tensor([prompt_of(topic) for topic in topics])
    model.eval()
    tokens: Tensor = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0, max_new_tokens=_MOST
    )
    rows = [[token for token in row.tolist() if token not in (END, PAD)] for row in tokens[:, 1:]]
    of_topic = [sum(token in words_of(topic) for token in row) for topic, row in zip(topics, rows, strict=True)]
    words = sum(len(row) for row in rows)
    return Written(words / count, sum(of_topic) / max(1, words))
