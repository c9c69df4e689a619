"""Runs that write checkpoints on some ranks, and runs that resume them on others: started by tests of checkpointing."""

import warnings
from pathlib import Path

import torch

from tests.support.rank_processes import free_port, run_ranks
from tests.support.ranks_cases import rank_main, trainer_of

# Logs of two steps and a checkpoint after five: sums of the sixth log are in the checkpoint.
SAVING = {
    **{"save_strategy": "steps", "save_steps": 5, "logging_steps": 2, "optim": "adamw_torch", "learning_rate": 1e-3},
}
SHARDED = {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}}
WHOLE = {"fsdp": True, "fsdp_config": {"version": 2}}
CASES = {
    "full": {},
    "tied": {"family": "llama-tied"},
    "lora": {"lora": True},
}
COUNTED = ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "lengths/rejected", "num_tokens", "step")


def run(folder, ranks, *, source=None, **options):
    """Train ten steps, or from a checkpoint of five, and save the model; return what to compare."""
    trainer, _ = trainer_of(folder, ranks, **SAVING, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train(resume_from_checkpoint=source)
    trainer.save_model(f"{folder}/end")
    trainer.ranks.barrier()
    return {
        "logs": [{k: log[k] for k in COUNTED} for log in trainer.state.log_history if "loss" in log],
        "weights": {name: whole(weight) for name, weight in trainer.model.named_parameters()},
        "stateful": sum(bool(state) for state in trainer.optimizer.state.values()),
        "warnings": [str(w.message) for w in caught if "resum" in str(w.message)],
        "files": sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()),
    }


def whole(weight):
    weight = weight.detach()
    return (weight.full_tensor() if hasattr(weight, "device_mesh") else weight).clone()


def on_ranks(folder, world, cases, options, function=run):
    """Run cases on so many ranks, one after another; return the results of each."""
    folder.mkdir(parents=True, exist_ok=True)
    run_ranks(rank_main, (free_port(), str(folder), world, function, cases, options), world)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]
