"""Training runs that must give equal results on one process and on two ranks, and rank_main(), which runs them."""

import importlib
import itertools
import os
import random
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from dpofast import DPOConfig, DPOTrainer
from dpofast.losses import kinds as losses
from tests.support.rank_processes import become_rank, free_port, run_ranks
from tests.support.tiny import VOCAB, tiny_dataset, tiny_dialogues, tiny_model, tiny_tokenizer
from tests.support.tiny_lists import tiny_columns, tiny_list_dataset

WORLD = 2
PAIRS = 21  # 8 a step: the last one has 5
COUPLED = ("aot", "aot_unpaired", "kto_pair", "beta_dpo")
REQUIRED = {"exo_pair": {"label_smoothing": 1e-3}, "robust": {"label_smoothing": 0.1}}

# The load-balancing loss is computed from what the tokens of the whole step choose.
EXPERTS = {"family": "mixtral", "router_aux_loss_coef": 1.0, "max_tokens": 24}
EACH = {"sync_each_batch": True}
RESUMED = {"resumed": True, "save_strategy": "steps", "save_steps": 5, "optim": "adamw_torch", "learning_rate": 1e-3}
BEST = {
    **{"save_strategy": "steps", "save_steps": 5, "eval_strategy": "steps", "eval_steps": 5},
    **{"load_best_model_at_end": True, "metric_for_best_model": "lengths/rejected"},  # the first one: all are equal
}


def shared_prompts():
    """Return tiny_dataset with every second prompt equal to the one before it."""
    rows = tiny_dataset(PAIRS).to_list()
    for before, row in zip(rows[::2], rows[1::2], strict=False):
        row["prompt_ids"] = before["prompt_ids"]
    return type(tiny_dataset(1)).from_list(rows)


def long_pairs():
    """Return 80 pairs of about 300 tokens, every second prompt equal to the one before it: 9,000 positions per step."""
    draw = random.Random(0)
    rows = []
    for _ in range(40):
        prompt = draw.choices(range(3, VOCAB), k=draw.randint(100, 300))
        for _ in range(2):
            chosen, rejected = (draw.choices(range(3, VOCAB), k=draw.randint(20, 80)) for _ in range(2))
            rows.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    return type(tiny_dataset(1)).from_list(rows)


def dialogues():
    """Return pairs that begin alike: system prompts, further turns, responses that part late."""
    return tiny_dataset(PAIRS, pairs=tiny_dialogues)


CASES = {
    "plain": {},
    "dialogues": {"dataset": dialogues, "max_tokens": 60},
    "max_tokens 24": {"max_tokens": 24},
    "unlimited": {"max_tokens": 100_000},
    "not shared": {"share": "none"},
    "live reference": {"precompute_ref_log_probs": False},
    "moving reference": {"precompute_ref_log_probs": False, "sync_ref_model": True, "ref_model_sync_steps": 2},
    "token statistics": {"token_statistics": True, "max_tokens": 24},
    "checkpointing": {"gradient_checkpointing": True, "max_tokens": 24},
    "rpo": {"rpo_alpha": 1.0, "max_tokens": 24},
    "weighted": {"use_weighting": True},
    "ld": {"ld_alpha": 0.3},
    "bco running mean": {"loss_type": "bco_pair", "bco_delta": "running_mean", "max_tokens": 24},
    "out of memory": {"fails": {"most": 30, "rank": 1}},
    "experts": EXPERTS,
    "experts, one micro-batch a rank": {**EXPERTS, "max_tokens": 100_000},
    "experts aot": {**EXPERTS, "loss_type": "aot"},
    "experts out of memory": {**EXPERTS, "max_tokens": 100_000, "fails": {"most": 30, "rank": 1}},
    "experts, one pair a rank": {**EXPERTS, "pairs": 2},
    "one pair a rank": {"pairs": 2},
    "lora": {"lora": True},
    "lora live": {"lora": True, "precompute_ref_log_probs": False},
    "lora live aot": {"lora": True, "precompute_ref_log_probs": False, "loss_type": "aot", "max_tokens": 24},
    "synchronized each time": {"max_tokens": 24, "accelerator_config": {"gradient_accumulation_kwargs": EACH}},
    "accumulation": {"accumulation": 2, "max_tokens": 24},
    "clipped": {"max_grad_norm": 0.1},
    "tied": {"family": "llama-tied"},
    "evaluated": {"eval_strategy": "steps", "eval_steps": 3},
    "resumed": RESUMED,
    "resumed lora": {**RESUMED, "lora": True},
    "resumed tied": {**RESUMED, "family": "llama-tied"},
    "best model": BEST,
    **{kind: {"loss_type": kind, "max_tokens": 24, **REQUIRED.get(kind, {})} for kind in losses.KINDS},
}


def lists():
    """Return lists of two to five responses, some tied, with scores."""
    return tiny_list_dataset(PAIRS)


def weighted_lists():
    """Return the same with weights of tokens."""
    return tiny_list_dataset(PAIRS, weights=True)


def columns():
    """Return pairs with every optional column."""
    return tiny_columns(PAIRS, 0, "weight", "margin", "beta", "label_smoothing", "token_weights")


def weights():
    """Return pairs with weights of rows and tokens, and betas of their own."""
    return tiny_columns(PAIRS, 0, "weight", "beta", "token_weights")


LIST_CASES = {
    "lists, plackett_luce": {"dataset": lists, "loss_type": "plackett_luce", "max_tokens": 30},
    "plackett_luce, live reference": {
        **{"dataset": weighted_lists, "loss_type": "plackett_luce", "max_tokens": 30},
        "precompute_ref_log_probs": False,
    },
    "lists, infonca": {"dataset": lists, "loss_type": "infonca", "max_tokens": 30},
    "mix": {"dataset": weighted_lists, "loss_type": ["plackett_luce", "sigmoid", "sft"], "max_tokens": 30},
    "lists, accumulation": {"dataset": lists, "loss_type": "lipo_lambda", "accumulation": 2, "max_tokens": 30},
    "lists as pairs": {"dataset": lists, "list_pairs": "adjacent", "max_tokens": 30},
    "columns": {"dataset": columns, "max_tokens": 24},
    "columns, sft": {"dataset": weights, "loss_type": "sft", "max_tokens": 24},
    "columns, aot": {"dataset": weights, "loss_type": "aot", "max_tokens": 24},
    "columns, live reference": {"dataset": columns, "max_tokens": 24, "precompute_ref_log_probs": False},
}
ZERO_CASES = ("plain", "max_tokens 24", "rpo", "aot", "accumulation")
UNLIMITED = 10**9
LONG_CASES = {
    f"max_tokens {most}, share {share}, accumulation {accumulation}": {
        **{"dataset": long_pairs, "pairs": 32, "max_tokens": most, "share": share},
        **{"accumulation": accumulation, "layers": 2, "max_length": None},
    }
    for most, share, accumulation in itertools.product((1024, 4096, UNLIMITED), ("prefix", "none"), (1, 4))
}
FSDP = {"fsdp": True, "fsdp_config": {"version": 2}}
FSDP_CASES = (
    *ZERO_CASES,
    *("live reference", "token statistics", "checkpointing", "one pair a rank", "bco running mean", "lora"),
    *("lora live", "lora live aot", "accumulation", "clipped", "tied", "evaluated", "best model"),
    *("experts", "experts aot", "experts, one pair a rank"),
    *("resumed", "resumed lora", "resumed tied", "synchronized each time"),
)
# One group of pairs a micro-batch: how attention in bfloat16 rounds depends on what is packed beside a response, and
# the reference pass packs other pairs together than a step does.
BF16_CASES = {
    "bf16": {"bf16": True, "max_tokens": 1},
    "bf16 live": {"bf16": True, "max_tokens": 1, "precompute_ref_log_probs": False},
}


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


def _named(names):
    return {name: CASES[name] for name in names}


# How several ranks share a model: (the cases to run so, options)
MODES = {
    "ddp": (CASES, {}),
    "long": (LONG_CASES, {}),
    "lists": (LIST_CASES, {}),
    "zero2": (_named(ZERO_CASES), {"deepspeed": _zero(2)}),
    "zero3": (_named(ZERO_CASES), {"deepspeed": _zero(3)}),
    "fsdp": ({**_named(FSDP_CASES), **BF16_CASES}, FSDP),
}


class Scattered(TorchDispatchMode):
    """Counts reduce-scatters of gradients."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "reduce_scatter" in str(func)
        return func(*args, **(kwargs or {}))


class Synchronizations(TrainerCallback):
    """Counts gradient synchronizations (DistributedDataParallel's buckets or FSDP2's units) and inspects shards."""

    count = 0
    calls = 0  # forwards that train
    shards = ()  # of each step: the module's units, this rank's and all numbers of its parameters

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.wrapped = self.trainer.model_wrapped
        if type(self.wrapped) is DistributedDataParallel:
            self.wrapped.register_comm_hook(self, self.reduced)

    def called(self, module, args):
        self.calls += module.training

    def on_step_begin(self, args, state, control, **kwargs):
        if isinstance(self.wrapped, FSDPModule):
            self.exchanges = Scattered()
            self.exchanges.__enter__()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if isinstance(self.wrapped, FSDPModule):
            self.exchanges.__exit__(None, None, None)
            self.count += self.exchanges.count
            weights = list(self.wrapped.parameters())
            assert all(type(weight) is DTensor for weight in weights)
            assert all(type(weight.grad) is DTensor for weight in weights if weight.requires_grad)
            units = sum(isinstance(module, FSDPModule) for module in self.wrapped.modules())
            local = sum(weight.to_local().numel() for weight in weights)
            self.shards += ((units, local, sum(weight.numel() for weight in weights)),)

    @staticmethod
    def reduced(self, bucket):
        self.count += 1
        return allreduce_hook(None, bucket)


class RunsOutOfMemory:
    """Makes a model's forward run out of memory on one rank for micro-batches above a number of positions."""

    def __init__(self, model, most, rank):
        self.most, self.rank, self.model = most, rank, model
        model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module, args, kwargs):
        here = int(os.environ.get("RANK", 0)) == self.rank
        if here and module.training and kwargs["packed"].num_tokens > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")


def train(folder, ranks, *, resumed=False, **options):
    """Train some steps of SGD on `pairs` pairs each; return the values to compare. Resumed: repeat the second half."""
    trainer, synchronizations = trainer_of(folder, ranks, **options)
    trainer.train()
    if resumed:
        trainer, synchronizations = trainer_of(folder, ranks, **options)
        trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-5")
    logs = [{k: v for k, v in log.items() if k in COMPARED} for log in trainer.state.log_history if "loss" in log]
    metrics = {k: v for k, v in trainer.evaluate().items() if k.removeprefix("eval_") in COMPARED}
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped if trainer.is_deepspeed_enabled else trainer.model)
    again = ""
    if isinstance(trainer.model, FSDPModule):
        with pytest.raises(ValueError) as error:
            trainer.train()
        again = str(error.value)
    trainer.save_model(f"{folder}/end")
    trainer.ranks.barrier()
    (saved,) = Path(folder, "end").glob("*.safetensors")
    return {
        "logs": logs,
        "eval": metrics,
        "weights": {k: v.clone() for k, v in (state or {}).items()},
        "saved": load_file(saved),
        "synchronizations": synchronizations.count,
        "again": again,
        "calls": synchronizations.calls,
        "shards": synchronizations.shards,
        "wrapped": type(synchronizations.wrapped).__name__,
        "max_tokens": trainer.max_tokens,
    }


# What a run of comparisons trains with unless its case says otherwise.
TRAINING = {
    "optim": "sgd",
    "learning_rate": 0.05,
    "max_steps": 10,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}


def trainer_of(
    folder, ranks, *, dataset=shared_prompts, pairs=8, accumulation=1, lora=False, fails=None, family="llama", layers=3,
    **options,
):  # fmt: skip
    """Return the trainer of a case, and the object that observes it."""
    peft_config = None
    if lora:
        from peft import LoraConfig

        peft_config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model, synchronizations = tiny_model(family, num_hidden_layers=layers), Synchronizations()
    model.register_forward_pre_hook(synchronizations.called)
    if fails is not None:
        RunsOutOfMemory(model, **fails)
    trainer = DPOTrainer(
        model,
        args=DPOConfig(
            output_dir=str(folder),
            per_device_train_batch_size=pairs // ranks // accumulation,
            gradient_accumulation_steps=accumulation,
            per_device_eval_batch_size=4 // ranks,
            **{**TRAINING, **options},
        ),
        train_dataset=dataset(),
        eval_dataset=tiny_dataset(7, seed=3),
        processing_class=tiny_tokenizer(),
        peft_config=peft_config,
        callbacks=[synchronizations],
    )
    synchronizations.trainer = trainer
    return trainer, synchronizations


COMPARED = (
    "loss",
    "aux_loss",
    "grad_norm",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "lengths/rejected",
    "entropy",
)


def saved_by_the_first(model, folder):
    """Save a model on the first rank, the only one that transformers writes on; the others wait."""
    model.save_pretrained(folder)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def processors_as_gpus():
    """Let accelerate take these processes for GPUs, the only ones that it shards over; all the rest is its own code.

    It asks _prepare_backend what is there, and for GPUs makes the process group elsewhere than for processors.
    """
    torch.distributed.init_process_group("gloo")
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)


def without_shared_memory():
    """Let DeepSpeed's ranks talk by gloo alone: for processors it would first compile an extension, for a minute."""
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # the package has torch itself so named


def rank_main(rank, port, folder, world, run, cases, options):
    """Run every case on this rank, by a function like train, and write the results to a file."""
    become_rank(rank, world, port)
    if "fsdp" in options or "tensor_parallel_size" in options:
        processors_as_gpus()
    if "deepspeed" in options:
        without_shared_memory()
    sharing = options.get("tensor_parallel_size", 1) * options.get("sequence_parallel_size", 1)
    results = {
        name: run(f"{folder}/{name}", world // sharing, ddp_backend="gloo", **case, **options)
        for name, case in cases.items()
    }
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def on_two_ranks(folder, mode, run=train, modes=MODES, world=WORLD, apart=False):
    """Run a mode on two ranks, or another number, and return the results of each.

    Apart: every case in processes of its own. Where each makes new process groups, their threads, 300 of them after
    20 cases, would leave no time to the rest.
    """
    cases, options = modes[mode]
    results = [{} for _ in range(world)]
    for some in [{name: case} for name, case in cases.items()] if apart else [cases]:
        run_ranks(rank_main, (free_port(), str(folder), world, run, some, options), world)
        for rank, found in enumerate(results):
            found |= torch.load(folder / f"{rank}.pt", weights_only=False)
    return results


def two_ranks(mode, **other):
    """A fixture with the results of a mode on two ranks, or another number."""

    @pytest.fixture(scope="module")
    def results(tmp_path_factory):
        return on_two_ranks(tmp_path_factory.mktemp(mode), mode, **other)

    return results
