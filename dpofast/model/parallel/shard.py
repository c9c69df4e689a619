"""shard(): FSDP2 for a model that is only read, over all processes."""

from __future__ import annotations

from typing import Any

from torch import nn

from dpofast.model.parts import base_causal_lm, named_layers


def shard(model: nn.Module, mesh: Any) -> None:
    """Divide a model's weights among the processes of a mesh, for forwards without gradients. A collective.

    A forward gathers one unit at a time: a decoder layer, the embedding, the head (with tied weights one unit), and
    what is in none of these. It frees each of them afterwards.

    Args:
        model: whole, with the head attached, on any device; a unit at a time is moved to the mesh's.
        mesh: torch's DeviceMesh.

    Raises:
        ValueError: transformers names no layers of this model.
    """
    from torch.distributed.fsdp import fully_shard

    base: Any = base_causal_lm(model)
    named = named_layers(model)
    layers = [module for module in model.modules() if type(module).__name__ in named]
    if not layers:
        raise ValueError(
            f"fsdp: {type(base).__name__} has none of the layers that it names for sharding "
            f"({', '.join(sorted(named)) or 'it names none'}): leave fsdp out"
        )
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    ends: list[Any] = [[embedding, head]] if embedding.weight is head.weight else [embedding, head]
    for unit in (*layers, *ends):
        fully_shard(unit, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
