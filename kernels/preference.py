"""Per-token log-probs -> segment sums -> DPO sigmoid loss, coefficients and rewards, in one launch.

Sequence s sums to l_s over its targets; r_s = l_s − ref_s (ref_s = 0 without a reference). A pair (c, r) has

    u = β (r_c − r_r),    loss = −(1 − ε) · log σ(u) − ε · log σ(−u)        (DPO, arXiv 2305.18290; ε > 0: cDPO)
    d loss / d l_c = β (ε σ(u) − (1 − ε) σ(−u)) = −d loss / d l_r

and a sequence's coefficient is the sum of d loss / d l over its pairs. With lengths, r_s is divided by n_s tokens
(and d loss / d l with it). With ld_alpha, targets beyond the shorter response of a pair weigh ld_alpha in l_c and l_r
(LD-DPO, arXiv 2409.06411): l then belongs to a pair, and coefficients to targets. With token weights, l_s is the sum of
weight · log-prob, and a target's coefficient its weight times its sequence's. A pair may have its own β and ε, a margin
that is subtracted from u (ODPO, arXiv 2402.10571) and a weight that its loss is times. All float32, in nats.

There is one program per sequence. It sums the log-probs of its targets, then loops over its pairs and sums each partner
sequence's targets again: rereading a few thousand floats costs less than a second launch. All programs sum in the same
order, so both sums of a sequence are bit-identical, and each value is written by one program, so the result is
deterministic without atomics or a host sync. Bytes moved: 4 per target and pair side, all from cache after the first
read; with token weights twice that, and 8 per target for its coefficient.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .tiles import COMPILE_OPTIONS, check_tensor, launch_guard

# Targets per step of the one warp that sums a sequence: responses are tens to a few thousand tokens long.
BLOCK_N = 256


class PairAdjacency(NamedTuple):
    """The pairs of each sequence in compressed form: those of sequence s are entries[offsets[s]:offsets[s+1]].

    Attributes:
        offsets: (S+1,) int32.
        entries: (2P, 3) int32 rows of (partner sequence, side, pair); side is +1 where s is chosen, −1 where rejected.
    """

    offsets: torch.Tensor
    entries: torch.Tensor

    @property
    def num_pairs(self) -> int:
        """The number of pairs, P."""
        return self.entries.shape[0] // 2

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PairAdjacency:
        """The same adjacency on ``device``."""
        return PairAdjacency(*(tensor.to(device, non_blocking=non_blocking) for tensor in self))


class PairOptions(NamedTuple):
    """Options of each pair, (P,) float32; None where all have the call's, a margin of 0 and a weight of 1.

    Attributes:
        weight: factor of the pair's loss.
        margin: nats, subtracted from u.
        beta: β in place of the call's, above 0.
        label_smoothing: ε in place of the call's, in [0, 0.5].
    """

    weight: torch.Tensor | None = None
    margin: torch.Tensor | None = None
    beta: torch.Tensor | None = None
    label_smoothing: torch.Tensor | None = None


class PreferenceSigmoid(NamedTuple):
    """Results of :func:`preference_sigmoid`, all float32.

    Attributes:
        pair_losses: (P,) loss of each pair, times its weight.
        coefficients: (S,) d(sum of pair losses) / d(sequence log-prob); 0 for a sequence in no pair. With ld_alpha or
            token weights (N,), the derivative with respect to each target's log-prob, exactly 0 where its weight is.
        rewards: (S,) β · (log-prob − reference); with ld_alpha or a β of each pair (P, 2).
        sequence_logps: (S,) log-prob of each sequence in nats, summed over its targets; 0 for an empty one. With
            ld_alpha (P, 2), the weighted log-probs of each pair's chosen and rejected response.
    """

    pair_losses: torch.Tensor
    coefficients: torch.Tensor
    rewards: torch.Tensor
    sequence_logps: torch.Tensor


def pair_adjacency(pairs: torch.Tensor, num_sequences: int) -> PairAdjacency:
    """List the pairs of each sequence, as :func:`preference_sigmoid` takes them.

    Args:
        pairs: (P, 2) int32 or int64 on the CPU: chosen, rejected sequence.
        num_sequences: S.

    Returns:
        :class:`PairAdjacency` on the CPU. For each sequence, the pairs in which it is chosen come first, then those in
        which it is rejected, each in the order of ``pairs``.

    Raises:
        ValueError: pairs has another shape, dtype or device, an index is outside [0, S), or a pair names the same
            sequence twice.
    """
    if pairs.dim() != 2 or pairs.shape[1] != 2 or pairs.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"pairs: expected (P, 2) int32 or int64, got {tuple(pairs.shape)} {pairs.dtype}")
    if pairs.device.type != "cpu":
        raise ValueError(f"pairs: expected a CPU tensor, as the packer returns it, got one on {pairs.device}")
    bad = ((pairs < 0) | (pairs >= num_sequences)).any(1)
    if bad.any():
        index = int(bad.nonzero()[0])
        raise ValueError(
            f"pairs: expected sequences in [0, {num_sequences}), got {pairs[index].tolist()} in pair {index}"
        )
    same = pairs[:, 0] == pairs[:, 1]
    if same.any():
        index = int(same.nonzero()[0])
        raise ValueError(f"pairs: expected two different sequences, got {pairs[index].tolist()} in pair {index}")

    chosen, rejected = pairs.to(torch.int32).unbind(1)
    pair = torch.arange(len(pairs), dtype=torch.int32)
    side = torch.ones_like(pair)
    entries = torch.cat([torch.stack([rejected, side, pair], 1), torch.stack([chosen, -side, pair], 1)])
    sequence = torch.cat([chosen, rejected]).long()
    offsets = torch.zeros(num_sequences + 1, dtype=torch.int32)
    offsets[1:] = torch.bincount(sequence, minlength=num_sequences).cumsum(0)
    return PairAdjacency(offsets, entries[torch.argsort(sequence, stable=True)])


@triton.jit
def _weighted(values, weights_ptr, rows, mask):
    """weight · value, exactly 0 where the weight is 0, also of −inf; the values without weights."""
    if weights_ptr is not None:
        weights = tl.load(weights_ptr + rows, mask=mask, other=0.0)
        values = tl.where(weights == 0.0, 0.0, weights * values)
    return values


@triton.jit
def _sequence_logp(logps_ptr, token_weights_ptr, cu_targets_ptr, sequence, BLOCK_N: tl.constexpr):
    """l_s. Each lane sums its own tokens, then lanes are summed as a tree, which keeps rounding errors small."""
    stop = tl.load(cu_targets_ptr + sequence + 1)
    lanes = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(tl.load(cu_targets_ptr + sequence), stop, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        logp = tl.load(logps_ptr + offs_n.to(tl.int64), mask=offs_n < stop, other=0.0)
        lanes += _weighted(logp, token_weights_ptr, offs_n.to(tl.int64), offs_n < stop)
    return tl.sum(lanes, 0)


@triton.jit
def _ld_logp(logps_ptr, positions_ptr, cu_targets_ptr, sequence, shared, ld_alpha, BLOCK_N: tl.constexpr):
    """_sequence_logp with factor ld_alpha for targets from position `shared` on."""
    stop = tl.load(cu_targets_ptr + sequence + 1)
    lanes = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(tl.load(cu_targets_ptr + sequence), stop, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        position = tl.load(positions_ptr + offs_n.to(tl.int64), mask=offs_n < stop, other=0)
        logp = tl.load(logps_ptr + offs_n.to(tl.int64), mask=offs_n < stop, other=0.0)
        lanes += tl.where(position < shared, logp, ld_alpha * logp)
    return tl.sum(lanes, 0)


@triton.jit
def _per_token(ratio, lengths_ptr, sequence, NORMALIZE: tl.constexpr):
    if NORMALIZE:
        ratio = ratio / tl.load(lengths_ptr + sequence)
    return ratio


@triton.jit
def _of_pair(values_ptr, pair, value):
    """The pair's own value where there are such, else `value`."""
    if values_ptr is not None:
        value = tl.load(values_ptr + pair)
    return value


@triton.jit
def _log1p_exp(e):
    """log(1 + e) for e in [0, 1], accurate also where 1 + e rounds to 1.

    The series of 2 atanh(e / (2 + e)); the first omitted term is at most 2e-9.
    """
    q = e / (2.0 + e)
    q2 = q * q
    series = 1.0 / 13.0 + q2 * (1.0 / 15.0)
    series = 1.0 / 9.0 + q2 * (1.0 / 11.0 + q2 * series)
    series = 1.0 / 5.0 + q2 * (1.0 / 7.0 + q2 * series)
    return 2.0 * q * (1.0 + q2 * (1.0 / 3.0 + q2 * series))


@triton.jit
def _pair_terms(u, label_smoothing):
    """(loss, d loss / d u) of a pair."""
    # e <= 1, so nothing overflows: σ(|u|) = 1 / (1 + e), σ(−|u|) = e / (1 + e), log σ(u) = min(u, 0) − log(1 + e).
    e = tl.exp(-tl.abs(u))
    likely = 1.0 / (1.0 + e)
    unlikely = e * likely
    sigmoid = tl.where(u < 0.0, unlikely, likely)
    complement = tl.where(u < 0.0, likely, unlikely)
    loss = _log1p_exp(e) - (1.0 - label_smoothing) * tl.minimum(u, 0.0) + label_smoothing * tl.maximum(u, 0.0)
    return loss, label_smoothing * sigmoid - (1.0 - label_smoothing) * complement


@triton.jit
def _weighted_pair(difference, side, pair, beta, label_smoothing, weight_ptr, margin_ptr, smoothing_ptr):
    """(loss, d loss / d l_s) of a pair, with s on `side` of it, from r_s − r_partner and the pair's β."""
    # Both programs of a pair compute the same u: r_c − r_r and −(r_r − r_c) are bit-identical.
    u = beta * (side * difference)
    if margin_ptr is not None:
        u -= tl.load(margin_ptr + pair)
    loss, slope = _pair_terms(u, _of_pair(smoothing_ptr, pair, label_smoothing))
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + pair)
        loss *= weight
        beta *= weight
    return loss, beta * side * slope


@triton.jit
def _preference_sigmoid_kernel(
    logps_ptr,
    cu_targets_ptr,
    ref_logps_ptr,
    lengths_ptr,
    token_weights_ptr,
    offsets_ptr,
    entries_ptr,
    weight_ptr,
    margin_ptr,
    beta_ptr,
    smoothing_ptr,
    pair_losses_ptr,
    coefficients_ptr,
    rewards_ptr,
    sequence_logps_ptr,
    beta,
    label_smoothing,
    NORMALIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    logp = _sequence_logp(logps_ptr, token_weights_ptr, cu_targets_ptr, sequence, BLOCK_N)
    ratio = logp
    if ref_logps_ptr is not None:
        ratio = logp - tl.load(ref_logps_ptr + sequence)
    tl.store(sequence_logps_ptr + sequence, logp)
    if beta_ptr is None:
        tl.store(rewards_ptr + sequence, beta * ratio)
    mean_ratio = _per_token(ratio, lengths_ptr, sequence, NORMALIZE)

    coefficient = tl.full((), 0.0, tl.float32)
    first = tl.load(offsets_ptr + sequence).to(tl.int64)
    last = tl.load(offsets_ptr + sequence + 1).to(tl.int64)
    for entry in range(first, last):
        entry_ptr = entries_ptr + entry * 3
        partner = tl.load(entry_ptr).to(tl.int64)
        side = tl.load(entry_ptr + 1)
        pair = tl.load(entry_ptr + 2).to(tl.int64)
        partner_ratio = _sequence_logp(logps_ptr, token_weights_ptr, cu_targets_ptr, partner, BLOCK_N)
        if ref_logps_ptr is not None:
            partner_ratio -= tl.load(ref_logps_ptr + partner)
        partner_ratio = _per_token(partner_ratio, lengths_ptr, partner, NORMALIZE)

        pair_beta = _of_pair(beta_ptr, pair, beta)
        if beta_ptr is not None:
            tl.store(rewards_ptr + 2 * pair + tl.where(side > 0, 0, 1), pair_beta * ratio)
        loss, slope = _weighted_pair(
            mean_ratio - partner_ratio, side, pair, pair_beta, label_smoothing, weight_ptr, margin_ptr, smoothing_ptr
        )
        coefficient += slope
        tl.store(pair_losses_ptr + pair, loss, mask=side > 0)
    coefficient = _per_token(coefficient, lengths_ptr, sequence, NORMALIZE)
    if token_weights_ptr is None:
        tl.store(coefficients_ptr + sequence, coefficient)
    else:
        stop = tl.load(cu_targets_ptr + sequence + 1)
        for start in range(tl.load(cu_targets_ptr + sequence), stop, BLOCK_N):
            rows = start + tl.arange(0, BLOCK_N).to(tl.int64)
            weighted = _weighted(coefficient, token_weights_ptr, rows, rows < stop)
            tl.store(coefficients_ptr + rows, weighted, mask=rows < stop)


@triton.jit
def _preference_sigmoid_ld_kernel(
    logps_ptr,
    cu_targets_ptr,
    ref_logps_ptr,
    lengths_ptr,
    positions_ptr,
    offsets_ptr,
    entries_ptr,
    weight_ptr,
    margin_ptr,
    beta_ptr,
    smoothing_ptr,
    pair_losses_ptr,
    coefficients_ptr,
    rewards_ptr,
    sequence_logps_ptr,
    beta,
    label_smoothing,
    ld_alpha,
    NORMALIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # As _preference_sigmoid_kernel, with sums that differ between the pairs of a sequence. Token coefficients are
    # accumulated in global memory; no other program accesses them.
    sequence = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths_ptr + sequence)
    begin = tl.load(cu_targets_ptr + sequence)
    stop = tl.load(cu_targets_ptr + sequence + 1)
    first = tl.load(offsets_ptr + sequence).to(tl.int64)
    last = tl.load(offsets_ptr + sequence + 1).to(tl.int64)
    for entry in range(first, last):
        entry_ptr = entries_ptr + entry * 3
        partner = tl.load(entry_ptr).to(tl.int64)
        side = tl.load(entry_ptr + 1)
        pair = tl.load(entry_ptr + 2).to(tl.int64)
        shared = tl.minimum(length, tl.load(lengths_ptr + partner)).to(tl.int32)
        own = 2 * pair + tl.where(side > 0, 0, 1)
        other = 2 * pair + tl.where(side > 0, 1, 0)
        logp = _ld_logp(logps_ptr, positions_ptr, cu_targets_ptr, sequence, shared, ld_alpha, BLOCK_N)
        partner_ratio = _ld_logp(logps_ptr, positions_ptr, cu_targets_ptr, partner, shared, ld_alpha, BLOCK_N)
        ratio = logp
        if ref_logps_ptr is not None:
            ratio = logp - tl.load(ref_logps_ptr + own)
            partner_ratio -= tl.load(ref_logps_ptr + other)
        tl.store(sequence_logps_ptr + own, logp)
        pair_beta = _of_pair(beta_ptr, pair, beta)
        tl.store(rewards_ptr + own, pair_beta * ratio)

        ratio = _per_token(ratio, lengths_ptr, sequence, NORMALIZE)
        partner_ratio = _per_token(partner_ratio, lengths_ptr, partner, NORMALIZE)
        loss, slope = _weighted_pair(
            ratio - partner_ratio, side, pair, pair_beta, label_smoothing, weight_ptr, margin_ptr, smoothing_ptr
        )
        tl.store(pair_losses_ptr + pair, loss, mask=side > 0)
        coefficient = _per_token(slope, lengths_ptr, sequence, NORMALIZE)
        for start in range(begin, stop, BLOCK_N):
            offs_n = start + tl.arange(0, BLOCK_N)
            rows = offs_n.to(tl.int64)
            position = tl.load(positions_ptr + rows, mask=offs_n < stop, other=0)
            total = tl.load(coefficients_ptr + rows, mask=offs_n < stop, other=0.0)
            total += tl.where(position < shared, coefficient, ld_alpha * coefficient)
            tl.store(coefficients_ptr + rows, total, mask=offs_n < stop)
        # The next pair reads the coefficients again, possibly in other threads.
        tl.debug_barrier()


def preference_sigmoid(
    logps: torch.Tensor,
    cu_targets: torch.Tensor,
    adjacency: PairAdjacency,
    ref_logps: torch.Tensor | None = None,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    lengths: torch.Tensor | None = None,
    normalize: bool = False,
    positions: torch.Tensor | None = None,
    ld_alpha: float | None = None,
    token_weights: torch.Tensor | None = None,
    of_pairs: PairOptions | None = None,
) -> PreferenceSigmoid:
    """Compute DPO's sigmoid loss of every pair and the coefficient and reward of every sequence, in one launch.

    Args:
        logps: (N,) float32, log-prob of each target in nats (0 where ignored).
        cu_targets: (S+1,) int32 on the device of ``logps``: sequence s owns logps[cu_targets[s]:cu_targets[s+1]].
        adjacency: :func:`pair_adjacency` of the pairs, moved to the same device.
        ref_logps: (S,) float32, the reference's summed log-prob of each sequence in nats, or None for 0. With ld_alpha
            (P, 2), its weighted log-probs of each pair's chosen and rejected response.
        beta: β, finite and above 0.
        label_smoothing: ε in [0, 0.5], the probability that a preference is flipped.
        lengths: (S,) float32 above 0, tokens of each sequence, or their weights' sum; for normalize and ld_alpha.
        normalize: divide r_s by the sequence's length.
        positions: (N,) int32, each target's index in its sequence from 0; required by ld_alpha.
        ld_alpha: weight in [0, 1] of the targets beyond the length of a pair's shorter response, or None for 1.
        token_weights: (N,) float32 of 0 or more, each target's factor in l_s and in its coefficient, or None for 1; not
            with ld_alpha.
        of_pairs: options that pairs have of their own, if any.

    Returns:
        :class:`PreferenceSigmoid`. A NaN log-prob makes NaN of its sequence's values, the losses of that sequence's
        pairs and the coefficients of both sequences of those pairs; other values are unaffected.

    Raises:
        ValueError: a shape, dtype, device or option is not as above.
    """
    if not (beta > 0.0 and math.isfinite(beta)):
        raise ValueError(f"beta: expected a finite number above 0, got {beta!r}")
    if not 0.0 <= label_smoothing <= 0.5:
        raise ValueError(f"label_smoothing: expected a number in [0, 0.5], got {label_smoothing!r}")
    if logps.dim() != 1 or logps.dtype != torch.float32:
        raise ValueError(f"logps: expected (N,) float32, got {tuple(logps.shape)} {logps.dtype}")
    if cu_targets.dim() != 1 or len(cu_targets) == 0:
        raise ValueError(f"cu_targets: expected (S+1,) with S >= 0, got {tuple(cu_targets.shape)}")
    S, P = len(cu_targets) - 1, adjacency.num_pairs
    weighted = ld_alpha is not None
    if ld_alpha is not None and not 0.0 <= ld_alpha <= 1.0:
        raise ValueError(f"ld_alpha: expected a number in [0, 1] or None, got {ld_alpha!r}")
    needed = {"lengths": (lengths, normalize or weighted), "positions": (positions, weighted)}
    missing = [name for name, (tensor, need) in needed.items() if need and tensor is None]
    if missing:
        raise ValueError(f"{' and '.join(missing)}: needed for normalize={normalize}, ld_alpha={ld_alpha}, got None")
    if weighted and token_weights is not None:
        raise ValueError("token_weights: expected None beside ld_alpha, which weights targets itself")
    check_tensor("cu_targets", cu_targets, (S + 1,), (torch.int32,), logps.device)
    check_tensor("adjacency.offsets", adjacency.offsets, (S + 1,), (torch.int32,), logps.device)
    check_tensor("adjacency.entries", adjacency.entries, (2 * P, 3), (torch.int32,), logps.device)
    per_sequence = (P, 2) if weighted else (S,)
    options = of_pairs or PairOptions()
    optional = {
        "ref_logps": (ref_logps, per_sequence, torch.float32),
        "lengths": (lengths, (S,), torch.float32),
        "positions": (positions, logps.shape, torch.int32),
        "token_weights": (token_weights, logps.shape, torch.float32),
        **{f"of_pairs.{name}": (values, (P,), torch.float32) for name, values in options._asdict().items()},
    }
    for name, (tensor, shape, dtype) in optional.items():
        if tensor is not None:
            check_tensor(name, tensor, tuple(shape), (dtype,), logps.device)
    pair_losses = torch.empty(P, dtype=torch.float32, device=logps.device)
    sequence_logps = torch.empty(per_sequence, dtype=torch.float32, device=logps.device)
    rewards = torch.empty_like(sequence_logps) if options.beta is None else logps.new_empty(P, 2)
    # The kernel of ld_alpha adds to them; the other one writes one a sequence, or with token weights one a target.
    coefficients = torch.zeros_like(logps) if weighted else logps.new_empty(S if token_weights is None else len(logps))
    if S > 0:
        kernel = _preference_sigmoid_ld_kernel if weighted else _preference_sigmoid_kernel
        of_targets = positions if weighted else token_weights
        inputs = (logps, cu_targets, ref_logps, lengths, of_targets, *adjacency, *options)
        with launch_guard(kernel, logps, "logps"):
            kernel[(S,)](
                *(None if tensor is None else tensor.contiguous() for tensor in inputs),
                pair_losses,
                coefficients,
                rewards,
                sequence_logps,
                float(beta),
                float(label_smoothing),
                *(() if ld_alpha is None else (float(ld_alpha),)),
                NORMALIZE=normalize,
                BLOCK_N=BLOCK_N,
                num_warps=1,
                **COMPILE_OPTIONS,
            )
    return PreferenceSigmoid(pair_losses, coefficients, rewards, sequence_logps)
