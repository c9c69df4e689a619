"""Training runs that must come out the same on one rank and on several; run as a process of its own for each rank."""

import os
import socket

import torch
from tiny import tiny_dataset, tiny_model, tiny_tokenizer
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from dpofast import DPOConfig, DPOTrainer, losses

WORLD = 2
PAIRS = 21  # 8 a step: the last one has 5
COUPLED = ("aot", "aot_unpaired", "kto_pair")
REQUIRED = {"exo_pair": {"label_smoothing": 1e-3}, "robust": {"label_smoothing": 0.1}}


def shared_prompts():
    """tiny_dataset with every second prompt like the one before it."""
    rows = tiny_dataset(PAIRS).to_list()
    for before, row in zip(rows[::2], rows[1::2], strict=False):
        row["prompt_ids"] = before["prompt_ids"]
    return type(tiny_dataset(1)).from_list(rows)


CASES = {
    "plain": {},
    "max_tokens 24": {"max_tokens": 24},
    "unlimited": {"max_tokens": 100_000},
    "not shared": {"share_prompts": False},
    "live reference": {"precompute_ref_log_probs": False},
    "moving reference": {"precompute_ref_log_probs": False, "sync_ref_model": True, "ref_model_sync_steps": 2},
    "token statistics": {"token_statistics": True, "max_tokens": 24},
    "checkpointing": {"gradient_checkpointing": True, "max_tokens": 24},
    "rpo": {"rpo_alpha": 1.0, "max_tokens": 24},
    "weighted": {"use_weighting": True},
    "ld": {"ld_alpha": 0.3},
    "bco running mean": {"loss_type": "bco_pair", "bco_delta": "running_mean", "max_tokens": 24},
    "out of memory": {"fails": {"most": 30, "rank": 1}},
    "one pair a rank": {"pairs": 2},
    "lora": {"lora": True},
    "lora live": {"lora": True, "precompute_ref_log_probs": False},
    **{kind: {"loss_type": kind, "max_tokens": 24, **REQUIRED.get(kind, {})} for kind in losses.KINDS},
}
ZERO_CASES = ("plain", "max_tokens 24", "rpo")


def _zero(stage):
    """A DeepSpeed configuration; its own optimizer would be compiled for the machine."""
    return {
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
    }


# How several ranks share a model: (the cases to run so, options)
MODES = {
    "ddp": (CASES, {}),
    "zero2": (ZERO_CASES, {"deepspeed": _zero(2)}),
    "zero3": (ZERO_CASES, {"deepspeed": _zero(3)}),
}


class Synchronizations(TrainerCallback):
    """Counts the gradient buckets that DistributedDataParallel reduces."""

    count = 0

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.wrapped = self.trainer.model_wrapped
        if type(self.wrapped) is DistributedDataParallel:
            self.wrapped.register_comm_hook(self, self.reduced)

    @staticmethod
    def reduced(self, bucket):
        self.count += 1
        return allreduce_hook(None, bucket)


class RunsOutOfMemory:
    """Makes a model's forward fail on micro-batches beyond some positions, on one rank."""

    def __init__(self, model, most, rank):
        self.most, self.rank, self.model = most, rank, model
        model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module, args, kwargs):
        here = int(os.environ.get("RANK", 0)) == self.rank
        if here and module.training and kwargs["packed"].num_tokens > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")


def train(folder, ranks, *, pairs=8, accumulation=1, lora=False, fails=None, **options):
    """Some steps of SGD on `pairs` pairs a step; what is compared of them."""
    peft_config = None
    if lora:
        from peft import LoraConfig

        peft_config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    defaults = {
        "optim": "sgd",
        "learning_rate": 0.05,
        "max_steps": 10,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    model, synchronizations = tiny_model(), Synchronizations()
    if fails is not None:
        RunsOutOfMemory(model, **fails)
    trainer = DPOTrainer(
        model,
        args=DPOConfig(
            output_dir=str(folder),
            per_device_train_batch_size=pairs // ranks // accumulation,
            gradient_accumulation_steps=accumulation,
            per_device_eval_batch_size=4 // ranks,
            **{**defaults, **options},
        ),
        train_dataset=shared_prompts(),
        eval_dataset=tiny_dataset(7, seed=3),
        processing_class=tiny_tokenizer(),
        peft_config=peft_config,
        callbacks=[synchronizations],
    )
    synchronizations.trainer = trainer
    trainer.train()
    logs = [{k: v for k, v in log.items() if k in COMPARED} for log in trainer.state.log_history if "loss" in log]
    metrics = {k: v for k, v in trainer.evaluate().items() if k.removeprefix("eval_") in COMPARED}
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped if trainer.is_deepspeed_enabled else trainer.model)
    return {
        "logs": logs,
        "eval": metrics,
        "weights": {k: v.clone() for k, v in (state or {}).items()},
        "synchronizations": synchronizations.count,
        "wrapped": type(synchronizations.wrapped).__name__,
        "max_tokens": trainer.max_tokens,
    }


COMPARED = ("loss", "grad_norm", "rewards/margins", "rewards/accuracies", "logps/chosen", "lengths/rejected", "entropy")


def rank_main(rank, port, folder, mode):
    """Every case of a mode on this rank; results go to a file."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in ranks.items()})
    torch.set_num_threads(1)
    cases, options = MODES[mode]
    results = {name: train(f"{folder}/{rank}", WORLD, ddp_backend="gloo", **CASES[name], **options) for name in cases}
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def on_two_ranks(folder, mode):
    """The results of both ranks."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    torch.multiprocessing.spawn(rank_main, (port, str(folder), mode), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]
