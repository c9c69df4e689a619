"""FSDP2 checkpoints: whole weights as safetensors, and the optimizer's state gathered on the first rank.

accelerate's own functions would write the weights as a pickle, and refuse to load the optimizer's state where a weight
has none, as no gradient had reached it before the checkpoint.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import StateDictType

from dpofast.checkpointing.weights import converted_weights, saved_once, stored_names
from dpofast.checkpointing.zero import whole

# What wrappers of modules put into the names of parameters, and not into those of a state dict.
_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")


def without_wrappers(name: str) -> str:
    """Returns the name of a parameter or buffer as a state dict has it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def first_shard(model: nn.Module) -> tuple[str, Any] | None:
    """Returns the name and the value of the first sharded parameter (a DTensor), or None where all are whole."""
    return next(((name, w) for name, w in model.named_parameters() if hasattr(w, "device_mesh")), None)


def gathered(weight: Any) -> Tensor:
    """The whole of a sharded tensor, a DTensor or one that ZeRO-3 has partitioned; any other as it is. A collective.

    A DTensor is gathered on its mesh's kind of device.
    """
    if hasattr(weight, "ds_id"):
        with whole(weight):
            return weight.detach().clone()  # type: ignore[no-any-return]
    if not hasattr(weight, "full_tensor"):
        return weight  # type: ignore[no-any-return]
    return weight.to(weight.device_mesh.device_type).full_tensor()  # type: ignore[no-any-return]


def save_optimizer(trainer: Any, folder: str) -> None:
    """Gather the optimizer's state and write it and the scheduler's state on the first rank. A collective."""
    from accelerate.utils import save_fsdp_optimizer

    plugin = trainer.accelerator.state.fsdp_plugin
    save_fsdp_optimizer(plugin, trainer.accelerator, trainer.optimizer, trainer.model, folder)
    save_scheduler(trainer, folder)


def save_scheduler(trainer: Any, folder: str) -> None:
    """Write the scheduler's state on the first rank."""
    if trainer.args.should_save:
        torch.save(trainer.lr_scheduler.state_dict(), Path(folder, "scheduler.pt"))


def load_scheduler(trainer: Any, folder: str) -> None:
    """Load what save_scheduler wrote."""
    trainer.lr_scheduler.load_state_dict(torch.load(Path(folder, "scheduler.pt"), weights_only=True))


@contextlib.contextmanager
def whole_model_saved(accelerator: Any) -> Iterator[None]:
    """Inside, Trainer.save_model gathers FSDP's weights also if checkpoints are sharded, where it would do nothing."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        yield
        return
    kind, plugin.state_dict_type = plugin.state_dict_type, StateDictType.FULL_STATE_DICT
    try:
        yield
    finally:
        plugin.state_dict_type = kind


def load_optimizer(trainer: Any, folder: str) -> None:
    """Load what save_optimizer wrote into each rank's shards, and the scheduler's state. A collective.

    A weight without saved state, which no gradient had reached, has none afterwards either, as on one process.

    Raises:
        ValueError: on every rank; there is no such file, or it is of an optimizer of other weights.
    """
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    model, optimizer = trainer.model, trainer.optimizer
    # Names of each group's weights, in the optimizer's order. Asking gives every weight a state, as of a step on zeros.
    own: Any = get_optimizer_state_dict(model, optimizer)["param_groups"]
    here = [group["params"] for group in own]
    saved: dict[str, Any] = {}

    def read() -> tuple[list[dict[str, Any]], set[str]] | None:
        if trainer.args.process_index != 0:
            return None
        path = Path(folder, "optimizer.bin")
        if not path.is_file():
            raise ValueError(
                f"{folder}: expected the optimizer's state of a run under FSDP, optimizer.bin, which is not there: "
                "resume with the launcher's options that the checkpoint was written with"
            )
        saved.update(torch.load(path, map_location="cpu", weights_only=True))
        check_groups(path, [group["params"] for group in saved["param_groups"]], here)
        return saved["param_groups"], {name for name, state in saved["state"].items() if state}

    groups, stateful = trainer._together(read)
    if stateful:
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
        set_optimizer_state_dict(model, optimizer, saved, options=options)
    else:  # torch would look for the device of the states
        optimizer.load_state_dict({"state": {}, "param_groups": groups})
    for group, names in zip(optimizer.param_groups, here, strict=True):
        for weight, name in zip(group["params"], names, strict=True):
            if name not in stateful:
                optimizer.state.pop(weight, None)
    load_scheduler(trainer, folder)


def load_whole_optimizer(trainer: Any, folder: str) -> bool:
    """Load what save_optimizer wrote into a run whose weights are whole. Returns whether there was any.

    Raises:
        ValueError: it is of an optimizer of other weights.
    """
    path = Path(folder, "optimizer.bin")
    if not path.is_file():
        return False
    saved = torch.load(path, map_location="cpu", weights_only=True)
    load_named(trainer.model, trainer.optimizer, saved["param_groups"], saved["state"], path)
    load_scheduler(trainer, folder)
    return True


def load_named(
    model: nn.Module, optimizer: Any, groups: list[dict[str, Any]], states: dict[str, Any], path: Path
) -> None:
    """Load options and states that are by the names of weights; those without a state have none afterwards.

    Args:
        model: whose weights are optimized.
        optimizer: to load into.
        groups: its options, with the names of weights as params.
        states: by the name of a weight.
        path: for messages.

    Raises:
        ValueError: they are of an optimizer of other weights.
    """
    here = list(group_names(model, optimizer))
    check_groups(path, [group["params"] for group in groups], here)
    count = 0
    state, options = {}, []
    for names, theirs in zip(here, groups, strict=True):
        options.append({**theirs, "params": list(range(count, count + len(names)))})
        state.update({count + place: states[name] for place, name in enumerate(names) if states.get(name)})
        count += len(names)
    optimizer.load_state_dict({"state": state, "param_groups": options})


def group_names(model: nn.Module, optimizer: Any) -> Iterator[list[str]]:
    """Yields the names of the weights of each of an optimizer's groups, in its order."""
    names = {weight: without_wrappers(name) for name, weight in model.named_parameters()}
    for group in optimizer.param_groups:
        yield [names[weight] for weight in group["params"]]


def check_groups(path: Path, there: list[list[str]], here: list[list[str]]) -> None:
    """Check that an optimizer's groups have the weights that a checkpoint's have, by name.

    Raises:
        ValueError: they have not.
    """
    if list(map(set, there)) != list(map(set, here)):
        unlike = sorted(set(chain(*there)) ^ set(chain(*here)))
        way = f"not in both: {unlike[:3]}. Train the weights that were trained before"
        if not unlike:
            way = (
                "the same weights in all. Tensor parallelism puts divided and whole weights of an adapter into groups "
                "of their own: resume with the tensor_parallel_size of before"
            )
        raise ValueError(
            f"{path}: expected groups of {list(map(len, here))} weights as in this run, got "
            f"{list(map(len, there))}; {way}"
        )


def load_weights(model: Any, folder: str) -> None:
    """Load the weights of a checkpoint's safetensors (of a model or an adapter) into each rank's shards.

    Raises:
        ValueError: weights are missing in the files, or the model does not have them.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    names = stored_names(model)
    converted = converted_weights(model, folder)
    found = {} if converted is None else saved_once(model, converted)
    if converted is None:
        for path in [*Path(folder).glob("model*.safetensors"), *Path(folder).glob("adapter_model.safetensors")]:
            found.update(load_file(path))
    missing, unknown = sorted(names.keys() - found.keys()), sorted(found.keys() - names.keys())
    if missing or unknown:
        raise ValueError(
            f"{folder}: expected the weights of {type(model).__name__} in its safetensors, "
            f"{len(missing)} are missing {missing[:3]} and {len(unknown)} unknown {unknown[:3]}"
        )
    state: dict[str, Any] = {names[name]: tensor for name, tensor in found.items()}
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, strict=False))
