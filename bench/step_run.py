"""One run of bench/step.py, in a process of its own: what an engine needs for a few training steps of a case."""

import contextlib
import importlib
import itertools
import json
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.cases import SEED, UNATTENDED
from bench.timing import PeakMemory
from bench.work import Work

BASE, PATCHED, LISTS = "trl", "trl-patched", "dpofast-lists"
# name: library, settings of its own
ENGINES: dict[str, tuple[str, dict[str, Any]]] = {
    "dpofast": ("dpofast", {"precompute_ref_log_probs": True}),
    BASE: ("trl", {"precompute_ref_log_probs": False}),
    "trl-checkpointing": ("trl", {"precompute_ref_log_probs": False, "gradient_checkpointing": True}),
    "trl-precompute": ("trl", {"precompute_ref_log_probs": True}),
    "dpofast-live": ("dpofast", {"precompute_ref_log_probs": False}),
    "dpofast-prompt": ("dpofast", {"precompute_ref_log_probs": True, "share": "prompt"}),
    "dpofast-unshared": ("dpofast", {"precompute_ref_log_probs": True, "share": "none"}),
    PATCHED: (BASE, {"precompute_ref_log_probs": False}),
    LISTS: ("dpofast", {"precompute_ref_log_probs": True, "loss_type": ["plackett_luce"]}),
}
# Those that bench/step.py runs where it is told to; bench/lists.py runs LISTS.
EXTRA_ENGINES = tuple(name for name in ENGINES if name not in ("dpofast", BASE, LISTS))
# The trainer's method that computes the reference before training; timed by wrapping it.
REFERENCE_PASS = {"dpofast": "_with_reference", "trl": "_precompute_ref_logps"}


@dataclass(frozen=True, kw_only=True)
class StepCase:
    """What every engine is given.

    Attributes:
        model: folder of a causal language model with its tokenizer.
        pairs_file: JSON lines with prompt, chosen, rejected, or for LISTS prompt, responses, ranks; read in order.
        pairs_per_step: pairs, or lists, in one optimizer step.
        steps: optimizer steps.
        learning_rate: AdamW's, constant.
        beta: the loss's.
        seed: the trainer's.
        lora: rank of an adapter on every linear layer but the head, 0 to train all weights.
        max_tokens: packed positions of dpofast's micro-batches, None for its default.
        trl_pairs: pairs in one of trl's micro-batches, None for all of a step.
    """

    model: str
    pairs_file: str
    pairs_per_step: int
    steps: int
    learning_rate: float
    beta: float = 0.1
    seed: int = SEED
    lora: int = 0
    max_tokens: int | None = None
    trl_pairs: int | None = None

    def rows(self) -> list[dict[str, Any]]:
        """The pairs or lists."""
        return [json.loads(line) for line in Path(self.pairs_file).read_text(encoding="utf-8").splitlines()]

    def load_model(self) -> Any:
        """The model, float32."""
        import torch
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)

    def load_processing(self) -> Any:
        """The trainers' processing_class."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.model)

    def dataset(self) -> Any:
        """The rows as the trainers get them. In memory: trl would find an earlier run's reference beside a file."""
        from datasets import Dataset

        return Dataset.from_list(self.rows())

    def watch(self, model: Any) -> Any:
        """What counts a timed run of the model at no cost: a context manager with `counts` by name, or None."""
        return None


def train(engine: str, case: StepCase, *, count: bool = False) -> dict[str, Any]:
    """Train in this process and return its measurements: seconds, bytes and nats.

    Args:
        engine: a name of ENGINES.
        case: what to train.
        count: return Work.figures instead.

    Returns:
        reference_s: time of the reference pass before training, 0 where the reference runs inside the steps.
        steps_s: one time for each step, from its start to the next step's, data and logging included.
        reference_cpu_s, steps_cpu_s: the same in seconds of the processor, all threads together, which a busy machine
            changes less.
        imports_bytes: memory after the imports.
        peak_bytes: peak memory above that.
        losses, grad_norms: one value for each step.
        step_counts: what case.watch counted in the steps, means of a step; {} where it counts nothing.
        reference_counts: what it counted in the reference pass before training.
    """
    import datasets  # noqa: F401, before memory is measured
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback  # noqa: F401

    from dpofast.integrations.trl import patch_trl

    name, settings = ENGINES[engine]
    if engine == PATCHED:
        patch_trl()
    library = importlib.import_module(name)
    trainer_class, config_class = library.DPOTrainer, library.DPOConfig

    class Recorder(TrainerCallback):
        def __init__(self) -> None:
            self.starts: list[float] = []
            self.cpu: list[float] = []
            self.logs: list[dict[str, float]] = []

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.starts.append(time.perf_counter())
            self.cpu.append(time.process_time())

        on_train_end = on_step_begin

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in logs:
                self.logs.append(logs)

    reference_s = reference_cpu_s = 0.0
    reference_counts: Counter[str] = Counter()
    if settings["precompute_ref_log_probs"]:
        compute_reference = getattr(trainer_class, REFERENCE_PASS[name])

        def timed_reference(*args: Any) -> Any:
            nonlocal reference_s, reference_cpu_s
            start, cpu = time.perf_counter(), time.process_time()
            counted = Counter(counts)
            result = compute_reference(*args)
            reference_s += time.perf_counter() - start
            reference_cpu_s += time.process_time() - cpu
            reference_counts.update(Counter(counts) - counted)
            return result

        setattr(trainer_class, REFERENCE_PASS[name], timed_reference)

    memory = PeakMemory()
    recorder = Recorder()
    model = case.load_model()
    if name == "dpofast":
        library.attach_logprob_head(model)  # the trainer would, and checks a few tokens: no part of a step
    adapter = None
    if case.lora:
        from peft import LoraConfig

        adapter = LoraConfig(r=case.lora, target_modules="all-linear", task_type="CAUSAL_LM")
    work = Work(model) if count else None
    watch = None if count else case.watch(model)
    counts = {} if watch is None else watch.counts
    with tempfile.TemporaryDirectory() as folder, work or watch or contextlib.nullcontext():
        config: dict[str, Any] = {
            "output_dir": folder,
            "per_device_train_batch_size": case.pairs_per_step,
            "max_steps": case.steps,
            "train_sampling_strategy": "sequential",
            "optim": "adamw_torch_fused",
            "learning_rate": case.learning_rate,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 1.0,
            "beta": case.beta,
            "max_length": None,
            "disable_dropout": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "seed": case.seed,
            "logging_steps": 1,
            **UNATTENDED,
        }
        if name == "dpofast" and case.max_tokens is not None:
            config["max_tokens"] = case.max_tokens
        if name == "trl" and case.trl_pairs is not None:
            config["per_device_train_batch_size"] = case.trl_pairs
            config["gradient_accumulation_steps"] = case.pairs_per_step // case.trl_pairs
        trainer = trainer_class(
            model=model,
            args=config_class(**{**config, **settings}),
            train_dataset=case.dataset(),
            processing_class=case.load_processing(),
            callbacks=[recorder],
            peft_config=adapter,
        )
        trainer.train()
    if work is not None:
        return work.figures(case.steps)
    return {
        "reference_s": reference_s,
        "steps_s": [stop - start for start, stop in itertools.pairwise(recorder.starts)],
        "reference_cpu_s": reference_cpu_s,
        "steps_cpu_s": [stop - start for start, stop in itertools.pairwise(recorder.cpu)],
        "imports_bytes": memory.start,
        "peak_bytes": memory.increase(),
        "losses": [log["loss"] for log in recorder.logs],
        "grad_norms": [log["grad_norm"] for log in recorder.logs],
        "reference_counts": dict(reference_counts),
        "step_counts": {name: (counts[name] - reference_counts[name]) / case.steps for name in counts},
    }


def token_lengths(case: StepCase) -> dict[str, float]:
    """Mean tokens of the prompts and of the responses, their end-of-sequence token included."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(case.model)
    rows = case.rows()
    lengths = {key: [len(tokenizer(row[key]).input_ids) for row in rows] for key in ("prompt", "chosen", "rejected")}
    return {key: sum(values) / len(values) + (key != "prompt") for key, values in lengths.items()}
