"""One confirming run of controlled sentiment on SmolLM2-135M-Instruct: DPO by dpofast, a LoRA adapter, one seed.

    python -m bench.smollm2 build/smollm2
    python -m bench.paper.sentiment_smollm2

The model continues 2 to 8 tokens of a film review as plain text; reward, labels and pairs are those of
bench/paper/sentiment.py. Measured are whether DPO's reward exceeds π_ref's here too, at which divergence, and whether
the second lexicon agrees.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.paper.experiment import begin, cells, record
from bench.paper.review_lm import Prefixes
from bench.paper.sampling import evaluate
from bench.paper.sentiment_methods import make_task, positions, train_dpo
from bench.paper.text_table import markdown_table, plus_minus

MODEL = Path("build/smollm2")


@dataclass(frozen=True)
class Size:
    """How much of everything; the names are those of bench/paper/sentiment.py.

    Attributes:
        prefixes_per_step: in an optimizer step.
        learning_rate: AdamW's, constant.
        rank: of the adapter, on every linear layer but the head.
    """

    prefixes: int
    prefixes_per_step: int
    looks: tuple[int, ...]
    held_out: int
    per_prefix: int
    beta: float
    learning_rate: float = 5e-4
    rank: int = 16
    max_new_tokens: int = 24


FULL = Size(192, 4, (0, 16, 32, 48), 32, 4, beta=0.5)
QUICK = Size(8, 2, (0, 2, 4), 4, 2, beta=0.5)


def compute(size: Size, quick: bool) -> dict[str, Any]:
    """Train, and look at the policy before and meanwhile."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    prefixes = Prefixes(tokenizer, quick, size.held_out)
    task = make_task(
        model,
        tokenizer,
        prefixes.to_train(size.prefixes, seed=0),
        max_new_tokens=size.max_new_tokens,
        steps=size.looks[-1],
        prefixes_per_step=size.prefixes_per_step,
        seed=0,
    )
    points = []

    def look(step: int, policy: Any) -> None:
        if step in size.looks:
            figures = evaluate(
                policy,
                model,
                tokenizer,
                prefixes.held_out,
                0,
                per_prefix=size.per_prefix,
                max_new_tokens=size.max_new_tokens,
            )
            points.append({"step": step, **figures})

    adapter = LoraConfig(r=size.rank, lora_alpha=2 * size.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    train_dpo(task, size.beta, size.learning_rate, look, peft_config=adapter)
    return {"points": points, "pairs": len(task.pairs), "ties": task.ties, "positions": positions(task)}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; 2 when there is no model."""
    args, size = begin("sentiment_smollm2", __doc__, argv, FULL, QUICK, threads=None)
    if not MODEL.is_dir():
        print(f"error: {MODEL} is no folder; make it with: python -m bench.smollm2 {MODEL}", file=sys.stderr)
        return 2
    figures = cells(args, asdict(size), ["dpo"], lambda _: compute(size, args.quick))["dpo"]
    record(args, "sentiment_smollm2", {**figures, "size": asdict(size)})
    names = ("kl", "reward", "second_opinion", "length")
    rows = []
    for point in figures["points"]:
        told = [plus_minus((point[name], point[f"{name}_error"]), 2) for name in names]
        rows.append([str(point["step"]), *told, f"{point['distinct_2']:.2f}"])
    print(markdown_table(["step", "KL", "reward", "second lexicon", "tokens", "distinct-2"], rows))
    print(f"errors: over {size.held_out} held-out prefixes, one seed; {figures['seconds']:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
