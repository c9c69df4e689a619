"""A decoder layer's products, bytes and saved bytes, for a number of tokens: what its forward and backward cost.

Products and the bytes of eager layers are counts: tests/bench/test_roofline.py runs transformers' Llama layers and
finds the same numbers. The bytes of compiled layers and of Liger's kernels are what their fusions must read and write,
and so a lower bound.
"""

from collections import Counter
from dataclasses import dataclass

from bench.roofline.models import ModelShape

Shapes = Counter[tuple[int, int, int]]
# Products of flash attention in units of the forward's two: its backward computes one of them again.
ATTENTION_BACKWARD = 2.5


@dataclass(frozen=True, kw_only=True)
class Bytes:
    """Bytes of one layer, for every token and unit of each width; weight: for every weight of its linear layers."""

    hidden: float
    intermediate: float
    queries: float
    keys: float
    head_dim: float = 0
    token: float = 0
    weight: float = 0

    def total(self, model: ModelShape, tokens: float) -> float:
        """Bytes of all layers of a model."""
        experts = max(model.experts_per_token, 1)
        each = (
            self.hidden * model.hidden
            + self.intermediate * model.intermediate * experts
            + self.queries * model.queries
            + self.keys * model.keys
            + self.head_dim * model.head_dim
            + self.token
        )
        return model.layers * (tokens * each + self.weight * model.layer_weights())


@dataclass(frozen=True, kw_only=True)
class LayerBytes:
    """What a layer's operators other than products and attention read and write, and what a forward keeps.

    Attributes:
        forward, backward: bytes read and written.
        saved: bytes alive after a forward, for the backward.
        operators: how many a forward and a backward start, products included, attention not.
    """

    forward: Bytes
    backward: Bytes
    saved: Bytes
    operators: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Bytes of an element of the residual stream, of what goes into products, and of a weight as it is stored."""

    stream: int
    product: int
    weight: int


PRECISIONS = {
    "float32": Precision(stream=4, product=4, weight=4),
    "bfloat16": Precision(stream=2, product=2, weight=2),
    # float32 weights under torch.autocast(bfloat16)
    "autocast": Precision(stream=4, product=2, weight=4),
}

# Counted: operators' inputs and outputs in transformers' Llama layers (5.23), run one by one.
EAGER = {
    "bfloat16": LayerBytes(
        forward=Bytes(hidden=84, intermediate=10, queries=20, keys=20, head_dim=8, token=48),
        backward=Bytes(hidden=214, intermediate=18, queries=32, keys=32, head_dim=8, token=80),
        saved=Bytes(hidden=16, intermediate=8, queries=4, keys=4, token=8),
        operators=(37, 70),
    ),
    "float32": LayerBytes(
        forward=Bytes(hidden=80, intermediate=20, queries=40, keys=40, head_dim=16, token=48),
        backward=Bytes(hidden=244, intermediate=36, queries=64, keys=64, head_dim=16, token=80),
        saved=Bytes(hidden=24, intermediate=16, queries=8, keys=8, token=8),
        operators=(33, 66),
    ),
    "autocast": LayerBytes(
        forward=Bytes(hidden=106, intermediate=10, queries=36, keys=30, head_dim=16, token=48, weight=6),
        backward=Bytes(hidden=286, intermediate=18, queries=58, keys=52, head_dim=16, token=80, weight=6),
        saved=Bytes(hidden=26, intermediate=8, queries=6, keys=6, token=8, weight=2),
        operators=(46, 85),
    ),
}


def compiled(precision: Precision) -> LayerBytes:
    """Layers under torch.compile: norms with the addition before them, rotary, SwiGLU, the last addition; each once."""
    s, w = precision.stream, precision.product
    cast = 2 * w if s != w else 0
    return LayerBytes(
        forward=Bytes(
            hidden=5 * s + 4 * w, intermediate=3 * w, queries=2 * w, keys=2 * w, weight=_weight_casts(precision)
        ),
        backward=Bytes(
            hidden=6 * s + 5 * w + cast, intermediate=5 * w, queries=2 * w, keys=2 * w, weight=_weight_casts(precision)
        ),
        saved=Bytes(
            hidden=2 * s + 2 * w, intermediate=3 * w, queries=2 * w, keys=2 * w, weight=_weight_copies(precision)
        ),
        operators=(12, 20),
    )


def liger(precision: Precision) -> LayerBytes:
    """Layers with Liger's RMSNorm, rotary and SwiGLU kernels; additions and casts are operators of their own."""
    s, w = precision.stream, precision.product
    casts = 5 * (s + w) if s != w else 0
    return LayerBytes(
        forward=Bytes(
            hidden=4 * s + 2 * (w + 2 * s) + casts,
            intermediate=3 * w,
            queries=2 * w,
            keys=2 * w,
            weight=_weight_casts(precision),
        ),
        backward=Bytes(
            hidden=6 * s + 15 * s + casts,
            intermediate=5 * w,
            queries=2 * w,
            keys=2 * w,
            weight=_weight_casts(precision),
        ),
        saved=Bytes(
            hidden=4 * s + (5 * w if s != w else 0),
            intermediate=3 * w,
            queries=2 * w,
            keys=2 * w,
            weight=_weight_copies(precision),
        ),
        operators=(13, 25),
    )


def _weight_casts(precision: Precision) -> int:
    """Bytes of casting one stored weight for the products, or its gradient back."""
    return precision.weight + precision.product if precision.weight != precision.product else 0


def _weight_copies(precision: Precision) -> int:
    return precision.product if precision.weight != precision.product else 0


@dataclass(frozen=True, kw_only=True)
class AdapterBytes:
    """What LoRA layers read and write beside the base layers and their own products, and what frozen norms save.

    Attributes:
        forward_out: passes of a forward over the outputs of a layer's linear layers.
        backward_out, backward_in: passes of a backward over their outputs and inputs.
        operators: how many more a layer's forward and backward start.
    """

    forward_out: int
    backward_out: int
    backward_in: int
    operators: tuple[int, int]

    def total(self, model: ModelShape, tokens: float, width: int) -> tuple[float, float]:
        """Bytes of a forward and of a backward of all layers."""
        linears = model.attention_linears() + model.mlp_linears() * max(model.experts_per_token, 1)
        inputs, outputs = (sum(sides) for sides in zip(*linears, strict=True))
        forward = self.forward_out * outputs
        backward = self.backward_out * outputs + self.backward_in * inputs - FROZEN_NORMS * model.hidden
        return model.layers * tokens * width * forward, model.layers * tokens * width * backward


# Passes over the hidden states that a layer's two norms make for the gradients of their weights.
FROZEN_NORMS = 8
# Counted, of PEFT 0.21 run operator by operator: y + scaling * (...), and the sums of two gradients of each input.
PEFT = AdapterBytes(forward_out=5, backward_out=2, backward_in=3, operators=(28, 31))
# dpofast/model/lora.py: products are added in place to y and to the input's gradient, which reads those once.
FUSED_LORA = AdapterBytes(forward_out=1, backward_out=0, backward_in=1, operators=(14, 31))


def forward_gemms(model: ModelShape, tokens: int, lora: int = 0) -> Shapes:
    """The products (M, K)·(K, N) of a forward of all layers, by shape. lora: rank of an adapter, 0 for none."""
    found: Shapes = Counter()
    for rows, inputs, outputs, count in _linears(model, tokens):
        found[rows, inputs, outputs] += count
        if lora:
            found[rows, inputs, lora] += count
            found[rows, lora, outputs] += count
    if model.experts:
        found[tokens, model.hidden, model.experts] += model.layers
    return found


def recomputed_gemms(model: ModelShape, tokens: int, lora: int = 0) -> Shapes:
    """The products that gradient checkpointing runs again in all layers: it stops before the last, which nothing needs.

    The last is `down`, or the second product of its adapter. Experts run whole.
    """
    found = forward_gemms(model, tokens, lora)
    if not model.experts:
        inputs, outputs = model.mlp_linears()[-1]
        found[tokens, lora or inputs, outputs] -= model.layers
    return +found


def backward_gemms(model: ModelShape, tokens: int, lora: int = 0, *, embedding_grad: bool = True) -> Shapes:
    """The products of a backward of all layers, by shape, of all weights or of an adapter on frozen ones.

    Args:
        model: the shape.
        tokens: positions of the call.
        lora: the adapter's rank, 0 where all weights train.
        embedding_grad: what goes into the first layer needs a gradient, which an adapter leaves out.
    """
    found: Shapes = Counter()
    for rows, inputs, outputs, count in _linears(model, tokens):
        found[rows, outputs, inputs] += count
        if lora:
            found[rows, outputs, lora] += count
            found[rows, lora, inputs] += count
            found[lora, rows, inputs] += count
            found[outputs, rows, lora] += count
        else:
            found[outputs, rows, inputs] += count
    if model.experts:
        found[tokens, model.experts, model.hidden] += model.layers
        if not lora:
            found[model.experts, tokens, model.hidden] += model.layers
    if not embedding_grad:
        for inputs, outputs in model.attention_linears()[:3]:
            found[tokens, outputs, inputs] -= 1
            if lora:
                found[tokens, lora, inputs] -= 1
    return +found


def _linears(model: ModelShape, tokens: int) -> list[tuple[int, int, int, int]]:
    """(rows, inputs, outputs, how many) of the linear layers of the whole model; experts share the tokens evenly."""
    rows, each = tokens, model.layers
    if model.experts:
        rows, each = max(1, tokens * model.experts_per_token // model.experts), model.layers * model.experts
    dense = [(tokens, i, o, model.layers) for i, o in model.attention_linears()]
    return dense + [(rows, i, o, each) for i, o in model.mlp_linears()]


def attention_flops(model: ModelShape, visible: float) -> float:
    """Operations of attention's two products in a forward of all layers; visible: pairs of query and key."""
    return 4 * model.layers * model.queries * visible
