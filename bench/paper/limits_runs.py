"""The runs of limits.py: train by dpofast.DPOTrainer on a preference set with a loss; collect metrics and warnings."""

import copy
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import LlamaForCausalLM, PrinterCallback

from bench.cases import UNATTENDED
from bench.paper.limits_data import preferences
from bench.paper.toy_language import write
from dpofast import DPOConfig, DPOTrainer
from dpofast.report.diagnosis import diagnose
from dpofast.report.page import run_of, write_report

PAIRS_PER_STEP, STEPS = 32, 40


@dataclass(frozen=True)
class Case:
    """set: of limits_data.SETS; label: for people; warned: the warnings that are due; options: of DPOConfig."""

    set: str
    label: str
    warned: tuple[str, ...] = ()
    rate: float = 3e-4
    options: Mapping[str, Any] = field(default_factory=dict)


# sigmoid_norm and simpo compare log-probs per token, some ten times smaller: their β is larger.
CASES = {
    "fair": Case("fair", "fair set, DPO"),
    "dpo": Case("longer", "DPO", ("length_bias",)),
    "ld_half": Case("longer", "LD-DPO, α = 0.5", ("length_bias",), options={"ld_alpha": 0.5}),
    "ld_zero": Case("longer", "LD-DPO, α = 0", options={"ld_alpha": 0.0}),
    "norm": Case("longer", "sigmoid_norm", options={"loss_type": ["sigmoid_norm"], "beta": 1.0}),
    "simpo": Case("longer", "SimPO", ("length_bias",), options={"loss_type": ["simpo"], "beta": 2.0}),
    "alike": Case("alike", "DPO", ("likelihood_displacement",), rate=1e-3),
    "rpo": Case("alike", "DPO + RPO, α = 1", rate=1e-3, options={"rpo_alpha": 1.0}),
}


def figures(model: LlamaForCausalLM, case: Case, *, held_out: int, seed: int, report: Path | None) -> dict[str, Any]:
    """Train a copy of the model, evaluate it on held-out pairs, write a report where told to, and let the copy write.

    Returns:
        warnings: names of the report's; r, longer, shorter, gap: Pearson's r of the margin with the difference of
        lengths, the accuracy where the chosen response is the longer one, where it is the shorter one, and their
        difference, all of the rewards that the loss compares (None for pairs of equal length); accuracy: of them;
        r_before: r before training, of a loss without a reference, whose rewards are not 0 then, else None;
        displacement: share of chosen responses less likely than under the reference, chosen, rejected: their mean
        log-prob above the reference's, nats (None without a reference); length, rate: of what the policy writes.
    """
    train = preferences(case.set, PAIRS_PER_STEP * STEPS, seed=2 * seed)
    test = preferences(case.set, held_out, seed=2 * seed + 1)
    policy = copy.deepcopy(model)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        # the model has no name to be put into a model card
        warnings.simplefilter("ignore")
        args = DPOConfig(
            output_dir=folder,
            max_steps=STEPS,
            per_device_train_batch_size=PAIRS_PER_STEP,
            learning_rate=case.rate,
            lr_scheduler_type="cosine",
            warmup_steps=5,
            logging_steps=5,
            seed=seed,
            **UNATTENDED,
            **case.options,
        )
        trainer = DPOTrainer(policy, args=args, train_dataset=train, eval_dataset=test)
        trainer.remove_callback(PrinterCallback)
        has_reference = trainer.loss.needs_reference
        before = None if has_reference else _evaluated(trainer)[0].length
        trainer.train()
        run, metrics = _evaluated(trainer)
        if report is not None:
            write_report(trainer, report)
    found: dict[str, Any] = {"warnings": [finding.name for finding in diagnose(run)]}
    length, compared = run.length, run.compared
    if length is None or compared is None:
        raise ValueError(f"held_out: expected enough pairs to look at their lengths, got {held_out}")
    equal = (compared.lengths[:, 0] == compared.lengths[:, 1]).all()
    longer, shorter = length.accuracy_chosen_longer.value, length.accuracy_chosen_shorter.value
    found |= dict.fromkeys(("r", "r_before", "longer", "shorter", "gap", "displacement", "chosen", "rejected"))
    if not equal:
        found |= {"r": length.margin_correlation, "longer": longer, "shorter": shorter, "gap": longer - shorter}
    if before is not None:
        found["r_before"] = before.margin_correlation
    if has_reference:
        found["displacement"] = metrics["eval_displacement"]
        found |= {side: metrics[f"eval_rewards/{side}"] / args.beta for side in ("chosen", "rejected")}
    written = write(policy, count=256, seed=seed)
    found |= {"accuracy": float((compared.margins > 0).mean()), "length": written.length, "rate": written.rate}
    return found


def _evaluated(trainer: DPOTrainer) -> tuple[Any, dict[str, float]]:
    metrics = trainer.evaluate()
    return run_of(trainer, "eval", trainer.pair_records["eval"]), metrics
