"""Runs that write checkpoints on some ranks, are killed there, and are resumed on others.

Each trains ten steps; a checkpoint after five lies between two logs.
"""

import os
import warnings
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemWriter

from dpofast.checkpointing import sharded
from tests.support.kill_runs import POINTS, after, before, die, instead
from tests.support.rank_processes import free_port, rank_context, run_ranks
from tests.support.ranks_cases import rank_main, trainer_of

SAVING = {
    **{"save_strategy": "steps", "save_steps": 5, "logging_steps": 2, "optim": "adamw_torch", "learning_rate": 1e-3},
}
SHARDED = {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}}
MODES = {"sharded": SHARDED, "fsdp": {"fsdp": True, "fsdp_config": {"version": 2}}, "ddp": {}}
CASES = {
    "full": {},
    "tied": {"family": "llama-tied"},
    "lora": {"lora": True},
}
COUNTED = ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "lengths/rejected", "step")


def half_of_the_shards(original, args, kwargs):
    original(*args, **kwargs)
    writer = args[0]
    path = next(Path(writer.path).glob("__1_*"))
    path.write_bytes(path.read_bytes()[:100])
    die()


KILLS = {
    **{name: POINTS[name] for name in ("step", "fsync")},
    # of the checkpoint's own folder and files: torch.distributed.checkpoint renames and pickles its own
    **{name: (*POINTS[name], lambda path, *_: Path(path).is_dir()) for name in ("rename", "renamed")},
    "pickle": (*POINTS["pickle"], lambda state, file, *_: isinstance(file, (str, os.PathLike))),
    "shards": (FileSystemWriter, "write_data", half_of_the_shards),
    "before shards": (sharded, "save", before),
    "after shards": (sharded, "save", after),
}


def run(folder, ranks, *, source=None, kill=None, **options):
    """Train ten steps, or from a checkpoint of five, and save the model; return what to compare.

    kill: a point, at which time, and which rank kills itself there.
    """
    trainer, _ = trainer_of(folder, ranks, **SAVING, **options)
    if kill and trainer.args.process_index == kill[2]:
        owner, name, action, *counted = KILLS[kill[0]]
        instead(owner, name, action, kill[1], *counted)
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
    }


def whole(weight):
    weight = weight.detach()
    return (weight.full_tensor() if hasattr(weight, "device_mesh") else weight).clone()


def on_ranks(folder, world, cases, options):
    """Run cases on so many ranks, one after another; return the results of each."""
    folder.mkdir(parents=True, exist_ok=True)
    run_ranks(rank_main, (free_port(), str(folder), world, run, cases, options), world)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def killed_on_ranks(folder, world, case, options):
    """Start a run of which one rank kills itself; return the exit codes of all, None for one that goes on."""
    arguments = (free_port(), str(folder), world, run, {"full": case}, options)
    processes = [rank_context().Process(target=rank_main, args=(rank, *arguments)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def resumed(folder, world, source, options, case=None):
    """The end of a run that is resumed from a checkpoint: on one process, or the first of several ranks."""
    case = {**(case or {}), "source": str(source)}
    return run(str(folder), 1, **case) if world == 1 else on_ranks(folder, world, {"full": case}, options)[0]["full"]
