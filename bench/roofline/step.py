"""Predict one optimizer step of an implementation: seconds by what takes them, and bytes by what holds them."""

from collections import Counter
from dataclasses import dataclass, replace

from bench.roofline import heads, layers, work
from bench.roofline.calls import TERMS, Costs, Layers, Runner, add
from bench.roofline.devices import USABLE_MEMORY, Device, exchange_seconds
from bench.roofline.layers import AdapterBytes
from bench.roofline.models import ModelShape
from bench.roofline.work import MicroBatch, Pairs

# Bytes that AdamW moves for a trained weight: gradient, weight and both moments read, all but the gradient written; and
# those of the gradient's norm and of its clipping.
ADAM_BYTES, CLIP_BYTES = 28, 12
# Layers whose gathered weights are on a GPU at the same time, where they are sharded.
GATHERED_LAYERS = 2
# Of a step's computing, what may hide DDP's all-reduce: most of the last micro-batch's backward.
LAST_BACKWARD = 0.6


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """How one library runs a step.

    Attributes:
        name: for tables.
        layout: "packed" (prompts shared), "unshared" (packed, each prompt twice), "padded" or "separate".
        head: of bench/roofline/heads.py.
        layers: what its layers read and write, by the precision's name and value.
        adapter: what its LoRA layers read and write.
        cached: the reference runs once before training, else in every step.
    """

    name: str
    layout: str
    head: heads.Head
    layers: Layers
    adapter: AdapterBytes
    cached: bool

    def micro_batches(self, pairs: Pairs, max_tokens: int, devices: int) -> list[MicroBatch]:
        """Those of the device that computes most."""
        if self.layout in ("packed", "unshared"):
            return work.packed(pairs, max_tokens, devices, shared=self.layout == "packed")
        share = work.largest_share(pairs, devices)
        return (work.padded if self.layout == "padded" else work.separate)(share, max_tokens)


NAIVE = Implementation(
    name="naive",
    layout="separate",
    head=heads.full_logits,
    layers=lambda name, _: layers.EAGER[name],
    adapter=layers.PEFT,
    cached=False,
)
TRL = replace(NAIVE, name="trl", layout="padded", head=heads.trl)
LIGER = replace(TRL, name="liger", head=heads.liger, layers=lambda _, precision: layers.liger(precision))
DPOFAST = Implementation(
    name="dpofast",
    layout="packed",
    head=heads.dpofast,
    layers=lambda _, precision: layers.compiled(precision),
    adapter=layers.FUSED_LORA,
    cached=True,
)
IMPLEMENTATIONS = (NAIVE, TRL, LIGER, DPOFAST)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What every implementation is given.

    Attributes:
        model, pairs, device: what trains on what, and where.
        devices: how many.
        sharded: weights, gradients and optimizer are divided among them (FSDP2, ZeRO-3), else copied (DDP).
        lora: rank of an adapter on frozen weights, 0 to train all weights.
        precision: of PRECISIONS; sharded weights are stored in float32 and gathered in bfloat16.
        checkpointing: only the layers' inputs are kept, and the backward computes each layer again.
        max_tokens: positions of a micro-batch.
        epochs: how often a cached reference is used.
    """

    model: ModelShape
    pairs: Pairs
    device: Device
    devices: int = 1
    sharded: bool = False
    lora: int = 0
    precision: str = "bfloat16"
    checkpointing: bool = False
    max_tokens: int = 16_384
    epochs: int = 1

    @property
    def trained(self) -> int:
        """Weights that train."""
        return self.model.lora_weights(self.lora) if self.lora else self.model.weights()

    @property
    def stored(self) -> int:
        """Bytes of a stored weight: all that train are kept in float32."""
        return layers.PRECISIONS[self.precision].weight if self.lora else 4


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """What every prediction of a step has: of what setting, seconds and peak bytes of one device by what takes them."""

    setting: Setting
    terms: dict[str, float]
    memory: dict[str, float]

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return sum(self.terms.values())

    @property
    def peak(self) -> float:
        """Bytes of one device."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether the peak is within what a step may take of the device's memory."""
        return self.peak <= USABLE_MEMORY * self.setting.device.memory


@dataclass(frozen=True, kw_only=True)
class Prediction(Predicted):
    """One step of an implementation.

    Attributes:
        how: what was predicted.
        terms: seconds of one device by what takes them. "communication" is what computing does not hide; "host" is what
            the host takes to start the operators, beyond the device's own time.
        memory: peak bytes of one device by what holds them.
        gemm_flops: operations of one device's products, those of a reference that runs in the step or its share of a
            cached one included; attention's are not among them.
        positions: through the layers of one device, counted alike.
        micro_batches: of one device.
    """

    how: Implementation
    gemm_flops: float
    positions: float
    micro_batches: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens of both sequences of every pair, without pads, a second and device."""
        return self.setting.pairs.tokens / self.seconds / self.setting.devices

    @property
    def bound(self) -> str:
        """The largest term."""
        return max(self.terms, key=lambda name: self.terms[name])


def predict(setting: Setting, how: Implementation) -> Prediction:
    """Predict a step of an implementation, run as the setting says."""
    return predict_batches(setting, how, how.micro_batches(setting.pairs, setting.max_tokens, setting.devices))


def predict_batches(setting: Setting, how: Implementation, batches: list[MicroBatch], steps: int = 1) -> Prediction:
    """The same for given micro-batches of one device; those of several steps give the mean step."""
    precision = layers.PRECISIONS[setting.precision]
    run = Runner(
        model=setting.model,
        device=setting.device,
        layers=how.layers(setting.precision, precision),
        head=how.head,
        adapter=how.adapter,
        precision=precision,
        lora=setting.lora,
        checkpointing=setting.checkpointing,
        repeat_keys=how.layout in ("padded", "separate"),
    )
    step: Costs = Counter()
    reference: Costs = Counter()
    activations, logits = 0.0, 0.0
    for batch, count in Counter(batches).items():
        times = count / steps
        part, ref, kept, made = _micro_batch(run, batch, setting.checkpointing)
        add(step, part, times)
        add(reference, ref, times / (setting.epochs if how.cached else 1))
        activations, logits = max(activations, kept), max(logits, made)
    terms = {name: step[name] for name in TERMS}
    terms["reference"] = sum(reference[name] for name in TERMS)
    terms["optimizer"] = _optimizer_bytes(setting, len(batches) / steps) / setting.device.bytes
    computing = sum(terms.values())
    started = (step["operators"] + reference["operators"]) * setting.device.launch
    terms["host"] = max(0.0, started - computing)
    terms["communication"] = _exposed(setting, how, len(batches) / steps, max(computing, started))
    return Prediction(
        how=how,
        setting=setting,
        terms=terms,
        memory={**_model_bytes(setting, how), "activations": activations, "logits": logits},
        gemm_flops=step["gemm_flops"] + reference["gemm_flops"],
        positions=step["positions"] + reference["positions"],
        micro_batches=len(batches) / steps,
    )


def best(setting: Setting, how: Implementation) -> Prediction:
    """The fastest step that fits, over gradient checkpointing on or off and micro-batches of this or fewer tokens.

    Where none fits, the one that needs least.
    """
    sizes = {max(1, setting.max_tokens >> halved) for halved in range(5)}
    tried = [
        predict(replace(setting, max_tokens=max_tokens, checkpointing=checkpointing), how)
        for max_tokens in sorted(sizes, reverse=True)
        for checkpointing in (False, True)
    ]
    fitting = [prediction for prediction in tried if prediction.fits]
    return min(fitting, key=lambda p: p.seconds) if fitting else min(tried, key=lambda p: p.peak)


def _micro_batch(run: Runner, batch: MicroBatch, checkpointing: bool) -> tuple[Costs, Costs, float, float]:
    """Costs of a micro-batch and of the reference's forward of it; bytes of activations and of what logits need."""
    step: Costs = Counter()
    reference: Costs = Counter()
    activations = saved = largest = 0.0
    for call in batch:
        add(step, run.forward(call, adapter=True))
        if checkpointing:
            add(step, run.forward(call, adapter=True, again=True))
        add(step, run.backward(call))
        head = run.head_cost(call, grad=True)
        add(step, run.head_costs(head))
        add(step, Counter(positions=call.positions))
        add(reference, run.forward(call, adapter=False))
        add(reference, run.head_costs(run.head_cost(call, grad=False)))
        add(reference, Counter(positions=call.positions))
        activations += _activations(run, call.positions, checkpointing)
        saved += head.saved
        largest = max(largest, head.peak - head.saved)
    return step, reference, activations, saved + largest


def _activations(run: Runner, positions: int, checkpointing: bool) -> float:
    """Bytes alive between a forward of the layers and its backward."""
    every = run.layers.saved.total(run.model, positions)
    if not checkpointing:
        return every
    return every / run.model.layers + run.model.layers * positions * run.model.hidden * run.precision.stream


def _optimizer_bytes(setting: Setting, micro_batches: float) -> float:
    """What AdamW moves, and the additions of micro-batches' gradients, on one device."""
    each = ADAM_BYTES + CLIP_BYTES + 12 * (micro_batches - 1)
    return each * setting.trained / (setting.devices if setting.sharded else 1)


def _model_bytes(setting: Setting, how: Implementation) -> dict[str, float]:
    """Weights, gradients and optimizer of one device, with the copy that a live reference of a whole model needs."""
    shards = setting.devices if setting.sharded else 1
    model, stored = setting.model, setting.stored
    copies = 2 if not (how.cached or setting.lora) else 1
    weights = copies * stored * model.weights() / shards
    gradients = 4 * setting.trained / shards
    if setting.sharded:
        gathered = GATHERED_LAYERS * model.layer_weights() + model.hidden * model.vocab
        weights += 2 * gathered
        gradients += 0 if setting.lora else 2 * gathered
    if setting.lora:
        weights += 4 * setting.trained / shards
    return {"weights": weights, "gradients": gradients, "optimizer": 8 * setting.trained / shards}


def _exposed(setting: Setting, how: Implementation, micro_batches: float, computing: float) -> float:
    """Seconds of communication that computing does not hide."""
    device, devices, model = setting.device, setting.devices, setting.model
    if devices == 1:
        return 0.0
    if not setting.sharded:
        reduced = 2 * exchange_seconds(device, devices, 4 * setting.trained)
        return max(0.0, reduced - LAST_BACKWARD * computing / micro_batches)
    # 16-bit weights for every forward and backward, and gradients in float32 after every micro-batch.
    passes = 2 if how.cached else 3
    gathers = micro_batches * passes * exchange_seconds(device, devices, 2 * model.weights())
    scatters = micro_batches * exchange_seconds(device, devices, 4 * setting.trained)
    return max(0.0, gathers + scatters - computing)


def strategy(setting: Setting) -> Setting:
    """The setting with weights copied to every device where they fit with optimizer and gradients, sharded elsewhere.

    All weights that train are stored in float32: copied, they run under autocast; sharded, they are gathered in
    bfloat16, so that the layers compute in it throughout.
    """
    copied = replace(setting, sharded=False, precision="bfloat16" if setting.lora else "autocast")
    room = USABLE_MEMORY * setting.device.memory
    if setting.devices == 1 or sum(_model_bytes(copied, TRL).values()) <= 0.8 * room:
        return copied
    return replace(setting, sharded=True, precision="bfloat16")
