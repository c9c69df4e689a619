"""Runs trainings that get killed: imports everything once and forks a training run for each line of JSON it reads.

    {"case": "full", "out": folder, "kill": ["fsync", 9]}    the run kills itself at its 9th fsync
    {"case": "full", "out": folder, "delay": 0.4}            it is killed after so many seconds
    {"case": "full", "out": folder, "signal": ["TERM", 3]}   it gets the signals in its 3rd step, one after the other

A run resumes from a checkpoint if there is one, and answers {"status": from os.waitpid, "seconds": ...}. A run that
finishes writes final.json with its losses, evaluations and a checksum of its weights; one that is stopped by a signal
writes stopped.txt. The output of a run is in out.log beside its folder.
"""

import hashlib
import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from signal import SIGINT, default_int_handler
from signal import signal as set_handler

import torch
from peft import LoraConfig
from transformers import EarlyStoppingCallback

from dpofast import DPOConfig, DPOTrainer
from dpofast.checkpointing.folder import checkpoints, newest_whole
from dpofast.checkpointing.signals import TrainingInterrupted
from dpofast.checkpointing.trainer import CheckpointedTrainer
from tests.support.tiny import tiny_dataset, tiny_model, tiny_tokenizer

# Four steps an epoch, of four pairs and at last two; windows between two logs and between two saves that do not meet.
COMMON = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 3,
    "learning_rate": 1e-2,
    "logging_steps": 3,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 2,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}
CASES = {
    "full": {"max_tokens": 40},
    "lora": {"disable_dropout": False, "save_steps": 3, "logging_steps": 2},
    "best": {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "save_total_limit": 1,
        "learning_rate": 2e-3,
        "num_train_epochs": 6,
    },
    "epochs": {
        "eval_strategy": "epoch",
        "logging_strategy": "epoch",
        "loss_type": "bco_pair",
        "bco_delta": "running_mean",
        "max_tokens": 40,
    },
}


def make(case, out):
    lora = LoraConfig(r=2, lora_dropout=0.2, target_modules="all-linear", task_type="CAUSAL_LM")
    return DPOTrainer(
        tiny_model(),
        args=DPOConfig(output_dir=str(out), **{**COMMON, **CASES[case]}),
        train_dataset=tiny_dataset(14),
        eval_dataset=tiny_dataset(6, seed=1) if "eval_strategy" in CASES[case] else None,
        processing_class=tiny_tokenizer(),
        peft_config=lora if case == "lora" else None,
        callbacks=[EarlyStoppingCallback(3)] if case == "best" else None,
    )


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def instead(owner, name, action, count, counted=lambda *args: True):
    """Do something else at the count-th call of a function: action(original, arguments)."""
    original, calls = getattr(owner, name), iter(range(1, 1 << 30))

    def wrapped(*args, **kwargs):
        if counted(*args) and next(calls) == count:
            return action(original, args, kwargs)
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def before(original, args, kwargs):
    die()


def after(original, args, kwargs):
    original(*args, **kwargs)
    die()


def half_written(path_of):
    def action(original, args, kwargs):
        original(*args, **kwargs)
        path = path_of(args)
        os.truncate(path, path.stat().st_size // 2)
        die()

    return action


def half_deleted(original, args, kwargs):
    next(path for path in Path(args[0]).rglob("*") if path.is_file()).unlink()
    die()


POINTS = {
    "fsync": (os, "fsync", before),
    "rename": (os, "rename", before),
    "renamed": (os, "rename", after),
    "pickle": (torch, "save", half_written(lambda args: Path(args[1]))),
    "weights": (CheckpointedTrainer, "save_model", half_written(lambda args: Path(args[1], "model.safetensors"))),
    "delete": (shutil, "rmtree", half_deleted, lambda path, *_: Path(path).is_dir() and "delete" in str(path)),
    "step": (DPOTrainer, "training_step", after),
    "evaluation": (DPOTrainer, "evaluation_loop", before),
    "resume": (DPOTrainer, "load_progress_state", after),
}


def signals(name, step, times=1):
    def action(original, args, kwargs):
        for _ in range(times):
            os.kill(os.getpid(), getattr(signal, f"SIG{name}"))
        return original(*args, **kwargs)

    instead(DPOTrainer, "training_step", action, step)


def no_room(first, last):
    """Limit files to 20,000 bytes from one step to another, like a full disk."""
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(soft):
        def action(original, args, kwargs):
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, usual[1]))
            return original(*args, **kwargs)

        return action

    instead(DPOTrainer, "training_step", limited(20_000), first)
    instead(DPOTrainer, "training_step", limited(usual[0]), last)


def run(case, out, kill=None, signal=None, full_disk=None, **_):
    """Run one training to its end, or to the point where it is killed."""
    out = Path(out)
    newest, _ = newest_whole(out)
    if kill:
        owner, name, action, *counted = POINTS[kill[0]]
        instead(owner, name, action, kill[1], *counted)
    if signal:
        # A shell starts what runs in its background with SIGINT ignored, which a run would leave so.
        set_handler(SIGINT, default_int_handler)
        signals(*signal)
    if full_disk:
        no_room(*full_disk)
    trainer = make(case, out)
    try:
        trainer.train(resume_from_checkpoint="latest" if newest else None)
    except (TrainingInterrupted, OSError) as stop:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        (out / "stopped.txt").write_text(f"{type(stop).__name__}: {stop}")
        raise
    clocks = ("runtime", "per_second")
    weights = hashlib.sha256()
    for parameter in trainer.model.parameters():
        weights.update(parameter.detach().numpy().tobytes())
    final = {
        "logs": [
            {name: value for name, value in entry.items() if not name.endswith(clocks)}
            for entry in trainer.state.log_history
            if "train_runtime" not in entry
        ],
        "weights": weights.hexdigest(),
        "best": trainer.state.best_global_step,
        "flos": trainer.state.total_flos,
        "checkpoints": [path.name for path in checkpoints(out)],
    }
    (out / "final.json").write_text(json.dumps(final))


def fork(spec):
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        log = os.open(f"{spec['out']}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)  # the server's carries the answers
        os.dup2(log, 2)
        try:
            run(**spec)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if "delay" in spec:
        time.sleep(spec["delay"])
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return {"status": os.waitstatus_to_exitcode(status), "seconds": time.monotonic() - started}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(fork(json.loads(line))), flush=True)
