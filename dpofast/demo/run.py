"""`dpofast demo`: trains a small language model from scratch, then by DPO to prefer kind over grumpy answers."""

from __future__ import annotations

import argparse
import shlex
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers.utils import logging as transformers_logging

from dpofast.checkpointing.folder import LOCK
from dpofast.common.locks import WriteLock
from dpofast.data.load import load_preferences, tokenize_preferences
from dpofast.demo.answers import Answers, answer, likelier_share
from dpofast.demo.language_model import train_language_model
from dpofast.demo.make_data import DATA
from dpofast.model.attach import attach_logprob_head, detach_logprob_head
from dpofast.report.progress import follow
from dpofast.report.training_plot import plot_training
from dpofast.training.config import DPOConfig
from dpofast.training.trainer import DPOTrainer

_TRAIN, _TEST = "pairs_train.jsonl", "pairs_test.jsonl"


@dataclass(frozen=True)
class Size:
    """Size of a run: optimizer steps of both stages, held-out questions to answer, and how many of them to print.

    With 600 steps of text the model knows its facts so loosely that DPO costs some of them.
    """

    text_steps: int = 900
    dpo_steps: int = 45
    questions: int = 40
    shown: int = 6


QUICK = Size(text_steps=12, dpo_steps=4, questions=8, shown=2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo and return 0.

    Raises:
        ValueError: the output directory is not empty and --overwrite was not given, or another process writes to it.
    """
    args = _arguments(argv)
    out: Path = args.output_dir
    out.mkdir(parents=True, exist_ok=True)
    with WriteLock(out, out / LOCK):
        if any(entry.name != LOCK for entry in out.iterdir()) and not args.overwrite:
            raise ValueError(
                f"output_dir: {out} is not empty; pass --overwrite to write over it, or another --output_dir"
            )
        _run(args, out)
    return 0


def _run(args: argparse.Namespace, out: Path) -> None:
    size = QUICK if args.quick else Size()
    console = Console()
    start = time.perf_counter()
    _set_up_process()
    for name in (_TRAIN, _TEST):
        shutil.copyfile(DATA / name, out / name)

    _headline(console, "[bold]1. A small model learns a text[/] whose answers are kind or grumpy, half and half.")
    documents = (DATA / "text.txt").read_text(encoding="utf-8").strip().split("\n\n")
    model, tokenizer = train_language_model(documents, out / "reference", steps=size.text_steps, seed=args.seed)

    train_data, test_data = (load_preferences(str(out / name)) for name in (_TRAIN, _TEST))
    prompts = list(dict.fromkeys(test_data["prompt"]))[: size.questions]
    held_out = list(tokenize_preferences(test_data, tokenizer)[0])
    attach_logprob_head(model)
    before = answer(model, tokenizer, prompts, seed=args.seed)
    likelier = [likelier_share(model, held_out)]

    _headline(console, f"\n[bold]2. DPO[/] from there, on {len(train_data)} pairs whose kind answer is preferred.")
    evaluations = _prefer(model, tokenizer, train_data, test_data, out, size.dpo_steps, args.seed)
    after = answer(model, tokenizer, prompts, seed=args.seed)
    likelier.append(likelier_share(model, held_out))
    detach_logprob_head(model).save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    plot_training(out / "metrics.jsonl", out / "training.png")

    _headline(console, "\n[bold]3. Held out:[/] topics, and turns of phrase, that no training pair has.")
    console.print(_answer_table(before, after, size.shown))
    console.print(_score_table(before, after, likelier, evaluations))
    # print, because rich would wrap long paths and interpret brackets in them as markup.
    print(f"Done in {time.perf_counter() - start:.0f} s. Written:")
    for name, what in (
        ("model", "the trained model (AutoModelForCausalLM, AutoTokenizer)"),
        ("reference", "the model before DPO"),
        ("metrics.jsonl", "every log of the DPO run"),
        ("training.png", "loss, accuracy, margin and rewards"),
    ):
        print(f"  {out / name}  {what}")
    model_dir, train_file, test_file, next_dir = (
        shlex.quote(str(path)) for path in (out / "reference", out / _TRAIN, out / _TEST, f"{out}-2")
    )
    print(
        "Next, the same with options of your own (or with a model and pairs of yours):\n"
        f"  dpofast train --model {model_dir} --data {train_file} --eval_data {test_file} "
        f"--output_dir {next_dir} --per_device_train_batch_size 32 --learning_rate 1e-4 --beta 0.5"
    )


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="dpofast demo", description=__doc__)
    default = "default: %(default)s"
    parser.add_argument("--output_dir", "--output-dir", type=Path, default=Path("dpofast-demo"), help=default)
    parser.add_argument("--overwrite", action="store_true", help="write over a directory that is not empty")
    parser.add_argument("--quick", action="store_true", help="a few steps: everything runs, nothing is learned")
    parser.add_argument("--seed", type=int, default=0, help=default)
    return parser.parse_args(argv)


def _headline(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True)


def _set_up_process() -> None:
    """Use one thread, and silence the progress bars and warnings of datasets and transformers."""
    # For such small matrices a second idle core gives a speedup of 1.6, but on busy cores waiting for the other thread
    # costs far more. With one thread, rounding does not depend on the number of cores either.
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def _prefer(
    model: Any, tokenizer: Any, train_data: Any, test_data: Any, out: Path, steps: int, seed: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Train the model in place by DPO. Returns the metrics of the first and the last held-out evaluation."""
    args = DPOConfig(
        output_dir=str(out / "model"),
        beta=0.5,
        max_steps=steps,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=64,
        learning_rate=1e-4,
        lr_scheduler_type="cosine",
        warmup_steps=min(5, steps // 2),
        logging_steps=max(1, steps // 15),
        logging_first_step=True,
        eval_strategy="steps",
        eval_steps=max(1, steps // 5),
        eval_on_start=True,
        save_strategy="no",
        dataloader_pin_memory=False,
        report_to="none",
        disable_tqdm=True,
        seed=seed,
    )
    trainer = DPOTrainer(
        model=model, args=args, train_dataset=train_data, eval_dataset=test_data, processing_class=tokenizer
    )
    follow(trainer, out / "metrics.jsonl", title="DPO")
    trainer.train()
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    return evaluations[0], evaluations[-1]


def _answer_table(before: Answers, after: Answers, count: int) -> Table:
    table = Table("Question", "Before", "After", show_lines=True)
    rows = list(zip(before.prompts, before.texts, after.texts, strict=True))
    for prompt, old, new in rows[:: len(rows) // count][:count]:
        table.add_row(prompt.removeprefix("Question: ").removesuffix("\nAnswer:"), escape(old), escape(new))
    return table


def _score_table(
    before: Answers, after: Answers, likelier: Sequence[float], evaluations: Sequence[dict[str, float]]
) -> Table:
    table = Table("Held out", "Before", "After")
    count = len(before.texts)
    table.add_row(f"kind answers, of {count}", str(before.kind), str(after.kind))
    table.add_row(f"answers with the right fact, of {count}", str(before.right), str(after.right))
    table.add_row("pairs whose kind answer is the likelier one", *(f"{share:.0%}" for share in likelier))
    table.add_row("reward margin", *(f"{entry['eval_rewards/margins']:.2f}" for entry in evaluations))
    table.add_row("reward accuracy", "all tied", f"{evaluations[-1]['eval_rewards/accuracies']:.0%}")
    table.add_row("DPO loss", *(f"{entry['eval_loss']:.3f}" for entry in evaluations))
    return table
