"""How a model and its rows are divided over GPUs: bytes of one GPU, and what it exchanges in a step.

Three ways, which bench.scale counts on processors (tests/bench/test_scale.py compares): every GPU has a copy of the
weights (DDP) or a share of them that is gathered layer by layer (FSDP2); groups of `tensor` GPUs divide each layer;
groups of `sequence` GPUs divide each row. GPUs of a group have the same pairs, groups have different ones.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from bench.roofline.devices import GPUS_A_NODE, LINK_REACHED, Device
from bench.roofline.models import ModelShape
from bench.roofline.work import Call

# All-reduces of hidden states in a layer: of what o and down return; in the backward of what q, k, v, gate and up took,
# each for itself; and where the forward is repeated, which stops before down, of o again. The embedding adds one.
FORWARD_REDUCTIONS, BACKWARD_REDUCTIONS, REPEATED_REDUCTIONS = 2, 5, 1


@dataclass(frozen=True, kw_only=True)
class Division:
    """One way to divide a model and its rows.

    Attributes:
        devices: GPUs, eight to a node; those of a group are neighbours.
        tensor: GPUs that divide each layer, and the vocabulary of embedding and head.
        sequence: GPUs that divide each row.
        sharded: weights, gradients and optimizer state are divided among all GPUs that have the same part of a layer.
    """

    devices: int
    tensor: int = 1
    sequence: int = 1
    sharded: bool = True

    @property
    def sharing(self) -> int:
        """GPUs that have the same pairs."""
        return self.tensor * self.sequence

    @property
    def groups(self) -> int:
        """What a step's pairs are divided among."""
        return self.devices // self.sharing

    @property
    def shards(self) -> int:
        """GPUs among which a GPU's part of each layer is divided again."""
        return self.devices // self.tensor if self.sharded else 1

    @property
    def name(self) -> str:
        """As docs/several_gpus.md calls it."""
        kinds = [f"TP {self.tensor}"] * (self.tensor > 1) + [f"SP {self.sequence}"] * (self.sequence > 1)
        if self.sharded and self.shards > 1:
            return " x ".join([*kinds, "FSDP2"])
        return " x ".join([*kinds, *(["DDP"] if self.groups > 1 or not kinds else [])])

    def fits_heads(self, model: ModelShape) -> bool:
        """Whether the model's heads can be divided so; sequence parallelism copies keys where there are too few."""
        divided = all(size % self.tensor == 0 for size in (model.heads, model.kv_heads, model.intermediate))
        keys, ranks = model.kv_heads, self.sequence
        return divided and model.heads % ranks == 0 and (keys % ranks == 0 or ranks % keys == 0)

    def layer_part(self, model: ModelShape) -> ModelShape:
        """What one GPU computes of each layer and of the head."""
        k = self.tensor
        return replace(
            model,
            heads=model.heads // k,
            kv_heads=model.kv_heads // k,
            intermediate=model.intermediate // k,
            vocab=-(-model.vocab // k),
        )

    def row_part(self, call: Call) -> Call:
        """What one GPU computes of each row: attention by heads, all else by positions."""
        k = self.sequence
        sizes = {name: -(-getattr(call, name) // k) for name in ("positions", "targets", "visible", "gathered")}
        return replace(call, width=sizes["positions"], **sizes)

    def weights(self, model: ModelShape) -> float:
        """Weights of one GPU, between steps."""
        return self._held(model) / self.shards

    def _held(self, model: ModelShape) -> float:
        part = self.layer_part(model)
        head = 0 if model.tied else part.vocab * model.hidden
        norms = model.hidden * (2 * model.layers + 1)
        return part.layers * part.layer_weights() + part.vocab * model.hidden + head + norms

    def trained(self, model: ModelShape, lora: int) -> float:
        """Those that train: of an adapter on every linear layer, or all."""
        return self.layer_part(model).lora_weights(lora) / self.shards if lora else self.weights(model)

    def gathered(self, model: ModelShape, layers: int) -> float:
        """Weights gathered at a time beyond a GPU's own: some layers, or the embedding or head where that is more."""
        if self.shards == 1:
            return 0.0
        part = self.layer_part(model)
        return max(layers * (part.layer_weights() + 2 * model.hidden), part.vocab * model.hidden)

    def kept_rows(self, model: ModelShape, positions: float, width: int) -> float:
        """Bytes that a layer saves on one GPU since rows are exchanged for heads, of its own number of positions.

        Keys and values arrive in one tensor with the queries, which are saved, and results leave in another than the
        one that the next product takes.
        """
        if self.sequence == 1:
            return 0.0
        return positions * (model.queries + 2 * model.keys * self.key_copies(model)) * width

    def key_copies(self, model: ModelShape) -> int:
        """How many GPUs of a group that divides rows have the same key/value head."""
        return max(1, self.sequence // model.kv_heads)


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """One kind of message of a step.

    Attributes:
        what: "weights" gathered, "gradients", "hidden" states reduced in a tensor-parallel group, or "rows" exchanged
            for heads in a sequence-parallel one.
        size: bytes of the whole tensors of all calls, as one rank of the group has them after (or before) the exchange.
        ranks: GPUs that exchange.
        times: 1, or 2 for an all-reduce: (ranks - 1) / ranks of the size leaves each GPU so often.
    """

    what: str
    size: float
    ranks: int
    times: int = 1

    @property
    def sent(self) -> float:
        """Bytes that at least leave each GPU."""
        return self.times * self.size * (self.ranks - 1) / self.ranks

    def seconds(self, device: Device, division: Division) -> float:
        """Time over the links of a node or over its network, the slower of the two.

        Weights and gradients that several GPUs of a node exchange with other nodes cross the network once, over the
        adapters of all of them; rows and hidden states of each GPU cross on its own.
        """
        if self.what in ("weights", "gradients"):
            nodes = math.ceil(division.devices / GPUS_A_NODE)
            alike = GPUS_A_NODE // min(division.tensor, GPUS_A_NODE)  # GPUs of a node with the same part
            adapters = min(alike, self.ranks) if nodes > 1 else 1
        else:
            nodes, adapters = math.ceil(self.ranks / GPUS_A_NODE), 1
        inside = self.sent / device.link
        between = self.times * self.size * (nodes - 1) / nodes / (device.network * adapters)
        return max(inside, between) / LINK_REACHED


def exchanges(
    model: ModelShape,
    division: Division,
    positions: float,
    *,
    micro_batches: float = 1,
    lora: int = 0,
    repeated: bool = False,
    width: int = 2,
    reference: float = 0.0,
) -> Iterator[Exchange]:
    """What one GPU exchanges in a step.

    Args:
        model: the shape.
        division: over which GPUs.
        positions: of its group in the whole step, before rows are divided.
        micro_batches: weights are gathered, and gradients scattered, in each of them.
        lora: the adapter's rank, 0 where all weights train.
        repeated: gradient checkpointing computes layers again.
        width: bytes of a gathered weight and of hidden states.
        reference: forwards of a reference pass for each forward of a step.
    """
    held = division._held(model)
    if division.shards > 1:
        embedding = division.layer_part(model).vocab * model.hidden if not model.tied else 0
        passes = (2 + reference) * held - embedding  # the backward does not read the embedding
        yield Exchange(what="weights", size=micro_batches * passes * width, ranks=division.shards)
        trained = division.trained(model, lora) * division.shards
        yield Exchange(what="gradients", size=micro_batches * 4 * trained, ranks=division.shards)
    elif (copies := division.devices // division.tensor) > 1:
        yield Exchange(what="gradients", size=4 * division.trained(model, lora), ranks=copies, times=2)
    if (k := division.tensor) > 1:
        calls = FORWARD_REDUCTIONS * (1 + reference) + BACKWARD_REDUCTIONS + REPEATED_REDUCTIONS * repeated
        states = positions * model.hidden * width
        yield Exchange(what="hidden", size=(calls * model.layers + 1 + reference) * states, ranks=k, times=2)
    if (k := division.sequence) > 1:
        each = 2 * model.queries + 2 * model.keys * division.key_copies(model)
        calls = 2 + repeated + reference
        yield Exchange(what="rows", size=calls * model.layers * positions / k * each * width, ranks=k)
