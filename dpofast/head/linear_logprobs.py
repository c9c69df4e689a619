"""linear_logprobs(): log-probs from hidden states and the LM head, without building the logits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dpofast import reference
from dpofast.common.backend import choose_backend
from dpofast.head.linear_logprobs_op import per_token
from dpofast.head.options import LogitOptions, LogprobOutput
from dpofast.head.planning.dtypes import accumulate_dtype
from dpofast.head.validate import (
    autocast_inputs,
    check_head,
    check_target_values,
    check_tensors,
)
from dpofast.head.vocab_parallel import local_shards, vocab_parallel_logprobs


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
    and the whole of the head's; the log-probs of other rows are what they were. Ignored rows may contain any values.

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
        process_group: weight and bias are this rank's rows of a head that is split over the vocabulary
            (vocab_parallel.py); hidden and targets are the same on every rank. A DTensor weight brings its own.
        max_logits_bytes: room for logits and what is computed from them, default 1 GiB, on a GPU of 40 GB or more 4.
            Nothing else is alive at the same time but inputs, results, gradients, vectors of N, and: (N, D) for a
            frozen head; 4·V·D bytes for a 16-bit head that trains and whose rows do not all fit at once.
        backend: "auto" (Triton on a GPU, chunked torch elsewhere), "triton", "fused", "torch" or "reference". "fused"
            has one Triton kernel multiply hidden states with the head and write E: no logit reaches memory, and beside
            E only a few numbers a row are allocated. With statistics, which need the logits, it works as "triton"
            does. Both accumulate in float32, so a policy and its equal reference differ by roundings of the last bits
            of a logit. "auto" chooses it for shapes that `dpofast tune` measured to be faster so.

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
    if process_group is not None:  # checks included: one that raised on one rank alone would hang the others
        logps, values = vocab_parallel_logprobs(
            hidden,
            weight,
            targets,
            bias=bias,
            options=options,
            process_group=process_group,
            backend=backend,
            max_logits_bytes=max_logits_bytes,
        )
        return LogprobOutput(logps, **values)
    check_head(hidden, weight, bias, targets)
    chosen = choose_backend(backend, hidden.device, hidden.dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        if chosen == "reference":
            return _reference_output(hidden, weight, bias, targets, options)
        logps, values = per_token(hidden, weight, bias, targets, options, chosen, max_logits_bytes)
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
