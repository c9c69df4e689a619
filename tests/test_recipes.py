"""The recipes of the README: each trains the same model on the same pairs in the same order, so all must agree."""

import math

import pytest
import torch
from datasets import Dataset
from recipes import accelerate_loop, liger_loss, lightning_module, pytorch_loop, transformers_trainer, trl_trainer
from tiny import tiny_model, tiny_pairs
from trl_cases import text_pairs, word_tokenizer

from dpofast import reference
from dpofast.integrations.trl import unpatch_trl

PAIRS_PER_STEP, EOS = 4, 1


def examples():
    return [
        {name: ids if name == "prompt_ids" else [*ids, EOS] for name, ids in pair.items()}
        for pair in tiny_pairs(12, seed=2)
    ]


def as_text():
    """The same for trl, which adds the end of the responses itself."""
    return text_pairs(12, seed=2)


def padded():
    for start in range(0, 12, PAIRS_PER_STEP):
        step = examples()[start : start + PAIRS_PER_STEP]
        rows = [(pair["prompt_ids"], pair[name]) for name in ("chosen_ids", "rejected_ids") for pair in step]
        yield reference.padded_rows(rows)


RECIPES = {
    "transformers": lambda model, ref, folder: transformers_trainer.train(
        model, ref, Dataset.from_list(examples()), folder
    ),
    "trl": lambda model, ref, folder: trl_trainer.train(model, ref, as_text(), word_tokenizer(), folder),
    "liger": lambda model, ref, folder: liger_loss.train(model, ref, padded()),
    "accelerate": lambda model, ref, folder: accelerate_loop.train(model, ref, examples()),
    "lightning": lambda model, ref, folder: lightning_module.train(model, ref, examples()),
}


@pytest.fixture(scope="module")
def loop():
    """The plain loop's losses and trained model, micro-batches of a few tokens."""
    model = tiny_model()
    return pytorch_loop.train(model, tiny_model(), examples(), max_tokens=30), model


def test_the_plain_loop_learns(loop):
    losses, _ = loop
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6) and len(losses) == 3
    model = tiny_model()
    again = [pytorch_loop.train(model, tiny_model(), examples()) for _ in range(4)]
    assert sum(again[-1]) < sum(losses) - 0.1


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_does_the_same(name, loop, tmp_path):
    model = tiny_model()
    try:
        losses = RECIPES[name](model, tiny_model(), str(tmp_path))
    finally:
        unpatch_trl()
    assert losses == pytest.approx(loop[0], abs=1e-5)
    for (key, value), trained in zip(loop[1].state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(trained.cpu(), value, atol=1e-5, rtol=1e-4, msg=key)
