"""Published GPU figures of other libraries beside what the model predicts for them: the only GPUs it can be held to.

None was measured here. A head's time is its products at the device's assumed rate and the bytes of its work on logits;
a step is predicted as bench/roofline/step.py predicts every step.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

from bench.roofline import heads, layers
from bench.roofline.calls import flops
from bench.roofline.devices import DEVICES, GIB
from bench.roofline.layers import Shapes
from bench.roofline.models import MODELS
from bench.roofline.step import DPOFAST, Prediction, Setting, predict_batches
from bench.roofline.work import Call, Pairs

LLAMA_VOCAB = 128_256
# What a chunk's cross entropy reads and writes of a bfloat16 logit: read twice, its gradient written in its place.
CHUNK_BYTES = 6
# Of the H100s' peak rate, as the pull request reports it.
OPEN_INSTRUCT_MFU = 0.2248


@dataclass(frozen=True, kw_only=True)
class Published:
    """A figure of somebody else.

    Attributes:
        what: in words.
        source: where it stands.
        measured: milliseconds.
        predict: milliseconds, and bytes where the figure has them.
        measured_bytes: peak bytes, where published.
    """

    what: str
    source: str
    measured: float
    predict: Callable[[], tuple[float, float | None]]
    measured_bytes: float | None = None


def mean_loss(device: str, rows: int, chunk: int) -> tuple[float, float]:
    """Milliseconds and bytes of a mean cross entropy over Llama 3's head in bfloat16 whose chunks make all gradients.

    Args:
        device: of DEVICES.
        rows: targets.
        chunk: rows of logits at a time; dW is read and written once for each chunk.
    """
    d, v, count = 4096, LLAMA_VOCAB, -(-rows // chunk)
    gemms: Shapes = Counter({(chunk, d, v): count, (chunk, v, d): count, (v, chunk, d): count})
    entry = DEVICES[device]
    moved = CHUNK_BYTES * rows * v + (count - 1) * 2 * d * v
    seconds = entry.gemm_seconds(gemms, 2) + moved / entry.bytes
    return 1e3 * seconds, 2 * (d * v + chunk * v + rows * d)


def products(device: str, rows: int, vocab: int, count: int) -> tuple[float, None]:
    """Milliseconds of so many products of a head with D = 4,096: what a kernel without any other traffic takes."""
    entry = DEVICES[device]
    return 1e3 * count * entry.gemm_seconds(Counter({(rows, 4096, vocab): 1}), 2), None


def open_instruct() -> Prediction:
    """A packed, compiled step with full logits: 524,288 tokens of both responses on 16 H100, sharded, recomputed.

    Rows are 16,384 tokens of several pairs; their lengths are not published, and attention within documents of 2,048
    tokens is assumed. The reference was cached before, and is no part of the step.
    """
    row, document = 16_384, 2048
    visible = row // document * document * (document + 1) // 2
    call = Call(positions=row, targets=row, sequences=1, width=row, visible=visible)
    how = replace(DPOFAST, name="open-instruct", head=heads.full_logits)
    setting = Setting(
        model=MODELS["olmo-2-7b"][1],
        pairs=Pairs.make(16, 1, row - 1, row - 1),
        device=DEVICES["H100"],
        devices=16,
        sharded=True,
        checkpointing=True,
        epochs=1_000_000,
    )
    return predict_batches(setting, how, [(call, call)])


def _open_instruct_ms() -> tuple[float, None]:
    return 1e3 * open_instruct().seconds, None


PUBLISHED = (
    Published(
        what="DPO step, OLMo-2 7B, 524,288 tokens, 16 H100 (5,282 tokens/s a GPU)",
        source="allenai/open-instruct, pull request 1466",
        measured=6190,
        predict=_open_instruct_ms,
    ),
    Published(
        what="per-token loss, forward, H100, 8,192 x 4,096 x 131,072, one product",
        source="linkedin/Liger-Kernel, CuTe kernel for SM90",
        measured=12.25,
        predict=lambda: products("H100", 8192, 131_072, 1),
    ),
    Published(
        what="per-token loss, forward and backward, H100, the same shape, four products",
        source="linkedin/Liger-Kernel, CuTe kernel for SM90",
        measured=50.4,
        predict=lambda: products("H100", 8192, 131_072, 4),
    ),
    Published(
        what="mean loss, all gradients, H200, 8,192 x 4,096 x 128,256, chunks of 256 rows",
        source="linkedin/Liger-Kernel, Triton",
        measured=53.0,
        predict=lambda: mean_loss("H200", 8192, 256),
        measured_bytes=1.1 * GIB,
    ),
    Published(
        what="the same in chunks of 4,096 rows",
        source="linkedin/Liger-Kernel, Triton",
        measured=35.1,
        predict=lambda: mean_loss("H200", 8192, 4096),
        measured_bytes=2.1 * GIB,
    ),
    Published(
        what="mean loss, all gradients, B200, 8,192 x 4,096 x 128,256, chunks of 1,024 rows",
        source="linkedin/Liger-Kernel, pull request 1339",
        measured=17.51,
        predict=lambda: mean_loss("B200", 8192, 1024),
    ),
)


def model_flops_utilization(prediction: Prediction) -> float:
    """The step's products without the repeated forward and the reference, over the device's peak."""
    setting = prediction.setting
    tokens = setting.pairs.tokens / setting.devices
    useful = flops(layers.forward_gemms(setting.model, 1)) + setting.model.hidden * setting.model.vocab * 2
    return 3 * useful * tokens / prediction.seconds / setting.device.peak_flops
