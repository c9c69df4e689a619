"""The classical pipeline's reward model: π_ref with a scalar head, fitted to pairs by trl's RewardTrainer.

Its loss is −log σ(r(x, y_w) − r(x, y_l)), the likelihood of Bradley-Terry, so that r is in the units of the true reward
but for a constant of each prompt, and a β means the same under both.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback
from trl import RewardConfig, RewardTrainer

from bench.cases import UNATTENDED
from bench.paper.rl import AfterStep
from bench.paper.sampling import Samples, Score

_ROWS = 256
Example = dict[str, list[int]]
OnStep = Callable[[int, PreTrainedModel], None]


@dataclass(frozen=True, kw_only=True)
class RewardTraining:
    """How a reward model is fitted.

    Attributes:
        epochs: passes over the pairs.
        learning_rate: AdamW's at the start, falling linearly to 0.
        pairs_per_step: in an optimizer step.
        least_steps: to take even where the passes have fewer.
    """

    epochs: float
    learning_rate: float
    pairs_per_step: int
    least_steps: int = 0

    def more_steps(self, pairs: int) -> int:
        """least_steps where the passes over so many pairs have fewer, else -1, as transformers has it."""
        return self.least_steps if self.epochs * pairs < self.least_steps * self.pairs_per_step else -1


class RewardModel:
    """A sequence classifier with one output, as a score of samples."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Take a trained model, whose config has a pad token."""
        self.model = model.eval()

    @torch.no_grad()
    def __call__(self, samples: Samples) -> Tensor:
        """(B,) float32: the reward of prefix and completion, as token ids."""
        whole = [prefix + completion for prefix, completion in zip(samples.prefixes, samples.completions, strict=True)]
        order = sorted(range(len(whole)), key=lambda number: len(whole[number]))
        result = torch.empty(len(whole))
        for start in range(0, len(order), _ROWS):
            numbers = order[start : start + _ROWS]
            rows = [torch.tensor(whole[number]) for number in numbers]
            # On the right, where a causal model does not look; the head reads the last token that is no pad.
            pad = self.model.config.pad_token_id
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
            mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
            result[numbers] = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, 0]
        return result


def train_reward_model(
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Example],
    training: RewardTraining,
    seed: int,
    *,
    on_step: OnStep = lambda step, model: None,
) -> RewardModel:
    """Fit a copy of π_ref with a new scalar head to the pairs.

    Args:
        reference: π_ref, which stays as it is.
        tokenizer: its tokenizer.
        pairs: mappings with prompt_ids, chosen_ids and rejected_ids.
        training: how.
        seed: of the head's weights and the order of the pairs.
        on_step: called with the number of steps so far and the model, before the first step and after each.
    """
    with tempfile.TemporaryDirectory() as folder:
        reference.save_pretrained(folder)
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
        args = RewardConfig(
            output_dir=folder,
            num_train_epochs=training.epochs,
            max_steps=training.more_steps(len(pairs)),
            per_device_train_batch_size=training.pairs_per_step,
            learning_rate=training.learning_rate,
            seed=seed,
            bf16=False,
            gradient_checkpointing=False,
            **UNATTENDED,
        )
        # trl's columns hold prompt and response together.
        columns = {
            f"{side}_ids": [p["prompt_ids"] + p[f"{side}_ids"] for p in pairs] for side in ("chosen", "rejected")
        }
        trainer = RewardTrainer(
            model=model,
            args=args,
            train_dataset=Dataset.from_dict(columns),
            processing_class=tokenizer,
            callbacks=[AfterStep(lambda policy, step, _: on_step(step, policy), lambda: 0)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return RewardModel(model)


def accuracy(score: Score, pairs: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> float:
    """Share of the pairs whose chosen response has the higher score; an equal score counts half."""
    keys = [
        [(tuple(pair["prompt_ids"]), tuple(pair[f"{side}_ids"])) for side in ("chosen", "rejected")] for pair in pairs
    ]
    # A completion of several pairs is scored once.
    each = list(dict.fromkeys(key for both in keys for key in both))
    prefixes, completions = ([list(ids) for ids in part] for part in zip(*each, strict=True))
    whole = [prefix + completion for prefix, completion in zip(prefixes, completions, strict=True)]
    samples = Samples(prefixes, completions, tokenizer.batch_decode(whole, skip_special_tokens=True))
    of = dict(zip(each, score(samples).tolist(), strict=True))
    return sum(1.0 if of[won] > of[lost] else 0.5 * (of[won] == of[lost]) for won, lost in keys) / len(keys)
