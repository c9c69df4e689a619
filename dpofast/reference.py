"""Reference implementations in plain PyTorch that build full logits, in any dtype, float64 included.

They are slow on purpose: kernels, packing and trainer are tested against them, and they hold the formula of every
number that dpofast computes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dpofast.common.constants import IGNORE_INDEX


def scaled_logits(
    logits: Tensor, *, logit_scale: float = 1.0, softcap: float | None = None, temperature: float = 1.0
) -> Tensor:
    """z = softcap·tanh(logit_scale·x/softcap)/temperature for raw logits x (..., V); same dtype."""
    z = logits * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def logprobs(logits: Tensor, targets: Tensor, *, temperature: float = 1.0, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """log softmax(logits/temperature)[target], nats: logits (..., V), targets (...) int64 -> (...); 0 where ignored."""
    ignored = targets == ignore_index
    logp = torch.log_softmax(logits / temperature, dim=-1)
    picked = logp.gather(-1, targets.masked_fill(ignored, 0).unsqueeze(-1)).squeeze(-1)
    return torch.where(ignored, torch.zeros_like(picked), picked)


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """The same from hidden (N, D), weight (V, D), bias (V,): the (N, V) logits are built. Returns (N,)."""
    logits = F.linear(hidden, weight, bias)
    z = scaled_logits(logits, logit_scale=logit_scale, softcap=softcap, temperature=temperature)
    return logprobs(z, targets, ignore_index=ignore_index)


def token_statistics(z: Tensor, targets: Tensor, *, ignore_index: int = IGNORE_INDEX) -> dict[str, Tensor]:
    """Statistics of scaled logits z (N, V): entropy and log Σp² in nats, mean logit, is_top1; 0 where ignored."""
    ignored = targets == ignore_index
    logp = torch.log_softmax(z, dim=-1)
    # 0·(−inf) for a masked-out vocabulary entry is 0 here: the limit of p·log p
    plogp = torch.where(logp == float("-inf"), torch.zeros_like(logp), logp.exp() * logp)
    values = {
        "entropy": -plogp.sum(-1),
        "mean_logits": z.mean(-1),
        "is_top1": z.argmax(-1) == targets,
        "log_sum_sq_probs": torch.logsumexp(2 * logp, dim=-1),
    }
    return {name: torch.where(ignored, torch.zeros_like(value), value) for name, value in values.items()}


def sequence_logprobs(logps: Tensor, cu_targets: Tensor) -> Tensor:
    """Sums of logps (N,) over the sequences [cu[s], cu[s+1]) of cu_targets (S+1,): (S,), nats, summed over tokens."""
    bounds = cu_targets.tolist()
    sums = [logps[start:stop].sum() for start, stop in zip(bounds[:-1], bounds[1:], strict=True)]
    return torch.stack(sums) if sums else logps.new_zeros(0)


def sigmoid_loss(
    logps: Tensor,
    pairs: Tensor,
    ref_logps: Tensor | None = None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """DPO (arXiv 2305.18290, eq. 7) with cDPO's label smoothing; a mean over pairs.

    logps and ref_logps (S,) are summed sequence log-probs, pairs (P, 2) names chosen and rejected sequence.
    Returns (losses (P,), rewards (S,)): reward = beta·(logp − ref_logp), detached.
    """
    logratios = logps if ref_logps is None else logps - ref_logps
    chosen, rejected = pairs.long().to(logps.device).unbind(1)
    margin = beta * (logratios[chosen] - logratios[rejected])
    losses = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    return losses, (beta * logratios).detach()


def preference_loss(
    token_logps: Tensor,
    cu_targets: Tensor,
    pairs: Tensor,
    ref_token_logps: Tensor | None = None,
    *,
    kind: str | Sequence[str] = "sigmoid",
    weights: Sequence[float] | None = None,
    log_sum_sq_probs: Tensor | None = None,
    ld_alpha: float | None = None,
    use_weighting: bool = False,
    rpo_alpha: float | None = None,
    **options: Any,
) -> Tensor:
    """Every loss of dpofast.PreferenceLoss, pair by pair as its paper writes it: a scalar, the mean over pairs.

    token_logps and ref_token_logps (N,) of the sequences of cu_targets (S+1,), nats; log_sum_sq_probs (N,), for
    use_weighting; pairs (P, 2). options are PreferenceLoss's own.
    """
    bounds = cu_targets.tolist()
    ref_token_logps = torch.zeros_like(token_logps) if ref_token_logps is None else ref_token_logps

    def tokens(values: Tensor, sequence: int) -> Tensor:
        return values[bounds[sequence] : bounds[sequence + 1]]

    def weighted_sum(values: Tensor, shorter: int) -> Tensor:
        return values[:shorter].sum() + (1.0 if ld_alpha is None else ld_alpha) * values[shorter:].sum()

    rows, factors = [], []
    for chosen, rejected in pairs.tolist():
        sides = [tokens(token_logps, chosen), tokens(token_logps, rejected)]
        ref_sides = [tokens(ref_token_logps, chosen), tokens(ref_token_logps, rejected)]
        shorter = min(len(side) for side in sides)
        sums = [weighted_sum(side, shorter) for side in (*sides, *ref_sides)]
        lengths = [token_logps.new_tensor(max(len(side), 1)) for side in sides]
        rows.append(torch.stack([*sums, *lengths, sides[0].sum()]))
        factor = token_logps.new_tensor(1.0)
        if use_weighting:
            for side, sequence in zip(sides, (chosen, rejected), strict=True):
                aligned = (side - tokens(log_sum_sq_probs, sequence)).detach()  # type: ignore[arg-type]
                factor = factor * aligned.mean().exp()
        factors.append(factor)
    columns = torch.stack(rows).unbind(1)
    kinds = [kind] if isinstance(kind, str) else kind
    total = sum(
        weight * _kind_losses(name, *columns, **options)
        for name, weight in zip(kinds, weights or [1.0] * len(kinds), strict=True)
    )
    if rpo_alpha is not None:
        total = total - rpo_alpha * columns[6] / columns[4]
    return (total * torch.stack(factors)).mean()


def _kind_losses(
    kind: str,
    pw: Tensor,
    pl: Tensor,
    rw: Tensor,
    rl: Tensor,
    nw: Tensor,
    nl: Tensor,
    chosen_sum: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    ipo_average: bool = True,
    bco_delta: str = "zero",
    discopop_tau: float = 0.05,
    simpo_gamma: float = 0.5,
    cpo_alpha: float = 1.0,
    alpha_po_alpha: float = 0.25,
    dpop_lambda: float = 50.0,
    beta_dpo_alpha: float = 0.6,
    beta_dpo_threshold: float = 0.0,
    score_temperature: float = 1.0,
) -> Tensor:
    """(P,) from policy and reference log-probs and lengths of chosen (w) and rejected (l) responses, (P,) each."""
    ls, sig, e, b = F.logsigmoid, torch.sigmoid, label_smoothing, beta
    w, l = pw - rw, pl - rl  # noqa: E741
    if f_divergence_type == "forward_kl":
        sw, sl = 1 - torch.exp(-w), 1 - torch.exp(-l)
    elif f_divergence_type == "js_divergence":
        sw, sl = math.log(2) + ls(w), math.log(2) + ls(l)
    elif f_divergence_type == "alpha_divergence" and f_alpha_divergence_coef != 1:
        power = f_alpha_divergence_coef - 1
        sw, sl = ((torch.exp(power * u) - 1) / power for u in (w, l))
    else:
        sw, sl = w, l
    x = b * (sw - sl)
    if kind == "sigmoid":
        return -(1 - e) * ls(x) - e * ls(-x)
    if kind == "sigmoid_norm":
        x = b * (sw / nw - sl / nl)
        return -(1 - e) * ls(x) - e * ls(-x)
    if kind == "robust":
        return (-(1 - e) * ls(x) + e * ls(-x)) / (1 - 2 * e)
    if kind == "hinge":
        return torch.relu(1 - x)
    if kind == "ipo":
        return ((sw / nw - sl / nl if ipo_average else sw - sl) - 1 / (2 * b)) ** 2
    if kind == "exo_pair":
        return sig(x) * (ls(x) - math.log(1 - e)) + sig(-x) * (ls(-x) - math.log(e))
    if kind == "discopop":
        m = sig(x / discopop_tau)
        return -ls(x) * (1 - m) + torch.exp(-x) * m
    if kind == "nca_pair":
        return -ls(b * w) - 0.5 * ls(-b * w) - 0.5 * ls(-b * l)
    if kind == "bco_pair":
        shift = b * torch.cat([w, l]).mean().item() if bco_delta == "running_mean" else 0.0
        return -ls(b * w - shift) - ls(-(b * l - shift))
    if kind == "sppo_hard":
        return (w - 1 / (2 * b)) ** 2 + (l + 1 / (2 * b)) ** 2
    if kind == "cal_dpo":
        return -ls(w - l) + 0.5 * ((w - 1 / (2 * b)) ** 2 + (l + 1 / (2 * b)) ** 2)
    if kind == "apo_zero":
        return 1 - sig(b * w) + sig(b * l)
    if kind == "apo_down":
        return sig(b * w) + 1 - sig(b * (w - l))
    if kind in ("aot", "aot_unpaired"):
        upper, lower = (pw - pl, rw - rl) if kind == "aot" else (w, l)
        x = b * (torch.sort(upper).values - torch.sort(lower).values)
        return -(1 - e) * ls(x) - e * ls(-x)
    if kind == "kto_pair":
        kl = max(0.0, torch.cat([w, l]).mean().item())
        return 1 - sig(b * (w - kl)) + 1 - sig(b * (kl - l))
    if kind == "sft":
        return -chosen_sum * len(nw) / nw.sum()
    if kind == "simpo":
        return -ls(b * (pw / nw - pl / nl) - simpo_gamma)
    if kind == "orpo":
        odds = [torch.exp(p / n) / (1 - torch.exp(p / n)) for p, n in ((pw, nw), (pl, nl))]
        return -chosen_sum / nw - b * ls(torch.log(odds[0]) - torch.log(odds[1]))
    if kind == "cpo":
        return -ls(b * (pw - pl)) - cpo_alpha * chosen_sum / nw
    if kind == "alpha_po":
        a = alpha_po_alpha
        if a == 0:
            return -ls(b * (pw / nw - pl / nl) - simpo_gamma)
        better, worse = (b * (1 - torch.exp(p / n) ** -a) / a for p, n in ((pw, nw), (pl, nl)))
        return -ls(better - worse - simpo_gamma)
    if kind == "dpop":
        return -ls(b * (w - l - dpop_lambda * torch.relu(rw - pw)))
    if kind == "beta_dpo":
        rewards = torch.stack([b * w, b * l]).detach()
        mean = (rewards[0] - rewards[1]).sum().item() / len(w)
        return -ls(max(1e-3, (1 + beta_dpo_alpha * (mean - beta_dpo_threshold)) * b) * (w - l))
    # Of lists; a pair is one of two.
    policy, ref = torch.stack([pw, pl], 1), torch.stack([rw, rl], 1)
    rows = zip(policy, ref, strict=True)
    return torch.stack([list_loss(kind, p, r, [0, 1], beta=b, score_temperature=score_temperature) for p, r in rows])


def list_loss(
    kind: str,
    policy: Tensor,
    ref: Tensor,
    ranks: Sequence[int],
    scores: Sequence[float] | None = None,
    *,
    beta: float = 0.1,
    score_temperature: float = 1.0,
) -> Tensor:
    """The loss of one list of K responses, term by term as its paper writes it: a scalar, nats.

    policy and ref (K,) are summed log-probs; ranks: smaller is better, equal ones are tied; scores: larger is better.
    Without scores the responses of the best rank have all that a score would give: as in a pair.
    """
    s = [beta * (policy[i] - ref[i]) for i in range(len(ranks))]
    members = range(len(s))
    best = [i for i in members if ranks[i] == min(ranks)]

    def total(terms: list[Tensor]) -> Tensor:
        return torch.stack(terms).sum() if terms else 0 * policy.sum()

    if kind == "plackett_luce":
        allowed = [order for order in itertools.permutations(members) if [ranks[i] for i in order] == sorted(ranks)]
        losses = []
        for order in allowed:
            rest = [torch.logsumexp(torch.stack([s[j] for j in order[k:]]), 0) for k in members]
            losses.append(total([rest[k] - s[order[k]] for k in range(len(s) - 1)]))
        return torch.stack(losses).mean()
    if kind == "softmax_dpo":
        losses = []
        for w in best:
            against = [s[j] - s[w] for j in members if ranks[j] > ranks[w]]
            losses.append(-F.logsigmoid(-torch.logsumexp(torch.stack(against), 0)) if against else 0 * policy.sum())
        return torch.stack(losses).mean()
    if scores is None:
        psi = [1.0 if i in best else 0.0 for i in members]
        targets = [1 / len(best) if i in best else 0.0 for i in members]
    else:
        psi = [score / score_temperature for score in scores]
        targets = [math.exp(x - max(psi)) / sum(math.exp(y - max(psi)) for y in psi) for x in psi]
    if kind == "infonca":
        every = torch.logsumexp(torch.stack(s), 0)
        return total([-targets[i] * (s[i] - every) for i in members])
    if kind == "nca":
        return total([-targets[i] * F.logsigmoid(s[i]) - F.logsigmoid(-s[i]) / len(s) for i in members])
    if kind == "lipo_lambda":
        places = {i: 1 + place for place, i in enumerate(sorted(members, key=lambda i: -s[i].item()))}
        terms = []
        for i, j in itertools.permutations(members, 2):
            if psi[i] > psi[j]:
                gain = abs((2 ** psi[i] - 1) - (2 ** psi[j] - 1))
                discount = abs(1 / math.log(1 + places[i]) - 1 / math.log(1 + places[j]))
                terms.append(-gain * discount * F.logsigmoid(s[i] - s[j]))
        return total(terms)
    raise ValueError(f"kind: expected one of dpofast.losses.kinds.KINDS, got {kind!r}")


def padded_rows(rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int = 0) -> dict[str, Tensor]:
    """Right-padded rows of (prompt_ids, response_ids): input_ids and its two masks by name, each (B, L) int64."""
    length = max(len(prompt) + len(response) for prompt, response in rows)
    masks = ("attention_mask", "completion_mask")
    padded = {name: torch.zeros(len(rows), length, dtype=torch.int64) for name in masks}
    padded["input_ids"] = torch.full((len(rows), length), pad_id, dtype=torch.int64)
    for b, (prompt, response) in enumerate(rows):
        stop = len(prompt) + len(response)
        padded["input_ids"][b, :stop] = torch.as_tensor([*map(int, prompt), *map(int, response)])
        padded["attention_mask"][b, :stop] = 1
        padded["completion_mask"][b, len(prompt) : stop] = 1
    return padded


def padded_logprobs(
    model: Any, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor, **model_options: Any
) -> Tensor:
    """Log-probs of the completion tokens of right-padded rows (B, L) by the model's own forward and full logits.

    Returns (N,) in row order, the order of a packed batch's targets. model_options go to the model (use_cache, ...).
    """
    logits = model(input_ids=input_ids, attention_mask=attention_mask, **model_options).logits
    targets = input_ids[:, 1:].masked_fill(completion_mask[:, 1:] == 0, IGNORE_INDEX)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return logprobs(wide[:, :-1], targets)[targets != IGNORE_INDEX]
