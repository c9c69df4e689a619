"""A trl training run with and without dpofast.integrations.trl.patch_trl(): seconds a step, losses compared.

    pip install -e '.[bench]'
    python -m bench.trl_patch                   # a Qwen2 shape with V = 151,936
    python -m bench.trl_patch --vocab 49152

Same model folder (random weights), pairs, order and settings; only the line patch_trl() differs. Lengths are lognormal:
prompts of 148 and responses of 121 tokens in the median. The runs are those of bench/step.py, each a process of its
own, alternating; nothing is recorded unless all losses agree within 1e-4 at every step.
"""

import argparse
import json
import os
import random
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.cases import PAIRS_PER_STEP, RESULTS, SEED, package_folder
from bench.step import BASE, BUSY_LOAD, PACKAGES, PATCHED, StepCase, compare, table, token_lengths
from bench.timing import write_record

# A small Qwen2: the vocabulary of the real ones on few and narrow layers, so that trl's run ends on a CPU.
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
VOCAB = 151_936
PROMPT_MEDIAN, RESPONSE_MEDIAN, SIGMA, LONGEST = 148, 121, 0.6, 480
# Ids below are the end and padding tokens.
FIRST_WORD = 2


def make_model(folder: Path, vocab: int) -> None:
    """Random weights and a tokenizer whose words are the token ids, spelled out."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(SEED)
    Qwen2ForCausalLM(Qwen2Config(vocab_size=vocab, **SHAPE)).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({str(i): i for i in range(vocab)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="0", pad_token="1").save_pretrained(folder)


def make_pairs(count: int, vocab: int) -> list[dict[str, str]]:
    """Pairs of random words with lognormal lengths."""
    draw = random.Random(SEED)

    def text(median: int) -> str:
        length = min(LONGEST, max(1, round(median * draw.lognormvariate(0, SIGMA))))
        return " ".join(str(draw.randrange(FIRST_WORD, vocab)) for _ in range(length))

    return [
        {
            "prompt": text(PROMPT_MEDIAN),
            "chosen": " " + text(RESPONSE_MEDIAN),
            "rejected": " " + text(RESPONSE_MEDIAN),
        }
        for _ in range(count)
    ]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="trl's training step with and without patch_trl(), on the CPU.")
    parser.add_argument("--vocab", type=int, default=VOCAB, help="vocabulary size")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of a run, the first reported apart")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each")
    parser.add_argument("--pairs-per-step", type=int, default=PAIRS_PER_STEP, help="pairs in a step")
    parser.add_argument("--learning-rate", type=float, default=1e-5, help="constant")
    parser.add_argument("--results", type=Path, default=RESULTS / "trl_patch.jsonl", help="file the record goes to")
    args = parser.parse_args()
    if args.steps < 2 or args.rounds < 1:
        parser.error(f"--steps must be at least 2 and --rounds at least 1, got {args.steps} and {args.rounds}")
    return args


def main() -> int:
    """Command line entry; 0 when recorded, 1 when losses differ or a run failed, 2 when trl is missing."""
    args = parse()
    try:
        package_folder("trl", "pip install -e '.[bench]'")
    except ModuleNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    load = os.getloadavg()[0]
    if load > BUSY_LOAD:
        print(f"warning: the machine is busy (load {load:.1f}), so times mean little", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        model, pairs_file = Path(folder, "model"), Path(folder, "pairs.jsonl")
        make_model(model, args.vocab)
        pairs = make_pairs(args.steps * args.pairs_per_step, args.vocab)
        pairs_file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
        case = StepCase(
            model=str(model),
            pairs_file=str(pairs_file),
            pairs_per_step=args.pairs_per_step,
            steps=args.steps,
            learning_rate=args.learning_rate,
        )
        lengths = token_lengths(case)
        try:
            compared = compare(case, [PATCHED, BASE], args.rounds)
        except (ValueError, RuntimeError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    print(table(compared["engines"], BASE))
    print(f"largest difference of a loss at any step: {compared['loss_difference']:.1e}")
    figures: dict[str, Any] = {
        "shape": {**SHAPE, "vocab_size": args.vocab},
        "pairs_per_step": args.pairs_per_step,
        "steps": args.steps,
        "rounds": args.rounds,
        "mean_tokens": lengths,
        "load_at_start": load,
        **compared,
    }
    command = shlex.join(["python", "-m", "bench.trl_patch", *sys.argv[1:]])
    write_record(args.results, "trl_patch", figures, command=command, packages=PACKAGES)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
