"""Seconds, operations and operators of one forward or backward call, as an implementation runs it on a device."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from bench.roofline import heads, layers
from bench.roofline.devices import Device
from bench.roofline.layers import AdapterBytes, LayerBytes, Precision
from bench.roofline.models import ModelShape
from bench.roofline.work import Call

# An attention call starts about six operators (transposes and copies included), its backward as many.
ATTENTION_OPERATORS = 6
TERMS = ("products", "attention", "elementwise", "head")
# Seconds by term, and "gemm_flops", "operators", "positions".
Costs = Counter[str]


@dataclass(frozen=True, kw_only=True)
class Runner:
    """One implementation's kernels for a model on a device.

    Attributes:
        model, device: what runs where.
        layers, head, adapter: the implementation's.
        precision: of stream, products and stored weights.
        lora: rank of the adapter that trains, 0 where all weights train.
        checkpointing: the first layer's input needs a gradient then, even under an adapter.
        repeat_keys: a padding mask has keys and values repeated for every query head.
    """

    model: ModelShape
    device: Device
    layers: LayerBytes
    head: heads.Head
    adapter: AdapterBytes
    precision: Precision
    lora: int
    checkpointing: bool
    repeat_keys: bool

    def forward(self, call: Call, *, adapter: bool, again: bool = False) -> Costs:
        """The layers' forward; adapter: the trained one is on; again: as gradient checkpointing repeats it."""
        lora = self.lora if adapter else 0
        moved = self.layers.forward.total(self.model, call.positions) + self._attention_bytes(call)
        operators = self.layers.operators[0] + ATTENTION_OPERATORS
        if lora:
            moved += self.adapter.total(self.model, call.positions, self.precision.product)[0]
            operators += self.adapter.operators[0]
        gemms = (layers.recomputed_gemms if again else layers.forward_gemms)(self.model, call.positions, lora)
        return self._costs(gemms, moved, layers.attention_flops(self.model, call.visible), operators)

    def backward(self, call: Call) -> Costs:
        """The layers' backward."""
        moved = self.layers.backward.total(self.model, call.positions) + 2 * self._attention_bytes(call)
        operators = self.layers.operators[1] + ATTENTION_OPERATORS
        if self.lora:
            moved += self.adapter.total(self.model, call.positions, self.precision.product)[1]
            operators += self.adapter.operators[1]
        input_grad = not self.lora or self.checkpointing
        gemms = layers.backward_gemms(self.model, call.positions, self.lora, embedding_grad=input_grad)
        flops = layers.ATTENTION_BACKWARD * layers.attention_flops(self.model, call.visible)
        return self._costs(gemms, moved, flops, operators)

    def head_cost(self, call: Call, *, grad: bool) -> heads.HeadCost:
        """What the head does in a call, with its backward where there is a gradient."""
        asked = heads.HeadCall(
            model=self.model,
            call=call,
            precision=self.precision,
            device=self.device,
            grad=grad,
            trained=grad and not self.lora,
        )
        return self.head(asked)

    def head_costs(self, cost: heads.HeadCost) -> Costs:
        """Its seconds, operations and operators."""
        seconds = self.device.gemm_seconds(cost.gemms, self.precision.product) + cost.bytes / self.device.bytes
        return Counter(head=seconds, gemm_flops=flops(cost.gemms), operators=cost.operators)

    def _costs(self, gemms: layers.Shapes, moved: float, attention: float, operators: int) -> Costs:
        return Counter(
            products=self.device.gemm_seconds(gemms, self.precision.product),
            attention=attention / (self.device.peak_flops * self.device.attention),
            elementwise=moved / self.device.bytes,
            gemm_flops=flops(gemms),
            operators=operators * self.model.layers,
        )

    def _attention_bytes(self, call: Call) -> float:
        """Keys and values copied for their branch, or repeated for every query head."""
        keys, width = self.model.keys, self.precision.product
        if call.gathered:
            return self.model.layers * width * 2 * 2 * keys * call.gathered
        if self.repeat_keys and keys < self.model.queries:
            return self.model.layers * width * 2 * (keys + self.model.queries) * call.positions
        return 0.0


def flops(gemms: layers.Shapes) -> int:
    """Operations of products."""
    return sum(2 * m * k * n * count for (m, k, n), count in gemms.items())


def add(total: Costs, part: Costs, times: float = 1.0) -> None:
    """Add a part so many times."""
    for name, value in part.items():
        total[name] += value * times


Layers = Callable[[str, Precision], LayerBytes]
