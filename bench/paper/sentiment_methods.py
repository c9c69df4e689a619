"""The methods compared on controlled sentiment, and the task that they train on.

All start from π_ref and use the same prefixes and number of steps. The offline methods get four completions of each
prefix and the six pairs of them; the RL loop samples four completions itself and gets their rewards.
"""

import copy
import itertools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback

from bench.cases import UNATTENDED
from bench.paper.reward import reward
from bench.paper.rl import AfterStep, train_rl
from bench.paper.sampling import Samples, Score, of_texts, sample
from dpofast import DPOConfig, DPOTrainer, attach_logprob_head, pack
from dpofast.report.training_plot import BLUE, ORANGE

COMPLETIONS = 4
PAIRS_PER_PREFIX = 6

Example = dict[str, list[int]]
OnStep = Callable[[int, PreTrainedModel], None]
Judge = Callable[[Sequence[str]], Tensor]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a run gets.

    Attributes:
        reference: π_ref, to be left as it is.
        tokenizer: its tokenizer.
        prefixes: to train on.
        samples: COMPLETIONS completions of each from π_ref.
        pairs: mappings with prompt_ids, chosen_ids and rejected_ids, a prefix's together.
        ties: pairs left out, as their two completions are equal.
        max_new_tokens: a completion's length, unless it ends before.
        steps: optimizer steps.
        prefixes_per_step: in each of them.
        seed: of whatever is drawn.
        judge: the true reward of texts.
    """

    reference: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prefixes: list[list[int]]
    samples: Samples
    pairs: list[Example]
    ties: int
    max_new_tokens: int
    steps: int
    prefixes_per_step: int
    seed: int
    judge: Judge = reward

    def pairs_of_steps(self) -> list[list[Example]]:
        """The pairs of each step of a pass."""
        size = PAIRS_PER_PREFIX * self.prefixes_per_step
        return [self.pairs[start : start + size] for start in range(0, len(self.pairs), size)]


def make_task(
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prefixes: list[list[int]],
    *,
    max_new_tokens: int,
    steps: int,
    seed: int,
    prefixes_per_step: int = 16,
    judge: Judge = reward,
) -> Task:
    """Sample π_ref and label its completions."""
    samples = sample(reference, tokenizer, prefixes, COMPLETIONS, max_new_tokens, seed)
    pairs = preference_pairs(samples, judge(samples.texts), seed)
    return Task(
        reference=reference,
        tokenizer=tokenizer,
        prefixes=prefixes,
        samples=samples,
        pairs=pairs,
        ties=PAIRS_PER_PREFIX * len(prefixes) - len(pairs),
        max_new_tokens=max_new_tokens,
        steps=steps,
        prefixes_per_step=prefixes_per_step,
        seed=seed,
        judge=judge,
    )


def preference_pairs(samples: Samples, rewards: Tensor, seed: int) -> list[Example]:
    """All pairs of a prefix's COMPLETIONS completions; the first is preferred with probability σ(r1 − r2).

    Pairs of equal completions, which say nothing, are left out.
    """
    draws = torch.Generator().manual_seed(seed)
    pairs = []
    for start in range(0, len(samples.completions), COMPLETIONS):
        for one, other in itertools.combinations(range(start, start + COMPLETIONS), 2):
            first_wins = torch.rand((), generator=draws) < (rewards[one] - rewards[other]).sigmoid()
            chosen, rejected = (one, other) if first_wins else (other, one)
            ids = samples.completions[chosen], samples.completions[rejected]
            if ids[0] != ids[1]:
                pairs.append({"prompt_ids": samples.prefixes[start], "chosen_ids": ids[0], "rejected_ids": ids[1]})
    return pairs


def positions(task: Task) -> dict[str, int]:
    """Positions that one pass over the pairs computes.

    "packed": what the sequences of a step begin with alike once. "prompt_shared": each pair by itself, its prompt once.
    "unshared": two rows a pair, without pads. "padded": the same with pads, each step's rows as long as its longest.
    """
    steps = [pack(step) for step in task.pairs_of_steps()]
    return {
        "packed": sum(batch.num_tokens for (batch,) in steps),
        "prompt_shared": sum(batch.num_tokens for pair in task.pairs for batch in pack([pair], share="prompt")),
        "unshared": sum(2 * len(p["prompt_ids"]) + len(p["chosen_ids"]) + len(p["rejected_ids"]) for p in task.pairs),
        "padded": sum(batch.padded_tokens for (batch,) in steps),
    }


def train_dpo(task: Task, beta: float, learning_rate: float, on_step: OnStep, **options: Any) -> None:
    """DPO by dpofast.DPOTrainer. Further options are DPOConfig's; peft_config goes to the trainer."""
    _train_preferences(task, learning_rate, on_step, loss_type=["sigmoid"], beta=beta, **options)


def train_preferred(task: Task, _strength: float, learning_rate: float, on_step: OnStep) -> None:
    """Preferred fine-tuning: −log π of the chosen completions' tokens, a completion once for each pair it won."""
    _train_preferences(task, learning_rate, on_step, loss_type=["sft"])


def _train_preferences(
    task: Task, learning_rate: float, on_step: OnStep, *, peft_config: Any = None, **options: Any
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        args = DPOConfig(
            output_dir=folder,
            max_steps=task.steps,
            per_device_train_batch_size=PAIRS_PER_PREFIX * task.prefixes_per_step,
            # A prefix's pairs stand together in the data, and so in a step, where they share prompt and branches.
            train_sampling_strategy="sequential",
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
            seed=task.seed,
            **UNATTENDED,
            **options,
        )
        trainer = DPOTrainer(
            model=copy.deepcopy(task.reference),
            args=args,
            train_dataset=Dataset.from_list(task.pairs),
            processing_class=task.tokenizer,
            peft_config=peft_config,
            callbacks=[AfterStep(lambda policy, step, _: on_step(step, policy), lambda: 0)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def train_unlikelihood(task: Task, alpha: float, learning_rate: float, on_step: OnStep) -> None:
    """Unlikelihood training (Welleck et al., arXiv 1908.04319), a baseline of the DPO paper:

    −Σ_chosen Σ_t log π(y_t) − α·Σ_rejected Σ_t log(1 − π(y_t)), over the chosen tokens' number.
    """
    model = attach_logprob_head(copy.deepcopy(task.reference))
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    steps = task.pairs_of_steps()
    for step in range(task.steps):
        model.train()
        (batch,) = pack(steps[step % len(steps)])
        unlikelihood_loss(model(packed=batch).logps, batch.pairs, batch.cu_targets, alpha).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # as in transformers' Trainer
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        on_step(step + 1, model)


def unlikelihood_loss(logps: Tensor, pairs: Tensor, cu_targets: Tensor, alpha: float) -> Tensor:
    """The loss of train_unlikelihood over packed branches.

    Args:
        logps: (N,) log π of every target.
        pairs: (P, 2), chosen and rejected branch.
        cu_targets: (S + 1,): branch s owns logps[cu_targets[s]:cu_targets[s + 1]].
        alpha: weight of the rejected completions.
    """
    lengths = cu_targets.diff().long()
    chosen, rejected = (
        torch.bincount(pairs[:, side].long(), minlength=len(lengths)).repeat_interleave(lengths) for side in (0, 1)
    )
    # log(1 − e^x); a probability that rounds to 1 would make it −inf.
    unlikely = torch.log(-torch.expm1(logps.clamp(max=-1e-6)))
    return -(chosen * logps + alpha * rejected * unlikely).sum() / chosen.sum()


def train_rloo(task: Task, beta: float, learning_rate: float, on_step: OnStep, score: Score | None = None) -> None:
    """The RL loop, bench/paper/rl.py, on a score of samples; None: the true reward."""
    model = copy.deepcopy(task.reference)
    train_rl(
        model,
        task.reference,
        task.tokenizer,
        task.prefixes,
        score or of_texts(task.judge),
        beta=beta,
        steps=task.steps,
        learning_rate=learning_rate,
        seed=task.seed,
        on_step=lambda policy, step, tokens: on_step(step, policy),
        max_new_tokens=task.max_new_tokens,
        per_prefix=COMPLETIONS,
        prefixes_per_step=task.prefixes_per_step,
    )


@dataclass(frozen=True)
class Method:
    """A method and the runs that make up its frontier.

    Attributes:
        label, color: in pictures.
        train: (task, strength, learning_rate, on_step).
        strength: what the value is called; None where the method has none.
        runs: (strength, learning rate) of the full version; AdamW at a constant rate.
        quick_runs: of the quick version.
    """

    label: str
    color: str
    train: Callable[[Task, float, float, OnStep], None]
    strength: str | None
    runs: tuple[tuple[float, float], ...]
    quick_runs: tuple[tuple[float, float], ...]


# The same strengths and rates for DPO and RL. A high rate goes farther, a low one wastes less divergence on noise.
_GRID = tuple(itertools.product((0.1, 1.0), (1e-4, 3e-4)))
METHODS = {
    "dpo": Method("DPO", BLUE, train_dpo, "β", _GRID, ((0.5, 5e-4), (2.0, 5e-4))),
    "rl": Method("RL (RLOO)", ORANGE, train_rloo, "β", _GRID, ((0.5, 5e-4),)),
    "preferred": Method(
        "preferred fine-tuning", "#16a34a", train_preferred, None, ((0.0, 1e-4), (0.0, 3e-4)), ((0.0, 5e-4),)
    ),
    "unlikelihood": Method(
        "unlikelihood", "#9333ea", train_unlikelihood, "α", ((0.5, 1e-4), (0.5, 3e-4)), ((0.5, 3e-4),)
    ),
}
