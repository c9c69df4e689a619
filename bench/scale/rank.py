"""Runs a mode on its ranks, processes of this machine that exchange through gloo, and counts on each."""

import json
import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset, disable_progress_bars
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from transformers.utils import logging

from bench.cases import SEED, UNATTENDED
from bench.random_pairs import word_tokenizer
from bench.scale.counts import Collectives, Saved, size, tensors_in
from bench.scale.modes import MODES, PROFILES, Mode, Profile
from dpofast import DPOConfig, DPOTrainer
from dpofast.training.parallel import offload

# More than any profile's step has: one micro-batch.
MAX_TOKENS = 1_000_000


class _Offloaded(offload.SavedOnCpu):
    """Remembers the most bytes that a forward copied to the processor's memory."""

    most = 0

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _Offloaded.most = max(_Offloaded.most, self.num_bytes)


class _Counts(TrainerCallback):
    """Counts gradients and optimizer state, and the exchanges of the last step."""

    def __init__(self, exchanged: Collectives) -> None:
        self.exchanged = exchanged
        self.figures: dict[str, int] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.model = model
        self.saved = Saved(model)
        self.figures["weights"] = self.saved.resident()
        self.saved.__enter__()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.exchanged.clear()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        gradients = [weight.grad for weight in self.model.parameters() if weight.grad is not None]
        self.figures["gradients"] = size(gradients)

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        self.figures["optimizer"] = size(tensor for tensor in tensors_in(optimizer.state_dict()) if tensor.dim())
        self.exchanges = self.exchanged.figures()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.saved.__exit__(None, None, None)
        self.figures |= {"gathered": self.saved.gathered, "activations": self.saved.peak, "host": _Offloaded.most}


def write_model(folder: Path, profile: Profile) -> None:
    """Save a profile's model and a tokenizer of its vocabulary."""
    torch.manual_seed(SEED)
    LlamaForCausalLM(LlamaConfig(**profile.config(), eos_token_id=0, pad_token_id=1)).save_pretrained(folder)
    word_tokenizer(profile.vocab).save_pretrained(folder)


def train(folder: Path, profile: Profile, mode: Mode) -> dict[str, Any]:
    """Train a profile's steps in a mode, as one of its ranks.

    Returns:
        losses and norms of gradients of every step; bytes of this rank's weights (between steps), of those gathered
        beyond them, of gradients, optimizer state, saved activations, and what is offloaded of them; the exchanges of
        the last step.
    """
    peft_config = None
    if mode.lora:
        from peft import LoraConfig

        peft_config = LoraConfig(r=mode.lora, target_modules="all-linear", task_type="CAUSAL_LM")
    exchanged = Collectives()
    counts = _Counts(exchanged)
    trainer = DPOTrainer(
        str(folder / "model"),
        args=DPOConfig(
            **UNATTENDED
            | {
                "output_dir": str(folder / "output"),
                "per_device_train_batch_size": profile.pairs // (mode.world // mode.sharing),
                "max_steps": profile.steps,
                "train_sampling_strategy": "sequential",
                "learning_rate": 1e-3,
                "optim": "adamw_torch",
                "logging_steps": 1,
                "save_strategy": "steps",
                "save_steps": profile.steps,
                "max_tokens": MAX_TOKENS,
                "max_length": None,
                **({"ddp_backend": "gloo"} if mode.world > 1 else {}),
                **mode.options,
            }
        ),
        train_dataset=Dataset.from_list(profile.rows()),
        processing_class=PreTrainedTokenizerFast.from_pretrained(folder / "model"),
        peft_config=peft_config,
        callbacks=[counts],
    )
    trainer.remove_callback(PrinterCallback)
    with exchanged, mock.patch.object(offload, "SavedOnCpu", _Offloaded):
        trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return {
        "losses": [log["loss"] for log in logs],
        "grad_norms": [log["grad_norm"] for log in logs],
        "bytes": counts.figures,
        "exchanges": counts.exchanges,
    }


def processors_as_gpus() -> None:
    """Let accelerate take these processes for GPUs, the only ones that it shards over; all the rest is its own code."""
    torch.distributed.init_process_group("gloo")
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)


def become_rank(rank: int, world: int, port: int) -> None:
    """Make this process one rank of `world`, with the environment that torchrun would set, and one thread."""
    disable_progress_bars()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # else accelerate lets each rank use all cores
    if world > 1:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in {**ranks, **where}.items()})


def _rank(rank: int, port: int, folder: str, profile: str, mode: str) -> None:
    """Become one rank, and write what it counts."""
    asked = MODES[mode]
    become_rank(rank, asked.world, port)
    if "fsdp" in asked.options or "tensor_parallel_size" in asked.options:
        processors_as_gpus()
    figures = train(Path(folder), PROFILES[profile], asked)
    Path(folder, f"{rank}.json").write_text(json.dumps(figures))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def start(function: Callable[..., None], arguments: tuple[Any, ...], world: int) -> None:
    """Run function(rank, port, *arguments) in `world` processes, and wait.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a rank failed, with what it raised.
    """
    # Each rank is forked from a server that has imported this module and run nothing.
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    torch.multiprocessing.start_processes(function, (port, *arguments), nprocs=world, start_method="forkserver")


def run(folder: Path, profile: str, mode: str) -> list[dict[str, Any]]:
    """Train on as many processes as a mode has ranks. Returns train()'s figures of each.

    Args:
        folder: with a folder "model" of write_model(); the run's files are added.
        profile, mode: names.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a rank failed, with what it raised.
    """
    world = MODES[mode].world
    start(_rank, (str(folder), profile, mode), world)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


def checkpoint_bytes(folder: Path) -> dict[str, int]:
    """Bytes of the files of the run's checkpoint, of all ranks, and of its weights alone."""
    (checkpoint,) = (folder / "output").glob("checkpoint-*")
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    weights = [path for path in files if path.suffix == ".safetensors"]
    return {name: sum(p.stat().st_size for p in found) for name, found in (("all", files), ("weights", weights))}
