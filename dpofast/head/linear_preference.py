"""linear_preference_loss(): the whole preference loss from hidden states and the LM head, pairs known.

The cheapest path for a trained head: loss and gradients are computed in forward, block by block (pair_blocks.py), and
backward multiplies them by the upstream scalar (linear_preference_op.py).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dpofast.common.backend import choose_backend
from dpofast.common.constants import IGNORE_INDEX
from dpofast.head.engine.interface import Needs
from dpofast.head.linear_preference_op import PreferenceArguments, preference
from dpofast.head.options import LogitOptions
from dpofast.head.validate import autocast_inputs, check_head, check_tensors
from dpofast.head.vocab_parallel import agreed_shard, local_shards
from dpofast.losses.columns import NO_COLUMNS, PreferenceColumns
from dpofast.losses.config import PreferenceLoss, checked_loss
from dpofast.losses.functional import PreferenceOutput
from dpofast.losses.validate import check_columns, check_pair_names, check_reference


def linear_preference_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_targets: Tensor,
    pairs: Tensor,
    ref_logps: Tensor | None = None,
    *,
    loss: PreferenceLoss | None = None,
    num_pairs: int | None = None,
    num_chosen_tokens: float | None = None,
    earlier_rewards: Tensor | None = None,
    columns: PreferenceColumns = NO_COLUMNS,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
    process_group: ProcessGroup | None = None,
    max_logits_bytes: int | None = None,
    backend: str = "auto",
) -> PreferenceOutput:
    """The preference loss of P pairs straight from hidden states, with the fewest GEMMs (see pair_blocks.py).

    Args:
        hidden: (N, D), float32, bfloat16, float16 or float64.
        weight: (V, D), the head, in hidden's dtype. Under autocast both are cast here, once.
        targets: (N,), int64.
        cu_targets: (S+1,) int32 on the CPU: sequence s owns targets[cu_targets[s]:cu_targets[s+1]].
        pairs: (P, 2) int32 on the CPU, chosen and rejected sequence. Of a batch of lists these are the best and the
            worst response of each, and no more: pass columns too.
        ref_logps: (S,) float32, the reference's summed log-probs, nats; with ld_alpha (P, 2), what pair_logprobs makes
            of its token log-probs; None for kinds that need none.
        loss: kind and options, default PreferenceLoss(). One that couples the pairs of the call recomputes the rows of
            E that do not fit max_logits_bytes; every other kind does the three GEMMs and no more.
        num_pairs, num_chosen_tokens, earlier_rewards: as in preference_loss.
        columns: as in token_preference_loss (PackedBatch.columns), on hidden's device but for lists and ranks.
        bias, temperature, logit_scale, softcap, ignore_index, max_logits_bytes, backend: as in linear_logprobs, without
            the "reference" backend.
        process_group: weight and bias are this rank's rows of a head that is split over the vocabulary
            (vocab_parallel.py); all else is the same on every rank, and so are the results and hidden's gradient. A
            DTensor weight brings its own. As many GEMMs as for a whole head, of its own rows on each rank.

    Returns:
        PreferenceOutput: loss scalar, differentiable; losses (P,), logps and rewards, of the shapes that it documents,
        detached.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit, a pair that names a missing sequence.
        TypeError: a head weight that is no plain dense tensor.
    """
    loss = checked_loss(loss)
    options = LogitOptions(temperature, logit_scale, softcap, ignore_index)  # raises for one that cannot mean anything
    check_tensors(hidden=hidden, weight=weight, bias=bias, targets=targets)
    check_tensors(cu_targets=cu_targets, pairs=pairs, ref_logps=ref_logps)
    weight, bias, process_group = local_shards(weight, bias, process_group)
    hidden, weight, bias = autocast_inputs(hidden, weight, bias)
    grad = torch.is_grad_enabled()
    needs = Needs(*(grad and x is not None and x.requires_grad for x in (hidden, weight, bias)))

    def check_batch() -> None:
        _check_pairs(targets, cu_targets, pairs, ref_logps, loss)
        _check_columns(columns, targets, pairs, len(cu_targets) - 1, loss)

    shard = None
    if process_group is None:
        check_head(hidden, weight, bias, targets)
        check_batch()
        chosen = choose_backend(backend, hidden.device, hidden.dtype)
        if chosen == "reference":
            raise ValueError(
                "backend: expected auto, triton or torch; the reference is preference_loss of linear_logprobs"
            )
    else:
        same = {
            "loss, num_pairs, temperature, logit_scale, softcap, ignore_index": (loss.encoded, num_pairs, options),
            "cu_targets, pairs": (cu_targets.tolist(), pairs.tolist()),
        }
        shard, chosen = agreed_shard(
            process_group, hidden, weight, targets, bias, same, needs, backend, max_logits_bytes, check=check_batch
        )
    divisor = len(pairs) if num_pairs is None else num_pairs
    arguments = PreferenceArguments(
        hidden,
        weight,
        bias,
        targets,
        cu_targets,
        pairs,
        ref_logps,
        earlier_rewards,
        loss.encoded,
        divisor,
        num_chosen_tokens,
        temperature,
        logit_scale,
        softcap,
        ignore_index,
        chosen,
        max_logits_bytes,
        *needs,
    )
    return PreferenceOutput(*preference(arguments, columns, loss, shard))


def _check_pairs(
    targets: Tensor, cu_targets: Tensor, pairs: Tensor, ref_logps: Tensor | None, loss: PreferenceLoss
) -> None:
    """Check what a call with known pairs needs; values are checked on the CPU, outside a compiled graph."""
    for name, tensor in (("cu_targets", cu_targets), ("pairs", pairs)):
        if tensor.dtype != torch.int32 or not tensor.is_cpu:
            raise ValueError(f"{name}: expected int32 on the CPU, got {tensor.dtype} on {tensor.device}")
    if cu_targets.dim() != 1 or len(cu_targets) == 0:
        raise ValueError(f"cu_targets: expected shape (S+1,), got {tuple(cu_targets.shape)}")
    check_pair_names(pairs, len(cu_targets) - 1)
    check_reference(ref_logps, len(cu_targets) - 1, len(pairs), loss)
    if ref_logps is not None and ref_logps.device != targets.device:
        raise ValueError(f"ref_logps: expected on {targets.device} like targets, got on {ref_logps.device}")
    if torch.compiler.is_compiling():
        return
    bounds = cu_targets.tolist()
    if bounds[0] != 0 or bounds[-1] != len(targets) or any(b < a for a, b in zip(bounds[:-1], bounds[1:], strict=True)):
        raise ValueError(f"cu_targets: expected to rise from 0 to the {len(targets)} targets, got {bounds}")


def _check_columns(
    columns: PreferenceColumns, targets: Tensor, pairs: Tensor, sequences: int, loss: PreferenceLoss
) -> None:
    """ValueError for columns of other shapes, on another device, or that the loss does not take."""
    check_columns(columns, pairs, sequences, loss)
    weights = columns.token_weights
    if weights is not None and weights.shape != targets.shape:
        raise ValueError(f"token_weights: expected shape {tuple(targets.shape)}, got {tuple(weights.shape)}")
    for name in ("weight", "margin", "beta", "label_smoothing", "token_weights", "scores"):
        column = getattr(columns, name)
        if column is not None and column.device != targets.device:
            raise ValueError(f"{name}: expected on {targets.device} like targets, got on {column.device}")
