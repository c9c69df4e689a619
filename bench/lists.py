"""What a list of K responses costs: dpofast's step on lists against trl's, and its own, on all pairs of each list.

    python -m bench.lists
    python -m bench.lists --responses 8 --profile ratio-2

trl has no loss of lists: it takes the K·(K − 1)/2 pairs of each, and every pair computes its prompt twice and both of
its responses. dpofast holds the K responses as branches of one prompt, P + Σ(length − 1) positions, and trains on the
list itself ("plackett_luce"). Three engines, with a small random model and random lengths (bench/cases.py):

  dpofast-lists      dpofast.DPOTrainer on lists
  dpofast            dpofast.DPOTrainer on the pairs, loss "sigmoid": equal responses are one branch here, too
  trl-precompute     trl.DPOTrainer on the same pairs

Optimizer, precision and settings are those of bench/step.py, whose runs these are: a process of its own each, in turn,
the reference's log-probs computed once before training on all sides and counted, spread over the steps; --epochs says
how often the same lists come back. trl runs --trl-pairs pairs at once, those of one list by default, so that it pads
them to that list's longest. Seconds are given by the wall and of the processor. Each engine runs once more, counted
(bench/work.py).

Nothing is recorded unless dpofast's loss of lists equals a float64 restatement from padded rows within 1e-5, on weights
that differ from the reference's; the positions that were counted are the formula's; and both engines of pairs report
the same loss within 1e-4 at every step.
"""

import argparse
import copy
import itertools
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import dpofast
from bench.cases import RANDOM_PROFILES, RESULTS, RandomProfile
from bench.random_pairs import END, random_lists, text_of, write_model
from bench.real_pairs import write_jsonl
from bench.record import command_line, write_record
from bench.sharing import unique_tokens
from bench.step import ENVIRONMENT, LOSS_TOLERANCE, PACKAGES, check_losses, figures_of, summarize, table, work_table
from bench.step_run import LISTS, StepCase
from bench.timing import interleave, load_at_start, run_child
from dpofast.losses.sequences import segment_sums
from dpofast.reference import padded_logprobs, padded_rows

BASE, PAIRS = "trl-precompute", "dpofast"
ENGINES = (LISTS, PAIRS, BASE)
LIST_TOLERANCE = 1e-5
BETA = 0.1
SETTINGS = ("responses", "lists_per_step", "steps", "epochs", "rounds", "trl_pairs")

# (prompt, its responses, best first), each with its end-of-sequence token
List = tuple[list[int], list[list[int]]]


QUICK_PROFILE = RandomProfile(prompt_median=40, response_median=20, vocab_size=512, hidden_size=64, layers=2)


def write_rows(folder: Path, profile: RandomProfile, count: int, responses: int) -> tuple[list[List], dict[str, Path]]:
    """Draw lists and write them as lists and as pairs. Returns the lists and each engine's file."""
    drawn = random_lists(profile, count, responses)
    texts = [(text_of(prompt), [text_of(ids) for ids in of]) for prompt, of in drawn]
    ranks = list(range(1, responses + 1))
    files = {engine: folder / f"{engine}.jsonl" for engine in (LISTS, PAIRS)}
    write_jsonl(files[LISTS], [{"prompt": prompt, "responses": of, "ranks": ranks} for prompt, of in texts])
    pairs = [
        {"prompt": prompt, "chosen": better, "rejected": worse}
        for prompt, of in texts
        for better, worse in itertools.combinations(of, 2)
    ]
    write_jsonl(files[PAIRS], pairs)
    lists = [(prompt.tolist(), [[*ids.tolist(), END] for ids in of]) for prompt, of in drawn]
    return lists, {**files, BASE: files[PAIRS]}


def positions_of(lists: Sequence[List]) -> int:
    """Positions of one pass: of each list the unique beginnings of its sequences; a last token is only a target.

    P + Σ(length − 1), but for tokens that responses happen to begin with alike.
    """
    return sum(unique_tokens([torch.tensor(prompt + ids[:-1]).numpy() for ids in of])[0] for prompt, of in lists)


def check_list_loss(model_folder: Path, lists: Sequence[List], *, noise: float = 0.02) -> float:
    """|dpofast's loss of the lists − its float64 restatement|, nats, a mean over lists.

    The policy is the reference with `noise` of each weight tensor's standard deviation added at random.

    Raises:
        ValueError: more than LIST_TOLERANCE.
    """
    policy, reference = (AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32) for _ in range(2))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in policy.parameters():
            weight += noise * weight.std() * torch.randn(weight.shape, generator=draw)
    expected = restated(copy.deepcopy(policy).double(), copy.deepcopy(reference).double(), lists)
    rows = [{"prompt_ids": prompt, "responses_ids": of, "ranks": list(range(len(of)))} for prompt, of in lists]
    (batch,) = dpofast.pack(rows)
    loss = dpofast.PreferenceLoss(kind="plackett_luce", beta=BETA)
    with torch.no_grad():
        tokens = dpofast.attach_logprob_head(reference)(packed=batch).logps
        preference = dpofast.PackedPreference(segment_sums(tokens, batch.cu_targets), loss, num_pairs=len(lists))
        found = dpofast.attach_logprob_head(policy)(packed=batch, preference=preference).loss.item()
    if not abs(found - expected) <= LIST_TOLERANCE:  # written so that NaN fails
        raise ValueError(
            f"the loss of lists is {found:.7f}, its restatement {expected:.7f} nats, more than {LIST_TOLERANCE:g} "
            "apart; nothing is recorded"
        )
    return abs(found - expected)


@torch.no_grad()
def restated(policy: Any, reference: Any, lists: Sequence[List]) -> float:
    """The DPO paper's equation 20 as it is written, from padded rows of the models as they are: a mean over lists."""
    total = 0.0
    for prompt, of in lists:
        rows, lengths = padded_rows([(prompt, ids) for ids in of]), [len(ids) for ids in of]
        of_policy, of_reference = (
            torch.stack([tokens.sum() for tokens in padded_logprobs(model, **rows).split(lengths)])
            for model in (policy, reference)
        )
        scores = (BETA * (of_policy - of_reference)).tolist()
        for place in range(len(of) - 1):
            total -= scores[place] - math.log(sum(map(math.exp, scores[place:])))
    return total / len(lists)


def check_positions(counted: float, expected: float) -> None:
    """ValueError unless the positions that a step was counted to run are those of the formula."""
    if counted != expected:
        raise ValueError(f"a step of lists ran {counted:g} positions, by the formula {expected:g}; nothing is recorded")


def compare(cases: dict[str, StepCase], rounds: int) -> dict[str, Any]:
    """Run the engines in turn, then counted, and return the figures of each.

    Raises:
        ValueError: the losses of an engine of pairs differ from the other's.
        RuntimeError: a run failed.
    """
    runs: dict[str, list[dict[str, Any]]] = {engine: [] for engine in ENGINES}
    for engine in interleave(ENGINES, rounds):
        run = run_child("bench.step", ["--child", engine, "--case", json.dumps(asdict(cases[engine]))], ENVIRONMENT)
        runs[engine].append(run)
        print(f"{engine}: steps {' '.join(f'{s:.2f}' for s in run['steps_s'])} s", flush=True)
    worst = check_losses({engine: runs[engine] for engine in (PAIRS, BASE)}, LOSS_TOLERANCE)
    figures = {engine: summarize(repeats) for engine, repeats in runs.items()}
    for engine in ENGINES:
        arguments = ["--child", engine, "--count", "--case", json.dumps(asdict(cases[engine]))]
        figures[engine]["work"] = run_child("bench.step", arguments, ENVIRONMENT)
    return {"loss_difference": worst, "engines": figures}


def costs(figures: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of a step on lists, over that of each other engine: positions, GEMM operations, CPU seconds and seconds."""
    ours = figures[LISTS]

    def over(row: dict[str, Any]) -> dict[str, float]:
        counted = {name: ours["work"][name] / row["work"][name] for name in ("positions", "gemm_gflops")}
        return {**counted, **{name: ours[name]["median"] / row[name]["median"] for name in ("step_cpu_s", "step_s")}}

    return {engine: over(figures[engine]) for engine in (PAIRS, BASE)}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="dpofast's training step on lists against steps on all of their pairs, on the CPU."
    )
    profiles = [name for name, profile in RANDOM_PROFILES.items() if profile.turns == (1, 1) and not profile.fork]
    parser.add_argument("--profile", choices=profiles, default="medium-49k", help="the model, and lengths")
    parser.add_argument("--responses", type=int, default=4, help="of a list")
    parser.add_argument("--lists-per-step", type=int, default=4, help="lists in a step")
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps of a run, the first reported apart")
    parser.add_argument("--epochs", type=int, default=3, help="passes over the lists that the steps make up")
    parser.add_argument("--rounds", type=int, default=3, help="runs of every engine")
    parser.add_argument("--trl-pairs", type=int, help="of trl's micro-batches, by default those of one list")
    parser.add_argument("--quick", action="store_true", help="a tiny model, two lists a step, two steps, one round")
    parser.add_argument("--results", type=Path, default=RESULTS / "lists.jsonl", help="file the record is appended to")
    args = parser.parse_args(argv)
    if args.quick:
        args.lists_per_step, args.steps, args.epochs, args.rounds = 2, 2, 1, 1
    pairs = math.comb(args.responses, 2)
    args.trl_pairs = args.trl_pairs or pairs
    if args.responses < 2:
        parser.error(f"--responses must be at least 2, got {args.responses}")
    if args.steps < 2 or args.rounds < 1:
        parser.error(f"--steps must be at least 2 and --rounds at least 1, got {args.steps} and {args.rounds}")
    if args.epochs < 1 or args.steps % args.epochs:
        parser.error(f"--epochs must divide --steps, got {args.epochs} and {args.steps}")
    if args.lists_per_step < 1 or (args.lists_per_step * pairs) % args.trl_pairs:
        parser.error(f"--trl-pairs must divide the {args.lists_per_step * pairs} pairs of a step, got {args.trl_pairs}")
    return args


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All measurements.

    Raises:
        ValueError: a check failed.
        RuntimeError: a run failed.
    """
    profile = QUICK_PROFILE if args.quick else RANDOM_PROFILES[args.profile]
    write_model(folder / "model", profile)
    lists, files = write_rows(folder, profile, args.steps // args.epochs * args.lists_per_step, args.responses)
    difference = check_list_loss(folder / "model", lists)
    pairs = math.comb(args.responses, 2)
    cases = {
        engine: StepCase(
            model=str(folder / "model"),
            pairs_file=str(file),
            pairs_per_step=args.lists_per_step * (1 if engine == LISTS else pairs),
            steps=args.steps,
            learning_rate=1e-6,
            beta=BETA,
            trl_pairs=args.trl_pairs,
        )
        for engine, file in files.items()
    }
    load = load_at_start()
    figures = compare(cases, args.rounds)
    # every epoch runs the lists once, and so does the reference, before them
    check_positions(
        figures["engines"][LISTS]["work"]["positions"], positions_of(lists) * (args.epochs + 1) / args.steps
    )
    return {
        "profile": "quick" if args.quick else args.profile,
        **{name: getattr(args, name) for name in SETTINGS},
        "mean_tokens": {
            "prompt": sum(len(prompt) for prompt, _ in lists) / len(lists),
            "response": sum(len(ids) for _, of in lists for ids in of) / (len(lists) * args.responses),
        },
        "list_loss_difference": difference,
        "load_at_start": load,
        "lists_over": costs(figures["engines"]),
        **figures,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; 0 when recorded, 1 when a check or a run failed."""
    args = parse(argv)
    figures = figures_of(run, args)
    if figures is None:
        return 1
    print(table(figures["engines"], BASE))
    print(work_table(figures["engines"], BASE))
    for engine, over in figures["lists_over"].items():
        print(
            f"a list of {args.responses} over its {math.comb(args.responses, 2)} pairs by {engine}: "
            f"{over['positions']:.2f} of the positions, {over['gemm_gflops']:.2f} of the GEMM operations, "
            f"{over['step_cpu_s']:.2f} of the CPU seconds, {over['step_s']:.2f} of the seconds"
        )
    write_record(args.results, "lists", figures, command=command_line("bench.lists"), packages=PACKAGES)
    print(f"recorded in {args.results}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
