"""Evaluation of the demo's model: sampled answers, whether they are kind and correct, and preference accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dpofast.demo.world import facts, manner
from dpofast.model.attach import sequence_logprobs
from dpofast.packing.pack import pack


@dataclass(frozen=True)
class Answers:
    """Generated answers to prompts, with counts of kind answers and of answers that contain the requested fact."""

    prompts: list[str]
    texts: list[str]

    @property
    def kind(self) -> int:
        """Number of answers with both a kind opener and a kind closer."""
        return sum(manner(text) == "kind" for text in self.texts)

    @property
    def right(self) -> int:
        """Number of answers that contain the requested fact."""
        known = facts()
        return sum(known[prompt] in text for prompt, text in zip(self.prompts, self.texts, strict=True))


def answer(model: Any, tokenizer: Any, prompts: Sequence[str], *, seed: int, temperature: float = 0.5) -> Answers:
    """Sample one answer of at most 48 tokens to each prompt; deterministic given the seed."""
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True, return_token_type_ids=False).to(model.device)
    model.eval()
    torch.manual_seed(seed)
    output = model.generate(**inputs, max_new_tokens=48, do_sample=True, temperature=temperature)
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return Answers(list(prompts), [text.strip() for text in texts])


@torch.no_grad()
def likelier_share(model: Any, examples: Sequence[Mapping[str, Any]], max_tokens: int = 2048) -> float:
    """Return the share of tokenized pairs whose chosen answer has the larger summed log-prob under the model."""
    model.eval()
    wins = 0
    for batch in pack(examples, max_tokens):
        batch = batch.to(model.device)
        logps = sequence_logprobs(model(packed=batch), batch)
        chosen, rejected = batch.pairs.long().unbind(1)
        wins += int((logps[chosen] > logps[rejected]).sum())
    return wins / len(examples)
