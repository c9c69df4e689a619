"""Log-probs of logits that already exist: logprobs()."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dpofast import reference
from dpofast.common.autograd import ReverseModeFunction, check_derivatives, first_order_only
from dpofast.common.backend import choose_backend
from dpofast.head.engine.interface import row_coefficients
from dpofast.head.engine.rows import torch_rows
from dpofast.head.options import LogitOptions
from dpofast.head.planning.dtypes import accumulate_dtype
from dpofast.head.planning.plan import chunks
from dpofast.head.validate import (
    check_floating,
    check_target_values,
    check_targets,
    check_tensors,
)

_CHUNK_BYTES = 32 << 20


def logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    ignore_index: int = reference.IGNORE_INDEX,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> Tensor:
    """log softmax(logits/temperature)[target] per position, without a second (…, V) tensor in float32.

    Args:
        logits: (..., V), float32, bfloat16, float16 or float64.
        targets: (...), int64; ignore_index marks positions that count as 0.
        temperature: divides the logits.
        ignore_index: a negative number.
        inplace_backward: backward overwrites the storage of `logits` with their gradient: no (…, V) gradient is
            allocated, but `logits` must not be used afterwards, and a second backward raises.
        backend: "auto" (Triton on a GPU, torch elsewhere), "triton", "torch" or "reference".

    Returns:
        (...) float32 (float64 for float64 logits), nats.

    Raises:
        ValueError: shapes or dtypes that do not fit, or (checked on the CPU, where it costs no sync) a target outside
            the vocabulary. On a GPU such a target gives NaN.
    """
    options = LogitOptions(temperature=temperature, ignore_index=ignore_index)
    check_tensors(logits=logits, targets=targets)
    if logits.dim() == 0 or logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"targets: expected shape {tuple(logits.shape[:-1])}, that of logits {tuple(logits.shape)} without the "
            f"vocabulary, got {tuple(targets.shape)}"
        )
    if logits.shape[-1] == 0:
        raise ValueError(f"logits (..., V): expected a vocabulary of at least one word, got {tuple(logits.shape)}")
    check_floating("logits", logits)
    check_targets(targets, logits.device)
    chosen = choose_backend(backend, logits.device)
    if chosen == "reference":
        check_target_values(targets, logits.shape[-1], ignore_index)
        wide = logits.to(accumulate_dtype(logits.dtype))
        return reference.logprobs(wide, targets, temperature=temperature, ignore_index=ignore_index)
    rows = logits.reshape(-1, logits.shape[-1])
    check_derivatives(rows)
    flat: Tensor = _Logprobs.apply(rows, targets.reshape(-1), options, chosen, inplace_backward)
    return flat.reshape(targets.shape)


class _Logprobs(ReverseModeFunction):
    """logits (R, V), targets (R,) -> (R,). Forward keeps nothing but the logits, and on Triton two floats a row."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, logits: Tensor, targets: Tensor, options: LogitOptions, backend: str, inplace_backward: bool
    ) -> Tensor:
        ctx.options, ctx.inplace_backward = options, inplace_backward
        ctx.consumed = False
        check_target_values(targets, logits.shape[1], options.ignore_index)
        if backend == "triton":
            from dpofast.kernels.token_logprobs import token_logprobs

            rows = token_logprobs(logits, targets, **options.kernel_arguments())
            ctx.save_for_backward(logits, targets, rows.row_max, rows.sum_exp)
            return rows.logps
        ctx.save_for_backward(logits, targets)
        logps = logits.new_empty(len(targets), dtype=accumulate_dtype(logits.dtype))
        for chunk in _row_chunks(logits):
            x = logits[chunk].to(logps.dtype, copy=True)
            logps[chunk], _ = torch_rows(x, targets[chunk], options, exp=False)
        return logps

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad_logps: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if ctx.consumed:
            raise RuntimeError(
                "logprobs(inplace_backward=True): the first backward overwrote the logits with their gradient; "
                "use inplace_backward=False to run backward twice"
            )
        logits, targets, *row_sums = ctx.saved_tensors
        ctx.consumed = ctx.inplace_backward
        grad = logits.detach() if ctx.inplace_backward else torch.empty_like(logits)
        if row_sums:
            from dpofast.kernels.token_logprobs import token_logprobs_grad

            row_max, sum_exp = row_sums
            options = ctx.options.kernel_arguments()
            token_logprobs_grad(logits, targets, row_max, sum_exp, grad_logps, out=grad, **options)
            return grad, None, None, None, None
        for chunk in _row_chunks(logits):
            x = logits[chunk].to(accumulate_dtype(logits.dtype), copy=True)
            _, rescale = torch_rows(x, targets[chunk], ctx.options, exp=True)
            c = row_coefficients(grad_logps[chunk], rescale, targets[chunk] == ctx.options.ignore_index)
            grad[chunk] = x.mul_(c.unsqueeze(1))
        return grad, None, None, None, None


def _row_chunks(logits: Tensor) -> list[slice]:
    size = max(1, _CHUNK_BYTES // max(1, logits.shape[1] * 4))
    return chunks(0, logits.shape[0], size)
