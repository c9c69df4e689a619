"""Predict a step of dpofast for every way of dividing a model over many GPUs, and choose the fastest that fits."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from bench.roofline.devices import HOST_BYTES_A_GPU, LINK_REACHED, USABLE_MEMORY
from bench.roofline.divided import Division, exchanges
from bench.roofline.layers import PRECISIONS
from bench.roofline.step import (
    ADAM_BYTES,
    CLIP_BYTES,
    DPOFAST,
    GATHERED_LAYERS,
    LAST_BACKWARD,
    Predicted,
    Setting,
    predict_batches,
)
from bench.roofline.work import MicroBatch, Pairs, packed

TENSOR = (1, 2, 4, 8)
SEQUENCE = (1, 2, 4, 8, 16, 32, 64)
# Hidden states on their way to the processor's memory or back, of so many layers.
OFFLOADED_LAYERS = 2


@dataclass(frozen=True, kw_only=True)
class Divided(Predicted):
    """A predicted step of a divided model.

    Attributes:
        division, setting: what was predicted; of the setting, `checkpointing` and `max_tokens` are those chosen.
        offloaded: what gradient checkpointing keeps lies in the processor's memory.
        terms: seconds by what takes them: "computing"; what it does not hide of weights' and gradients' exchanges
            ("sharding") and of what goes to the processor's memory ("offloading"); and exchanges inside a group, which
            nothing hides ("sharing").
        memory: peak bytes of one GPU by what holds them.
        sent: bytes that leave one GPU in a step, by what is exchanged.
        host: bytes in the processor's memory for each GPU.
    """

    division: Division
    offloaded: bool
    sent: dict[str, float]
    host: float

    @property
    def fits(self) -> bool:
        """Whether both memories suffice."""
        return super().fits and self.host <= HOST_BYTES_A_GPU

    @property
    def tokens_per_second(self) -> float:
        """Tokens of both sequences of every pair, a second and GPU."""
        return self.setting.pairs.tokens / self.seconds / self.division.devices

    @property
    def name(self) -> str:
        """The division, and what of the activations is computed again or kept elsewhere."""
        return self.division.name + (", offloaded" if self.offloaded else ", recomputed" * self.setting.checkpointing)


@functools.cache
def _packed(pairs: Pairs, max_tokens: int, groups: int) -> list[MicroBatch]:
    """work.packed(), which every division into as many groups asks for."""
    return packed(pairs, max_tokens, groups)


def divisions(setting: Setting) -> Iterator[Division]:
    """Those that heads, pairs and GPUs allow; tensor and sequence parallelism exclude each other."""
    devices = setting.devices
    for tensor, sequence in [(k, 1) for k in TENSOR] + [(1, k) for k in SEQUENCE[1:]]:
        for sharded in (False, True):
            division = Division(devices=devices, tensor=tensor, sequence=sequence, sharded=sharded)
            if (
                devices % division.sharing
                or len(setting.pairs) < division.groups
                or not division.fits_heads(setting.model)
            ):
                continue
            if sharded and division.shards == 1 or tensor > 1 and not sharded and division.groups > 1:
                continue  # nothing to divide; groups of tensor parallelism are sharded between them
            yield division


def model_bytes(setting: Setting, division: Division) -> dict[str, float]:
    """Weights, with those gathered at a time, gradients and optimizer state of one GPU.

    All that train are kept in float32, a frozen model in bfloat16; gathered are bfloat16 weights, and gradients of them
    before they are scattered.
    """
    gathered = 2 * division.gathered(setting.model, GATHERED_LAYERS)
    trained = division.trained(setting.model, setting.lora)
    stored = 2 * division.weights(setting.model) + 4 * trained if setting.lora else 4 * trained
    return {
        "weights": stored + gathered,
        "gradients": 4 * trained + (0 if setting.lora else gathered),
        "optimizer": 8 * trained,
    }


def predict(setting: Setting, division: Division, *, offloaded: bool = False) -> Divided:
    """Predict a step of dpofast so divided; `setting.precision` and `setting.sharded` are not read."""
    model, device, lora = setting.model, setting.device, setting.lora
    name = "bfloat16" if lora or division.shards > 1 else "autocast"
    precision = PRECISIONS[name]
    groups = _packed(setting.pairs, setting.max_tokens, division.groups)
    batches = [tuple(division.row_part(call) for call in batch) for batch in groups]
    part = replace(setting, model=division.layer_part(model), devices=1, sharded=False, precision=name)
    alone = predict_batches(part, DPOFAST, batches)
    trained = division.trained(model, lora)
    steps = len(batches)
    adam = (ADAM_BYTES + CLIP_BYTES + 12 * (steps - 1)) * trained / device.bytes
    computing = sum(alone.terms.values()) - alone.terms["optimizer"] + adam

    moved = list(
        exchanges(
            model,
            division,
            sum(call.positions for batch in groups for call in batch),
            micro_batches=steps,
            lora=lora,
            repeated=setting.checkpointing,
            width=precision.product,
            reference=1 / setting.epochs,
        )
    )
    of_weights = sum(e.seconds(device, division) for e in moved if e.what in ("weights", "gradients"))
    of_group = sum(e.seconds(device, division) for e in moved if e.what not in ("weights", "gradients"))
    hidden = computing if division.shards > 1 else LAST_BACKWARD * computing / steps

    largest = max(call.positions for batch in batches for call in batch)
    kept = division.kept_rows(model, largest, precision.product) * (1 if setting.checkpointing else model.layers)
    activations, host, transferred = alone.memory["activations"] + kept, 0.0, 0.0
    if offloaded:
        states = largest * model.hidden * precision.stream
        host = model.layers * states
        activations -= max(0, model.layers - OFFLOADED_LAYERS) * states
        positions = sum(call.positions for batch in batches for call in batch)
        transferred = 2 * model.layers * positions * model.hidden * precision.stream / (device.host * LINK_REACHED)
    return Divided(
        division=division,
        setting=setting,
        offloaded=offloaded,
        terms={
            "computing": computing,
            "sharding": max(0.0, of_weights - hidden),
            "sharing": of_group,
            "offloading": max(0.0, transferred - computing),
        },
        memory={
            **model_bytes(setting, division),
            "activations": activations,
            "head": alone.memory["logits"],
        },
        sent={e.what: e.sent for e in moved},
        host=host,
    )


def each_division(setting: Setting) -> list[Divided]:
    """For each division the fastest step that fits, or the one that needs least; the fastest of those that fit first.

    Tried are micro-batches of max_tokens positions a GPU and of fewer, and what is saved kept, computed again, or
    offloaded. Where weights, gradients and optimizer state fill a GPU's memory alone, only the least is.
    """
    found = []
    for division in divisions(setting):
        sizes = [max(1, setting.max_tokens * division.sequence >> halved) for halved in range(4)]
        ways = [(False, False), (True, False), (True, True)]
        if sum(model_bytes(setting, division).values()) > USABLE_MEMORY * setting.device.memory:
            sizes, ways = sizes[-1:], ways[-1:]
        tried = [
            predict(replace(setting, max_tokens=size, checkpointing=repeated), division, offloaded=offloaded)
            for size in _differing(setting, division, sizes)
            for repeated, offloaded in ways
        ]
        fitting = [each for each in tried if each.fits]
        found.append(min(fitting, key=lambda each: each.seconds) if fitting else min(tried, key=lambda each: each.peak))
    return sorted(found, key=lambda each: (not each.fits, each.seconds if each.fits else each.peak))


def _differing(setting: Setting, division: Division, sizes: list[int]) -> list[int]:
    """Those sizes of micro-batches that give another number of them: none is smaller than a pair."""
    counts = {len(_packed(setting.pairs, size, division.groups)): size for size in reversed(sizes)}
    return sorted(counts.values(), reverse=True)
