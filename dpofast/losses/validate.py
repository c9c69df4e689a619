"""Argument checks of the preference losses: pairs, reference log-probs and token log-probs."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

import torch
from torch import Tensor

from dpofast.losses.columns import PreferenceColumns
from dpofast.losses.config import PreferenceLoss
from dpofast.losses.kinds import KINDS, SMOOTHING_RANGES
from dpofast.losses.list_kinds import MOST_EXPONENT
from dpofast.losses.own_kinds import kind_of
from dpofast.losses.sequences import Tokens


def check_pairs(
    logps: Tensor, pairs: Tensor, ref_logps: Tensor | None, loss: PreferenceLoss, columns: PreferenceColumns
) -> None:
    """ValueError unless logps and ref_logps are (S,), pairs (P, 2) with P > 0, and (on the CPU) name sequences < S."""
    if logps.dim() != 1 or not logps.is_floating_point():
        raise ValueError(f"logps: expected a float tensor (S,), got {logps.dtype} {tuple(logps.shape)}")
    check_pair_names(pairs, len(logps))
    check_reference(ref_logps, len(logps), len(pairs), loss)
    check_columns(columns, pairs, len(logps), loss)
    if columns.token_weights is not None and loss.needs_lengths:
        raise ValueError(
            f"token_weights: kind {loss.kind!r} divides by lengths, which must be sums of them: use "
            "token_preference_loss or linear_preference_loss, or pass such lengths and "
            "columns._replace(token_weights=None)"
        )


def check_pair_names(pairs: Tensor, sequences: int) -> None:
    """ValueError unless pairs are (P, 2) integers with P > 0 that (looked at on the CPU only) name sequences."""
    if pairs.dim() != 2 or pairs.shape[1] != 2 or pairs.is_floating_point():
        raise ValueError(f"pairs: expected an integer tensor (P, 2), got {pairs.dtype} {tuple(pairs.shape)}")
    if len(pairs) == 0:
        raise ValueError("pairs: expected at least one pair, got none")
    if pairs.is_cpu and not torch.compiler.is_compiling():
        if not (0 <= int(pairs.min()) and int(pairs.max()) < sequences):
            raise ValueError(f"pairs: expected sequence numbers in [0, {sequences}), got {pairs.tolist()}")


def check_reference(ref_logps: Tensor | None, sequences: int, pairs: int, loss: PreferenceLoss) -> None:
    """ValueError if a kind's reference is missing, or has another shape than (S,), with ld_alpha (P, 2)."""
    if ref_logps is None:
        if loss.needs_reference:
            raise ValueError(
                f"ref_logps: kind {loss.kind!r} needs the reference's log-probs, got None: "
                "compute them with the reference model, give rows ref_chosen_logps and ref_rejected_logps, or name a "
                "kind without a reference (simpo, orpo, cpo, sft)"
            )
        return
    shape, reason = ((sequences,), "one a sequence") if loss.ld_alpha is None else ((pairs, 2), "with ld_alpha")
    if ref_logps.shape != shape:
        raise ValueError(f"ref_logps: expected shape {shape}, {reason}, got {tuple(ref_logps.shape)}")


def check_taken(columns: Collection[str], loss: PreferenceLoss) -> None:
    """ValueError for a column (a field of PreferenceColumns) that the loss does not take."""
    kinds = [kind_of(kind) for kind in loss.kinds]
    refused = {
        "margin": not any(kind.margin for kind in kinds),
        "label_smoothing": not any(kind.smoothing for kind in kinds),
        "token_weights": loss.ld_alpha is not None,
    }
    takes = {
        "margin": [name for name, kind in KINDS.items() if kind.margin],
        "label_smoothing": [name for name, kind in KINDS.items() if kind.smoothing],
        "token_weights": ["every kind without ld_alpha, which weights tokens itself"],
    }
    for name in columns:
        if name == "lists" and not loss.of_lists:
            of_lists = [kind for kind, entry in KINDS.items() if entry.lists]
            raise ValueError(
                f"lists: kind {loss.kind!r} is a loss of pairs: turn lists into pairs with list_pairs "
                f"('all', 'best_worst' or 'adjacent'), or take a loss of lists: {', '.join(of_lists)}"
                f"{'' if loss.ld_alpha is None else ', without ld_alpha'}"
            )
        if refused.get(name):
            raise ValueError(f"{name}: kind {loss.kind!r} does not take it; it is for {', '.join(takes[name])}")
    if "lists" in columns and "scores" not in columns and any(kind.scores for kind in kinds):
        raise ValueError(f"scores: kind {loss.kind!r} needs the scores of a list's responses, and there are only ranks")


def check_takes_pairs(loss: PreferenceLoss) -> None:
    """ValueError for a loss that cannot do without the scores of lists, which pairs have not."""
    for name in loss.kinds:
        kind = kind_of(name)
        if kind.scores and not kind.hard_pairs:
            raise ValueError(
                f"scores: kind {name!r} needs scores, and the rows are pairs: give lists of responses with scores, or "
                "declare the function without scores=True, if it does without them where Lists.scores is None"
            )


def check_columns(columns: PreferenceColumns, pairs: Tensor, sequences: int, loss: PreferenceLoss) -> None:
    """ValueError for columns of other shapes, out of range, or that the loss does not take."""
    count = len(pairs)
    for name in ("weight", "margin", "beta", "label_smoothing"):
        value = getattr(columns, name)
        if value is not None and value.shape != (count,):
            raise ValueError(f"{name}: expected shape ({count},), one a pair, got {tuple(value.shape)}")
    check_taken(columns.given, loss)
    _check_ranges(columns, loss)
    lists, ranks, scores = columns.lists, columns.ranks, columns.scores
    if (lists is None) != (ranks is None) or (lists is None and scores is not None):
        raise ValueError("lists: expected beside ranks, and both beside scores")
    if lists is None or ranks is None:
        check_takes_pairs(loss)
        return
    for name, value in (("lists", lists), ("ranks", ranks), ("scores", scores)):
        if value is not None and (value.dim() != 2 or value.shape != (count, lists.shape[1])):
            raise ValueError(f"{name}: expected shape ({count}, K), one row a pair, got {tuple(value.shape)}")
    if torch.compiler.is_compiling():
        return
    if not lists.is_cpu or not ranks.is_cpu:
        raise ValueError(f"lists, ranks: expected on the CPU, got on {lists.device} and {ranks.device}")
    if (
        ((lists < 0) != (ranks < 0)).any()
        or int(lists.max()) >= sequences
        or lists.shape[1] < 2
        or (lists[:, :2] < 0).any()
    ):
        raise ValueError(
            f"lists: expected sequence numbers in [0, {sequences}), two or more a list, filled with -1 where ranks are"
        )
    if scores is not None and scores.is_cpu and "lipo_lambda" in loss.kinds:
        highest = float(scores.max())
        if highest / loss.score_temperature > MOST_EXPONENT:
            raise ValueError(f"scores: {too_large(highest, loss)}, in list {int(scores.amax(1).argmax())}")
    for row, ranking in enumerate(ranks.tolist()):
        given = [rank for rank in ranking if rank >= 0]
        if ranking[: len(given)] != given or given != sorted(given) or set(given) != set(range(given[-1] + 1)):
            raise ValueError(
                "ranks: expected those of a list from 0 up, without gaps, best first, equal where tied, then -1, got "
                f"{ranking} in list {row}"
            )
    ends = torch.cat([lists[:, :1], lists.gather(1, (lists >= 0).sum(1, keepdim=True) - 1)], dim=1)
    if pairs.is_cpu and not torch.equal(ends.long(), pairs.long()):
        raise ValueError("pairs: expected the first and the last sequence of every list, its best and its worst")


def _check_ranges(columns: PreferenceColumns, loss: PreferenceLoss) -> None:
    """ValueError for numbers out of range, where they are on the CPU and not compiled: elsewhere it would be a sync."""
    ranges: list[tuple[str, str, Callable[[float], bool]]] = [
        ("weight", "0 or more", lambda value: 0 <= value < math.inf),
        ("margin", "finite numbers", math.isfinite),
        ("beta", "finite numbers above 0", lambda value: 0 < value < math.inf),
        ("token_weights", "0 or more", lambda value: 0 <= value < math.inf),
    ]
    for kind in loss.kinds:
        if (smoothing := kind_of(kind).smoothing) is not None:
            ranges.append(("label_smoothing", f"numbers in {smoothing} for kind {kind!r}", SMOOTHING_RANGES[smoothing]))
    for name, expected, holds in ranges:
        value = getattr(columns, name)
        if value is None or not value.is_cpu or torch.compiler.is_compiling() or not len(value):
            continue
        # The ranges are intervals, so the ends decide; they are NaN if any value is.
        wrong = [end for end in (float(value.min()), float(value.max())) if not holds(end)]
        if wrong:
            raise ValueError(f"{name}: expected {expected}, got {wrong[0]}")


def too_large(score: float, loss: PreferenceLoss) -> str:
    """What is said of a score whose gain in lipo_lambda is beyond what trains in float32."""
    return (
        f"lipo_lambda's gains are 2^(score/score_temperature): expected exponents of up to {MOST_EXPONENT:g}, got "
        f"{score:g}/{loss.score_temperature:g}; raise --score_temperature to the scores' scale, such as {score:g}"
    )


def check_tokens(
    tokens: Tokens, pairs: Tensor, ref_logps: Tensor | None, loss: PreferenceLoss, columns: PreferenceColumns
) -> None:
    """ValueError unless the loss has what it needs of the tokens, and the pairs fit them."""
    sequences = len(tokens.cu_targets) - 1
    check_pair_names(pairs, sequences)
    check_reference(ref_logps, sequences, len(pairs), loss)
    check_columns(columns, pairs, sequences, loss)
    shapes = {"log_sum_sq_probs": tokens.log_sum_sq, "counted": tokens.counted, "token_weights": tokens.weights}
    for name, tensor in shapes.items():
        if tensor is not None and tensor.shape != tokens.logps.shape:
            raise ValueError(f"{name}: expected shape {tuple(tokens.logps.shape)}, got {tuple(tensor.shape)}")
    if loss.use_weighting and tokens.log_sum_sq is None:
        raise ValueError(f"log_sum_sq_probs: use_weighting of kind {loss.kind!r} needs them, got None")
