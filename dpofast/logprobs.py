"""Public log-prob functions: from logits that exist, and from hidden states and the head without building them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dpofast import reference
from dpofast.distributed import local_shards, vocab_parallel_logprobs
from dpofast.first_order import first_order_only
from dpofast.gemm import accumulate_dtype
from dpofast.head import (
    DEFAULT_LOGITS_BYTES,
    autocast_inputs,
    check_floating,
    check_head,
    check_targets,
    check_tensors,
    chunks,
)
from dpofast.linear import per_token
from dpofast.rows import LogitOptions, check_target_values, choose_backend, torch_rows

_CHUNK_BYTES = 32 << 20


@dataclass(frozen=True)
class LogprobOutput:
    """Log-probs of N targets and, where asked for, per-token statistics without gradient.

    logps (N,) float32, nats, differentiable, 0 where the target was ignored. entropy (nats), mean_logits, is_top1
    (bool) and log_sum_sq_probs (log Σ p², nats) are (N,), or None where `stats` did not name them. aux_loss is a
    model's own auxiliary loss (mixture-of-experts balancing), or None.
    """

    logps: Tensor
    entropy: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    aux_loss: Tensor | None = None


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
    flat: Tensor = _Logprobs.apply(rows, targets.reshape(-1), options, chosen, inplace_backward)
    return flat.reshape(targets.shape)


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = reference.IGNORE_INDEX,
    stats: tuple[str, ...] = (),
    process_group: ProcessGroup | None = None,
    max_logits_bytes: int | None = None,
    backend: str = "auto",
) -> LogprobOutput:
    """Log-probs of targets under softmax(z), z = softcap·tanh(logit_scale·(h·Wᵀ + b)/softcap)/temperature.

    The (N, V) logits are never built: they pass through a buffer of max_logits_bytes, in float32 also for a 16-bit
    model. A hidden state that is not finite makes its log-prob NaN, and with it its row of the hidden states' gradient
    and the whole of the head's; the log-probs of other rows are what they were. An ignored row may hold anything.

    Args:
        hidden: (N, D), float32, bfloat16, float16 or float64.
        weight: (V, D), the head, in hidden's dtype. Under autocast both are cast here, once.
        targets: (N,), int64.
        bias: (V,) or None.
        temperature: divides z.
        logit_scale: multiplies the raw logits (Cohere; 1/logits_scaling for Granite).
        softcap: Gemma 2's final_logit_softcapping, or None.
        ignore_index: targets that count as 0, with zero gradient.
        stats: names among "entropy", "mean_logits", "is_top1", "log_sum_sq_probs".
        process_group: weight and bias are this rank's rows of a head that is split over the vocabulary (dpofast/
            distributed.py); hidden and targets are the same on every rank. A DTensor weight brings its own.
        max_logits_bytes: room for logits and what is computed from them, default 1 GiB.
            Nothing else is alive at the same time but inputs, results, gradients, vectors of N, and: (N, D) for a
            frozen head; a float32 (V, D) for a 16-bit head that trains and whose rows do not all fit at once.
        backend: "auto" (Triton on a GPU, chunked torch elsewhere), "triton", "fused", "torch" or "reference". "fused"
            computes calls that need neither a gradient nor statistics (a reference pass, an evaluation) in one Triton
            kernel: no logit reaches memory, and beside the results only 8 bytes a row and split are allocated; every
            other call as "triton" does. Both accumulate in float32, so a policy and its equal reference differ by
            roundings of the last bits of a logit. "auto" does not choose it on a device where it has not been timed
            (rows.FUSED_BY_DEFAULT).

    Returns:
        LogprobOutput; logps (N,) float32 (float64 for float64 inputs), nats.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit; on the CPU also a target outside the vocabulary.
        TypeError: a head weight that is no plain dense tensor (quantized, sharded).
    """
    options = LogitOptions(temperature, logit_scale, softcap, ignore_index, tuple(stats))
    check_tensors(hidden=hidden, weight=weight, bias=bias, targets=targets)
    weight, bias, process_group = local_shards(weight, bias, process_group)
    hidden, weight, bias = autocast_inputs(hidden, weight, bias)
    budget = DEFAULT_LOGITS_BYTES if max_logits_bytes is None else max_logits_bytes
    if process_group is not None:  # checks included: one that raised on one rank alone would hang the others
        logps, values = vocab_parallel_logprobs(
            hidden,
            weight,
            targets,
            bias=bias,
            options=options,
            process_group=process_group,
            backend=backend,
            max_logits_bytes=budget,
        )
        return LogprobOutput(logps, **values)
    check_head(hidden, weight, bias, targets)
    chosen = choose_backend(backend, hidden.device, hidden.dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        if chosen == "reference":
            return _reference_output(hidden, weight, bias, targets, options)
        logps, values = per_token(hidden, weight, bias, targets, options, chosen, budget)
    return LogprobOutput(logps, **values)


def _reference_output(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: LogitOptions
) -> LogprobOutput:
    check_target_values(targets, weight.shape[0], options.ignore_index)
    wide = accumulate_dtype(hidden.dtype)
    x = torch.nn.functional.linear(hidden.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
    z = reference.scaled_logits(
        x, logit_scale=options.logit_scale, softcap=options.softcap, temperature=options.temperature
    )
    logps = reference.logprobs(z, targets, ignore_index=options.ignore_index)
    every = reference.token_statistics(z.detach(), targets, ignore_index=options.ignore_index) if options.stats else {}
    return LogprobOutput(logps, **{name: every[name] for name in options.stats})


class _Logprobs(torch.autograd.Function):
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
            _, scale = torch_rows(x, targets[chunk], ctx.options, exp=True)
            c = torch.where(scale == 0, 0.0, grad_logps[chunk] * scale)
            grad[chunk] = x.mul_(c.unsqueeze(1))
        return grad, None, None, None, None


def _row_chunks(logits: Tensor) -> list[slice]:
    size = max(1, _CHUNK_BYTES // max(1, logits.shape[1] * 4))
    return chunks(0, logits.shape[0], size)
