"""The RL loop that DPO is compared with: trl's RLOOTrainer on the CPU, E[r] − β·KL(π‖π_ref) on the same reward.

Each step samples completions of a batch of prefixes from the present policy, scores them, takes β times the sequence's
log-ratio from every score, and follows the policy gradient with a leave-one-out baseline (REINFORCE, arXiv 2402.14740).
Every completion is used for one step, so that the gradient is on-policy and RLOO's clipping never acts.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from trl import RLOOConfig, RLOOTrainer

from bench.cases import UNATTENDED
from bench.paper.sampling import Samples

OnStep = Callable[[PreTrainedModel, int, int], Any]


@dataclass(frozen=True)
class RLRun:
    """Result of a run.

    Attributes:
        steps: optimizer steps taken.
        generated_tokens: sampled by the policy, each completion's end of sequence included, pads not.
        rewards: mean reward of each step's completions, before the KL penalty.
        kls: nats per completion, the mean of each step's log-ratios to the reference.
    """

    steps: int
    generated_tokens: int
    rewards: list[float]
    kls: list[float]


class AfterStep(TrainerCallback):
    """Calls on_step(model, optimizer steps so far, generated tokens so far) before the first step, and after each."""

    def __init__(self, on_step: OnStep, tokens: Callable[[], int]) -> None:
        """on_step is called as described; tokens() returns the number of generated tokens so far."""
        self.on_step, self.tokens = on_step, tokens

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        """Before the first step."""
        # What on_step samples must not change what the run samples next.
        with torch.random.fork_rng(devices=[]):
            self.on_step(model, state.global_step, self.tokens())
        model.train()

    on_step_end = on_train_begin


def train_rl(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prefixes: Sequence[Sequence[int]],
    reward: Callable[[Samples], Tensor],
    *,
    beta: float,
    steps: int,
    learning_rate: float,
    seed: int,
    on_step: OnStep | None = None,
    max_new_tokens: int,
    per_prefix: int = 4,
    prefixes_per_step: int = 16,
) -> RLRun:
    """Train model in place with RLOO.

    Args:
        model: the policy, a float32 causal language model.
        reference: π_ref; it stays as it is.
        tokenizer: with a pad and an end-of-sequence token.
        prefixes: token ids, passed to the model as they are.
        reward: one number for each of the samples of a step.
        beta: strength of the KL penalty; more than 0.
        steps: optimizer steps.
        learning_rate: AdamW's, constant, without weight decay.
        seed: of the order of the prefixes and of the sampling.
        on_step: see AfterStep; it may sample from the model.
        max_new_tokens: a completion's length, unless it ends before.
        per_prefix: completions of a prefix in a step, at least 2.
        prefixes_per_step: prefixes in a step; no more than there are.

    Raises:
        ValueError: beta is not positive, a prefix is empty, or there are fewer prefixes than a step takes.
    """
    if not beta > 0:
        raise ValueError(f"beta: expected more than 0, as trl keeps no reference model without, got {beta}")
    if not all(prefixes):
        raise ValueError(f"prefixes: expected at least one token in each, got none in {list(map(len, prefixes))}")
    if len(prefixes) < prefixes_per_step:
        # trl would leave out the incomplete batch, and train on nothing
        raise ValueError(f"prefixes: expected at least a step's {prefixes_per_step}, got {len(prefixes)}")
    counter = _Scores(tokenizer, reward)
    with tempfile.TemporaryDirectory() as folder:
        reference.save_pretrained(folder)
        name = model.config._name_or_path
        model.config._name_or_path = folder  # from there trl loads the reference
        args = RLOOConfig(
            output_dir=folder,
            beta=beta,
            max_steps=steps,
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
            num_generations=per_prefix,
            per_device_train_batch_size=per_prefix * prefixes_per_step,
            max_completion_length=max_new_tokens,
            seed=seed,
            logging_steps=1,
            bf16=False,
            gradient_checkpointing=False,
            **UNATTENDED,
        )
        trainer = _PrefixTrainer(
            model=model,
            reward_funcs=counter,
            args=args,
            train_dataset=Dataset.from_dict({"prompt": [list(prefix) for prefix in prefixes]}),
            processing_class=tokenizer,
            callbacks=[] if on_step is None else [AfterStep(on_step, lambda: counter.tokens)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        model.config._name_or_path = name
    del model.forward  # trl's own over the class's
    logged = [entry for entry in trainer.state.log_history if "reward" in entry]
    return RLRun(
        steps=trainer.state.global_step,
        generated_tokens=counter.tokens,
        rewards=[entry["reward"] for entry in logged],
        kls=[entry["kl"] * entry["completions/mean_length"] for entry in logged],
    )


class _PrefixTrainer(RLOOTrainer):
    """RLOOTrainer over token ids: a prefix's text need not give its own tokens again."""

    def _tokenize_prompts(self, prompts: list[list[int]]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return prompts, None, {}

    def _send_telemetry(self) -> None:
        pass


class _Scores:
    """The reward as trl calls it, which also counts the tokens."""

    __name__ = "reward"  # trl names the reward so in its log

    def __init__(self, tokenizer: PreTrainedTokenizerBase, reward: Callable[[Samples], Tensor]) -> None:
        self.tokenizer, self.reward, self.tokens = tokenizer, reward, 0

    def __call__(self, *, prompts: list[list[int]], completion_ids: list[list[int]], **_: Any) -> list[float]:
        self.tokens += sum(map(len, completion_ids))
        whole = [prefix + completion for prefix, completion in zip(prompts, completion_ids, strict=True)]
        texts = self.tokenizer.batch_decode(whole, skip_special_tokens=True)
        return self.reward(Samples(prompts, completion_ids, texts)).tolist()
