"""Row work on logits that already lie in a buffer: log-probs, and E, the one tile that both gradients need.

    z = softcap·tanh(logit_scale·(x + b)/softcap)/temperature      m = max z      S = Σ exp(z − m)
    logp = z_y − m − log S      E = exp(z − m), and e_y − S at the target y: that is (p − onehot)·S without cancellation

dlogp/dx = −(logit_scale/temperature)/S ⊙ E (E carries softcap's factor 1 − tanh² itself), so E never needs the incoming
gradient. On CUDA one Triton program does a row (kernels/token_logprobs.py) and its statistics; on the CPU torch does a
row of existing logits in place, and those of hidden states and head in tiles of the vocabulary (online_sums.py).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpofast.reference import IGNORE_INDEX

STATS = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
BACKENDS = ("auto", "triton", "fused", "torch", "reference")
# GPU architectures (kernels/linear_tiles.py) where "auto" takes the fused kernel for calls without gradient. None yet:
# on none has it been timed against the GEMM and row kernel that "auto" takes, and compiling cleanly is no speed.
FUSED_BY_DEFAULT: tuple[str, ...] = ()
# Rows whose temporaries (softcap's derivative, a statistic's product) exist at the same time, where memory allows.
TEMPORARY_ROWS = 32
# What a CPU's second-level caches hold of the rows that are worked on together.
CACHE_BYTES = 4 << 20


@dataclass(frozen=True)
class LogitOptions:
    """How raw logits become z, and which targets do not count. Validated when built."""

    temperature: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None
    ignore_index: int = IGNORE_INDEX
    stats: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raise ValueError for an option that cannot mean anything."""
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature: expected a positive finite number, got {self.temperature}")
        if not abs(self.logit_scale) < float("inf"):
            raise ValueError(f"logit_scale: expected a finite number, got {self.logit_scale}")
        if self.softcap is not None and not 0 < self.softcap < float("inf"):
            raise ValueError(f"softcap: expected None or a positive finite number, got {self.softcap}")
        if self.ignore_index >= 0:
            raise ValueError(f"ignore_index: expected a negative number, which no token id is, got {self.ignore_index}")
        unknown = [name for name in self.stats if name not in STATS]
        if unknown:
            raise ValueError(f"stats: expected names among {STATS}, got {unknown}")

    def kernel_arguments(self) -> dict[str, Any]:
        """What both kernels of kernels/token_logprobs.py take."""
        names = ("temperature", "logit_scale", "softcap", "ignore_index")
        return {name: getattr(self, name) for name in names}

    @property
    def gradient_scale(self) -> float:
        """dz/dx without softcap's factor."""
        return self.logit_scale / self.temperature


@dataclass(frozen=True)
class RowResult:
    """logps (R,), sums (1 or 3, R) and the statistics asked for, (R,) each; all 0 where ignored.

    sums: −(logit_scale/temperature)/S, which times an incoming gradient is a row's coefficient c; and where E comes in
    tiles (online_sums.py) its entry at the target, and the row's maximum.
    """

    logps: Tensor
    sums: Tensor
    stats: dict[str, Tensor]


def choose_backend(backend: str, device: torch.device, head_dtype: torch.dtype | None = None) -> str:
    """'triton', 'fused', 'torch' or 'reference' for this device; ValueError where the one asked for cannot run.

    head_dtype: of hidden states and head, which 'fused' multiplies; None where the call has neither.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {backend!r}")
    if backend == "auto":
        if device.type not in ("cuda", "xpu"):
            return "torch"
        sixteen_bit = head_dtype is not None and head_dtype.itemsize == 2
        return "fused" if sixteen_bit and _architecture(device) in FUSED_BY_DEFAULT else "triton"
    if backend == "fused" and head_dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            "backend='fused' multiplies hidden states with the head in float32, bfloat16 or float16, got "
            f"{'neither' if head_dtype is None else head_dtype}: use backend='auto'"
        )
    if backend == "fused" and device.type == "cuda" and not torch.version.hip:
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            raise ValueError(
                f"backend='fused' needs compute capability 8.0 or above, got {major}.{minor}: use backend='triton'"
            )
    if uses_triton(backend) and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"backend={backend!r} needs a GPU, but the tensors are on the CPU: use backend='auto', "
            "or start Python with TRITON_INTERPRET=1 to run the kernels in Triton's interpreter"
        )
    return backend


def _architecture(device: torch.device) -> str:
    from dpofast.kernels.linear_tiles import architecture_of

    return architecture_of(device)


def uses_triton(backend: str) -> bool:
    """Whether this chosen backend does its row work in kernels/: 'fused' too, where it needs E or statistics."""
    return backend in ("triton", "fused")


def check_target_values(targets: Tensor, vocab: int, ignore_index: int) -> None:
    """ValueError for a target outside [0, vocab) that is not ignore_index: on the CPU, where looking costs no sync."""
    if targets.is_cpu and targets.numel():
        wrong = ((targets < 0) | (targets >= vocab)) & (targets != ignore_index)
        if wrong.any():
            first = int(wrong.reshape(-1).nonzero()[0])
            raise ValueError(
                f"targets: expected ids in [0, {vocab}) or ignore_index {ignore_index}, "
                f"got {int(targets.reshape(-1)[first])} at position {first}"
            )


def kernel_rows(
    logits: Tensor, bias: Tensor | None, targets: Tensor, options: LogitOptions, *, exp_out: Tensor | None
) -> RowResult:
    """Log-probs of raw logits (R, V), float32, by kernels/: contiguous rows.

    exp_out (R, V), of any float dtype and possibly logits itself, receives E; rows of ignored targets receive zeros.
    """
    from dpofast.kernels.exp_rows import exp_rows
    from dpofast.kernels.token_logprobs import token_logprobs

    # Where E replaces the logits a row must be read twice.
    apart = exp_out is not None and exp_out.data_ptr() != logits.data_ptr()
    function = exp_rows if apart else token_logprobs
    arguments = {"bias": bias, "stats": options.stats, "exp_out": exp_out, **options.kernel_arguments()}
    rows = function(logits, targets, **arguments)
    scale = torch.where(targets == options.ignore_index, 0.0, -options.gradient_scale / rows.sum_exp)
    return RowResult(rows.logps, scale.unsqueeze(0), rows.stats)


def torch_rows(x: Tensor, targets: Tensor, options: LogitOptions, *, exp: bool) -> tuple[Tensor, Tensor]:
    """logps and −1/(S·temperature), (R,) each, 0 where ignored, of logits x (R, V), float32 or float64: overwritten.

    exp: E is left in x, zeros where ignored. Of the options temperature and ignore_index count.
    """
    together = max(1, len(x))
    if x.is_cpu:  # one read from memory, the further passes from cache
        together = min(together, max(2, CACHE_BYTES // (x.shape[1] * x.element_size())))
    parts = [_torch_rows(x[rows], targets[rows], options, exp) for rows in row_blocks(len(x), together)]
    if not parts:
        return x.new_empty(0), x.new_empty(0)
    logps, scale = zip(*parts, strict=True)
    return torch.cat(logps), torch.cat(scale)


def _torch_rows(x: Tensor, targets: Tensor, options: LogitOptions, exp: bool) -> tuple[Tensor, Tensor]:
    ignored = targets == options.ignore_index
    safe_targets = targets.masked_fill(ignored, 0).unsqueeze(1)
    scale_in_place(x, options, keep_derivative=False)
    target_logit = x.gather(1, safe_targets)
    row_max = x.amax(dim=1, keepdim=True)
    e = x.sub_(row_max).exp_()
    sum_exp = e.sum(dim=1, keepdim=True)
    logps = target_logit - row_max - sum_exp.log()
    if exp:
        e.scatter_add_(1, safe_targets, -sum_exp)
        # A pass over the tile, so not where looking first costs no sync and finds nothing to do.
        if not x.is_cpu or ignored.any():
            e.masked_fill_(ignored.unsqueeze(1), 0.0)
    scale = (-options.gradient_scale / sum_exp).squeeze(1)
    return logps.squeeze(1).masked_fill(ignored, 0.0), scale.masked_fill(ignored, 0.0)


def row_blocks(rows: int, temporary_rows: int) -> Sequence[slice]:
    """Slices of a few rows, for work that needs a temporary as wide as the vocabulary."""
    return [slice(start, start + temporary_rows) for start in range(0, rows, temporary_rows)]


def scale_in_place(x: Tensor, options: LogitOptions, *, keep_derivative: bool) -> Tensor | None:
    """x <- z; returns tanh² where softcap's derivative is needed later."""
    if options.softcap is None:
        if options.gradient_scale != 1.0:
            x.mul_(options.gradient_scale)
        return None
    x.mul_(options.logit_scale / options.softcap).tanh_()
    tanh_squared = x.square() if keep_derivative else None
    x.mul_(options.softcap / options.temperature)
    return tanh_squared
