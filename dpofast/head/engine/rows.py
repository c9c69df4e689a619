"""Row work on logits that already lie in a buffer: log-probs, statistics and E, in Triton or torch.

    z = softcap·tanh(logit_scale·(x + b)/softcap)/temperature      m = max z      S = Σ exp(z − m)
    logp = z_y − m − log S      E = exp(z − m), and e_y − S at the target y: that is (p − onehot)·S without cancellation

dlogp/dx = −(logit_scale/temperature)/S ⊙ E (E carries softcap's factor 1 − tanh² itself), so E never needs the incoming
gradient. On CUDA one Triton program does a row and its statistics (kernels/exp_rows.py where E has a buffer of its own,
else kernels/token_logprobs.py); on the CPU torch does a row of existing logits in place, and those of hidden states and
head in tiles of the vocabulary (online_softmax.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dpofast.head.engine.interface import HeadInputs
from dpofast.head.options import LogitOptions
from dpofast.head.planning.plan import CACHE_BYTES, SCRATCH_ROWS, chunks

if TYPE_CHECKING:
    from dpofast.kernels.row_parts import TokenLogprobs


def kernel_rows(
    logits: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    options: LogitOptions,
    *,
    exp_out: Tensor | None,
    out: TokenLogprobs,
) -> None:
    """Write log-probs, rescale and statistics of raw logits (R, V), float32, to out, by kernels/: contiguous rows.

    exp_out (R, V) receives E, and zeros in rows of ignored targets: logits itself, or a buffer of its own in bfloat16
    or float16. In float16 every row is scaled by a power of two, which rescale takes back.
    """
    from dpofast.kernels.exp_rows import exp_rows
    from dpofast.kernels.token_logprobs import token_logprobs

    arguments = {"bias": bias, "stats": options.stats, "out": out, **options.kernel_arguments()}
    # Read once where that is enough: not where E replaces the logits, and float16's scale follows from the whole row.
    if exp_out is not None and exp_out.dtype == torch.bfloat16:
        exp_rows(logits, targets, exp_out=exp_out, **arguments)
    else:
        token_logprobs(logits, targets, exp_out=exp_out, **arguments)


def fused_rows(inputs: HeadInputs, rows: slice, *, exp_out: Tensor | None, out: TokenLogprobs) -> None:
    """Write log-probs and rescale of some rows of hidden states to out, and their E into the first rows of exp_out."""
    from dpofast.kernels.exp_gemm import ExpGemm, exp_gemm

    exp_gemm(
        inputs.hidden[rows],
        inputs.weight,
        inputs.targets[rows],
        bias=inputs.bias,
        exp_out=None if exp_out is None else exp_out[: rows.stop - rows.start],
        out=ExpGemm(out.logps, torch.empty_like(out.logps), out.rescale),
        **inputs.options.kernel_arguments(),
    )


def scale_rows(out: Tensor, rows: Tensor, coefficients: Tensor, *, triton: bool, zero: bool = False) -> None:
    """out (R, D) <- coefficients (R,) ⊙ rows (R, D), possibly in place.

    zero: a row whose coefficient is 0 becomes 0 whatever it holds, as an ignored row's hidden may be NaN; elsewhere
    such rows are finite.
    """
    if triton:
        from dpofast.kernels import scale

        scale.scale_rows(out, rows, coefficients)
        return
    for part in chunks(0, len(rows), SCRATCH_ROWS):  # of torch's own copies
        torch.mul(rows[part], coefficients[part].unsqueeze(1), out=out[part])
    if zero:
        out.masked_fill_(coefficients.unsqueeze(1) == 0, 0.0)


def scale_tensor(values: Tensor, factor: Tensor, *, triton: bool) -> None:
    """Multiply in place by a scalar on the device; the kernel writes nothing where it is 1."""
    if triton:
        from dpofast.kernels import scale

        scale.scale(values, factor)
    else:
        values.mul_(factor)


def torch_rows(x: Tensor, targets: Tensor, options: LogitOptions, *, exp: bool) -> tuple[Tensor, Tensor]:
    """logps and RowSums.rescale, (R,) each, 0 where ignored, of logits x (R, V), float32 or float64: overwritten.

    exp: E is left in x, zeros where ignored. Softcap is not supported: E has no factor 1 − tanh² here.
    """
    together = max(1, len(x))
    if x.is_cpu:  # one read from memory, the further passes from cache
        together = min(together, max(2, CACHE_BYTES // (x.shape[1] * x.element_size())))
    parts = [_torch_rows(x[rows], targets[rows], options, exp) for rows in chunks(0, len(x), together)]
    if not parts:
        return x.new_empty(0), x.new_empty(0)
    logps, rescale = zip(*parts, strict=True)
    return torch.cat(logps), torch.cat(rescale)


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
    rescale = (-options.gradient_scale / sum_exp).squeeze(1)
    return logps.squeeze(1).masked_fill(ignored, 0.0), rescale.masked_fill(ignored, 0.0)


def scale_in_place(x: Tensor, options: LogitOptions, *, keep_derivative: bool) -> Tensor | None:
    """Turn raw logits x (with their bias) into z in place; returns tanh² where softcap's derivative is needed later."""
    if options.softcap is None:
        if options.gradient_scale != 1.0:
            x.mul_(options.gradient_scale)
        return None
    x.mul_(options.logit_scale / options.softcap).tanh_()
    tanh_squared = x.square() if keep_derivative else None
    x.mul_(options.softcap / options.temperature)
    return tanh_squared
