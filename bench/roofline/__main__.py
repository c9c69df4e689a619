"""Predict time and memory of a DPO step for four ways of running it; or compare recorded lines with predictions.

    python -m bench.roofline --model llama-3.1-8b --device H100 --pairs 64 --lengths 200/320/280 --lora 16
    python -m bench.roofline --model path/to/config.json --device B200 --devices 64 --pairs 512 --lengths 200/320/280
    python -m bench.roofline --scale          which way of dividing 8B, 70B and 235B-A22B over 8 to 512 GPUs is fastest
    python -m bench.roofline --scale --model llama-3.1-70b --devices 64 --pairs 32 --lengths 16384/8192/8192
    python -m bench.roofline --results        every line of bench/results, its prediction, the error

naive: padded rows, chosen and rejected in a forward each, all logits. trl: one padded call, trl 1.16's head, which
scores response tokens on a GPU. liger: the same rows, Liger's layers and its DPO loss. dpofast: packed, shared prompts,
compiled layers, its head. The first three compute the reference in every step; dpofast once before training, and a
step's share of that is counted (--epochs). Each takes the fastest of gradient checkpointing on or off and of
micro-batches of 16,384 tokens or fewer that fits. --scale is of dpofast alone: every way to divide a model and its
rows over --devices (FSDP2, tensor and sequence parallelism). What is assumed stands in bench/roofline/devices.py and
docs/expect_on_your_gpu.md; nothing here ran on a GPU.
"""

import argparse
import sys
from pathlib import Path

from bench.cases import RESULTS
from bench.roofline.devices import find_device
from bench.roofline.models import find_model
from bench.roofline.results import compare
from bench.roofline.scale_tables import best_text, modes_text
from bench.roofline.step import Setting
from bench.roofline.tables import predictions, results_text, step_text
from bench.roofline.work import Pairs


def lengths(text: str) -> tuple[float, float, float]:
    """PROMPT/CHOSEN/REJECTED."""
    parts = text.split("/")
    try:
        prompt, chosen, rejected = map(float, parts)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected PROMPT/CHOSEN/REJECTED, such as 200/320/280, got {text!r}"
        ) from None
    return prompt, chosen, rejected


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.roofline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a name of bench/roofline/models.py, or a config.json or its folder")
    parser.add_argument("--device", default="H100", help="A100, H100, H200, B200 or MI300X")
    parser.add_argument("--devices", type=int, default=1, help="GPUs, eight to a node")
    parser.add_argument("--pairs", type=int, default=64, help="pairs of an optimizer step, over all GPUs")
    parser.add_argument(
        "--lengths", type=lengths, default=(200.0, 320.0, 280.0), metavar="P/C/R", help="mean tokens of each part"
    )
    parser.add_argument("--spread", type=float, default=0.0, help="of the logarithm of lengths: 0.5 is usual, 0 equal")
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="train an adapter; 0: all weights")
    parser.add_argument("--max-tokens", type=int, default=16_384, help="most positions of a micro-batch")
    parser.add_argument("--epochs", type=int, default=3, help="passes over the data, which a cached reference serves")
    parser.add_argument(
        "--scale",
        action="store_true",
        help="every way to divide --model over --devices; without --model the best for three models, 8 to 512 GPUs",
    )
    parser.add_argument(
        "--results",
        nargs="?",
        type=Path,
        const=RESULTS,
        metavar="FOLDER",
        help="compare recorded lines with their predictions instead; takes no other option",
    )
    args = parser.parse_args(arguments)
    if args.results is None and args.model is None and not args.scale:
        parser.error("expected --model, --scale or --results")
    alone, allowed = ("--results", {"results"}) if args.results is not None else ("--scale", {"scale", "device"})
    given = [name for name, value in vars(args).items() if name not in allowed and value != parser.get_default(name)]
    if given and (args.results is not None or (args.scale and args.model is None)):
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        also = " but --device, without --model" if alone == "--scale" else ""
        parser.error(f"expected no other option with {alone}{also}, got {options}")
    if min(args.devices, args.pairs, args.max_tokens, args.epochs) < 1 or args.lora < 0:
        parser.error("expected --devices, --pairs, --max-tokens and --epochs of at least 1, and --lora of 0 or more")
    return args


def main(arguments: list[str] | None = None) -> int:
    """Command line entry; 0, or 2 for what cannot be predicted or compared, with the reason."""
    args = parse(arguments)
    try:
        if args.results is not None:
            print(results_text(compare(args.results)))
            return 0
        if args.model is None:
            print(best_text(find_device(args.device)))
            return 0
        setting = Setting(
            model=find_model(args.model),
            pairs=Pairs.make(args.pairs, *args.lengths, args.spread),
            device=find_device(args.device),
            devices=args.devices,
            lora=args.lora,
            max_tokens=args.max_tokens,
            epochs=args.epochs,
        )
        print(modes_text(setting) if args.scale else step_text(predictions(setting)))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
