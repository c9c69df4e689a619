"""Every causal family of the installed transformers, tiny and random, packed and over padded rows, against itself.

    python -m bench.families [NAME ...] [--record]

The truth is a plain forward of each sequence alone, in float32. A family is `right` where all log-probs agree, in eval
mode and in train mode with dropout off; `refused` where dpofast raised a ValueError of its own; WRONG where numbers
differ, and `error` where anything else was raised. Either of the last two is a fault, and makes the exit code 1. `not
built` are the types that transformers itself cannot make or run here.
"""

import argparse
import copy
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from bench.family_configs import tiny_config
from bench.record import command_line, write_record
from dpofast import attach_logprob_head, pack
from dpofast.model.dropout import disable_dropout

# Largest |log-prob − truth|, nats, float32; a wrong mask, position or scale is off by 0.01 and more.
TOLERANCE = 1e-3
FAMILIES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
_LONGEST = 400  # characters of a message that are kept
RESULTS = Path(__file__).parent / "results" / "families.jsonl"


def family(name: str) -> Any:
    """A tiny random float32 model of the family, in eval mode."""
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]
    model_class = getattr(transformers, names if isinstance(names, str) else names[0])
    torch.manual_seed(0)
    model = model_class(tiny_config(name, model_class.config_class)).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not bool(parameter.isfinite().all()):  # made with torch.empty
                parameter.normal_(0, 0.05)
            elif parameter.ndim > 1:  # at the usual 0.02 a tiny model's log-probs hardly depend on what it attends to
                parameter.mul_(4)
            parameter.add_(torch.randn_like(parameter), alpha=0.05)  # what begins at 0 or 1 would hide its effect
    return model


def examples(vocab: int) -> list[dict[str, Any]]:
    """Groups of 2 to 4 branches, of 2 to 44 tokens, one-token prompts and responses among them."""
    draw = torch.Generator().manual_seed(1)

    def ids(length: int, first: int | None = None) -> list[int]:
        drawn = torch.randint(5, vocab, (length,), generator=draw).tolist()
        return drawn if first is None else [first, *drawn[1:]]

    lengths = {3: (5, 2), 7: (1, 4, 6), 14: (9, 3), 1: (8, 1, 4, 2), 30: (14, 5)}  # prompt: its responses
    return [
        {
            "prompt_ids": ids(prompt),
            "branches": [ids(length, first=5 + branch) for branch, length in enumerate(responses)],
            "pairs": [(0, other) for other in range(1, len(responses))],
        }
        for prompt, responses in lengths.items()
    ]


@torch.no_grad()
def alone(model: Any, batch: Any) -> torch.Tensor:
    """(N,) log-probs of the batch's targets, nats, from a plain forward of each sequence alone."""
    rows, attended, in_response = batch.padded()
    parts = []
    for row, length, response in zip(rows, attended.sum(1).tolist(), in_response.sum(1).tolist(), strict=True):
        ids = row[None, :length]
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].double()
        logps = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        parts.append(logps[-response:])
    return torch.cat(parts)


def verdict(model: Any, padded: bool, truth: Any, batch: Any) -> dict[str, Any]:
    """What attach_logprob_head makes of a copy of the model: a dict with verdict, and message or the largest error."""
    model = copy.deepcopy(model)
    try:
        disable_dropout(model)
        attach_logprob_head(model, padded=padded)
        if isinstance(truth, str):
            return {"verdict": "error", "message": f"attached, though {truth}"}
        errors = {}
        for mode in ("eval", "train"):
            model.train(mode == "train")
            logps = model(packed=batch).logps
            errors[mode] = float((logps.detach().double() - truth).abs().max())
        logps.sum().backward()
    except ValueError as error:
        raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
        ours = Path(raised_in).is_relative_to(Path(__file__).parents[1] / "dpofast")
        return {"verdict": "refused" if ours else "error", "message": str(error)[:_LONGEST]}
    except Exception as error:
        return {"verdict": "error", "message": f"{type(error).__name__}: {error}"}
    right = all(error <= TOLERANCE for error in errors.values())
    return {"verdict": "right" if right else "WRONG", "errors": errors}


def sweep(name: str) -> dict[str, Any]:
    """The verdicts of a family: {"packed": ..., "padded": ...}."""
    model = family(name)
    (batch,) = pack(examples(90))
    try:
        truth = alone(model, batch)
    except Exception as error:  # codebooks, a draft model without its target: no text to compare, so it must be refused
        truth = f"its plain forward of token ids raises {type(error).__name__}: {error}"
    return {way: verdict(model, way == "padded", truth, batch) for way in ("packed", "padded")}


def main(arguments: list[str] | None = None) -> int:
    """Command line entry; 1 where a family is WRONG or raised an error that is no refusal."""
    parser = argparse.ArgumentParser(prog="python -m bench.families", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="model types; all that are mapped to a causal model")
    parser.add_argument("--record", action="store_true", help=f"append the result to {RESULTS.name}")
    args = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    results: dict[str, dict[str, Any]] = {}
    for name in args.names or FAMILIES:
        begin = time.time()
        signal.alarm(120)
        try:
            results[name] = sweep(name)
        except (Exception, KeyboardInterrupt) as error:  # its plain model does not run: nothing to compare with
            if args.names:
                traceback.print_exc(limit=-2)
            failed = {"verdict": "not built", "message": f"{type(error).__name__}: {str(error)[:300]}"}
            results[name] = {"packed": failed, "padded": failed}
        signal.alarm(0)
        for way, result in results[name].items():
            print(f"{name:26}{way:8}{result['verdict']:10}", result.get("message", result.get("errors")), flush=True)
        if time.time() - begin > 10:
            print(f"{name}: {time.time() - begin:.0f} s")
    counts = {way: Counter(result[way]["verdict"] for result in results.values()) for way in ("packed", "padded")}
    for way, count in counts.items():
        print(f"{way}: " + ", ".join(f"{number} {what}" for what, number in sorted(count.items())))
    if args.record:
        command = command_line("bench.families", arguments)
        write_record(RESULTS, "families", results, command=command, packages=("torch", "transformers", "dpofast"))
    return int(any(count[bad] for count in counts.values() for bad in ("WRONG", "error", "not built")))


if __name__ == "__main__":
    sys.exit(main())
