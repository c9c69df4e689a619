"""What a device does in a second: datasheet numbers, and the fractions of them that are assumed to be reached.

Nothing here was measured on a GPU by this project. The fractions follow from public measurements of cuBLAS, hipBLASLt
and FlashAttention-2 at large shapes, rounded; they are the largest uncertainty of every prediction.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

GIB = 2**30
# A product's output tile on tensor cores, and the most parts that its inner dimension is split into.
_TILE_ROWS, _TILE_COLUMNS, _MOST_SPLITS = 128, 256, 8

Gemms = Mapping[tuple[int, int, int], int]


@dataclass(frozen=True, kw_only=True)
class Device:
    """A GPU, or a CPU whose rates were taken from a measurement.

    Attributes:
        name: for tables.
        peak_flops: dense bf16 operations a second, of the datasheet.
        gemm: fraction of it that large products reach.
        attention: fraction of it that FlashAttention-2 reaches.
        bandwidth: bytes a second, of the datasheet.
        stream: fraction of it that elementwise kernels reach.
        memory: bytes.
        multiprocessors: what product tiles are spread over; 0: no rounding up to whole waves.
        launch: seconds in which the host starts one operator of eager PyTorch.
        link: bytes a second in one direction between the GPUs of a node, of the datasheet.
        network: bytes a second in one direction that a node has to others, for each of its 8 GPUs.
        host: bytes a second in one direction between a GPU and its processor's memory.
        source: of the datasheet numbers.
    """

    name: str
    peak_flops: float
    gemm: float
    attention: float
    bandwidth: float
    stream: float
    memory: float
    multiprocessors: int = 0
    launch: float = 0.0
    link: float = math.inf
    network: float = math.inf
    host: float = math.inf
    source: str = ""

    @property
    def flops(self) -> float:
        """Operations a second of large products."""
        return self.peak_flops * self.gemm

    @property
    def bytes(self) -> float:
        """Bytes a second of elementwise kernels."""
        return self.bandwidth * self.stream

    def gemm_seconds(self, gemms: Gemms, width: int) -> float:
        """Time of products (M, K)·(K, N), each by its operations or by its bytes, whichever takes longer.

        Args:
            gemms: how often each (M, K, N) runs.
            width: bytes of an element.
        """
        return sum(count * self._product_seconds(*shape, width) for shape, count in gemms.items())

    def _product_seconds(self, m: int, k: int, n: int, width: int) -> float:
        operations = 2 * m * k * n / (self.flops * self._waves_filled(m, n))
        return max(operations, width * (m * k + k * n + m * n) / self.bytes)

    def _waves_filled(self, m: int, n: int) -> float:
        """The share of the multiprocessors that works, over all waves of output tiles."""
        if not self.multiprocessors:
            return 1.0
        tiles = math.ceil(m / _TILE_ROWS) * math.ceil(n / _TILE_COLUMNS)
        parts = (tiles * splits / self.multiprocessors for splits in range(1, _MOST_SPLITS + 1))
        return max(part / math.ceil(part) for part in parts)


_H100_NODE = {"launch": 6e-6, "link": 450e9, "network": 50e9, "host": 64e9, "stream": 0.90}

DEVICES = {
    "A100": Device(
        name="A100 80GB SXM",
        peak_flops=312e12,
        gemm=0.80,
        attention=0.55,
        bandwidth=2.039e12,
        stream=0.90,
        memory=80 * GIB,
        multiprocessors=108,
        launch=6e-6,
        link=300e9,
        network=25e9,
        host=32e9,
        source="NVIDIA A100 datasheet; 8 x HDR InfiniBand",
    ),
    "H100": Device(
        name="H100 SXM",
        peak_flops=989e12,
        gemm=0.81,
        attention=0.35,
        bandwidth=3.35e12,
        memory=80 * GIB,
        multiprocessors=132,
        source="NVIDIA H100 datasheet; 8 x NDR InfiniBand",
        **_H100_NODE,
    ),
    "H200": Device(
        name="H200 SXM",
        peak_flops=989e12,
        gemm=0.80,
        attention=0.35,
        bandwidth=4.8e12,
        memory=140 * GIB,
        multiprocessors=132,
        source="NVIDIA H200 datasheet; 8 x NDR InfiniBand",
        **_H100_NODE,
    ),
    "B200": Device(
        name="B200 (HGX)",
        peak_flops=2250e12,
        gemm=0.75,
        attention=0.15,
        bandwidth=8.0e12,
        stream=0.90,
        memory=179 * GIB,
        multiprocessors=148,
        launch=6e-6,
        link=900e9,
        network=50e9,
        host=64e9,
        source="NVIDIA HGX B200 datasheet; 8 x NDR InfiniBand",
    ),
    "MI300X": Device(
        name="MI300X",
        peak_flops=1307e12,
        gemm=0.50,
        attention=0.25,
        bandwidth=5.3e12,
        stream=0.80,
        memory=192 * GIB,
        multiprocessors=304,
        launch=6e-6,
        link=448e9,
        network=50e9,
        host=64e9,
        source="AMD Instinct MI300X datasheet; 8 x NDR InfiniBand",
    ),
}
# Of the memory, what a step may take: the rest is the CUDA context, NCCL's buffers and fragmentation.
USABLE_MEMORY = 0.92
# Of a link's rate, what collectives reach.
LINK_REACHED = 0.8
GPUS_A_NODE = 8
# Memory of a node's processors for each of its GPUs: assumed, 2 TB a node.
HOST_BYTES_A_GPU = 2e12 / GPUS_A_NODE


def find_device(name: str) -> Device:
    """A device of DEVICES.

    Raises:
        ValueError: none of this name.
    """
    if name.upper() not in DEVICES:
        raise ValueError(f"--device: expected one of {', '.join(DEVICES)}, got {name!r}")
    return DEVICES[name.upper()]


def exchange_seconds(device: Device, devices: int, size: float) -> float:
    """Time of an all-gather that leaves `size` bytes on each GPU, or of a reduce-scatter of as many; all-reduce: twice.

    Every GPU receives all but its own share over the links of its node, and every node all but its own over its
    network, the adapters of its 8 GPUs together; the slower of the two counts.
    """
    nodes = math.ceil(devices / GPUS_A_NODE)
    inside = size * (devices - 1) / devices / device.link
    between = size * (nodes - 1) / nodes / (device.network * GPUS_A_NODE)
    return max(inside, between) / LINK_REACHED
