"""The logged metrics, under TRL's names: summed over micro-batches on the device and read back in one transfer.

Per pair (means over pairs): rewards/{chosen,rejected,accuracies,margins}, logps/{chosen,rejected}, kl/{chosen,rejected}
(policy minus reference log-prob per token, nats), lengths/{chosen,rejected} (tokens), displacement (share of pairs
whose chosen response became less likely than under the reference), rewards/ties (share of pairs of equal rewards, which
count as not accurate: before the first step all tie, but for rounding). With ld_alpha or token weights rewards, logps
and kl are of the weighted log-probs, with ld_alpha like TRL's; token weights also stand for tokens below kl. An
evaluation also has LENGTH_METRICS (statistics.py).
Of lists, chosen and rejected are the best and the worst response (those of margins and displacement too), while
rewards/accuracies and rewards/ties are over all strictly ordered pairs of a list, each list counting once, and
LIST_METRICS (list_metrics.py) come with them: rewards/{kendall_tau,ndcg,best_of_k}.
Per token, where the statistics were computed: entropy (nats), logits/{chosen,rejected}, mean_token_accuracy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dpofast.common.names import did_you_mean
from dpofast.common.ranks import Ranks
from dpofast.data.token_rows import has_lists, responses_of
from dpofast.evaluation.list_metrics import LIST_METRICS, list_metrics
from dpofast.evaluation.statistics import LENGTH_METRICS
from dpofast.head.options import LogprobOutput
from dpofast.losses.functional import PreferenceOutput, chosen_and_rejected
from dpofast.losses.sequences import segment_sums
from dpofast.packing.batch import PackedBatch

TOKEN_STATISTICS = ("entropy", "mean_logits", "is_top1")


def evaluation_metrics(*, with_reference: bool, token_statistics: bool, lists: bool = False) -> list[str]:
    """The names that an evaluation's metrics have, without their prefix: what metric_for_best_model may be.

    Args:
        with_reference: rewards are against a reference.
        token_statistics: as DPOConfig's.
        lists: the rows are lists of responses.
    """
    kinds = ["rewards", "logps", "lengths", *(["kl"] if with_reference else [])]
    names = ["loss", "rewards/margins", "rewards/accuracies", "rewards/ties", *LENGTH_METRICS]
    names += [f"{kind}/{side}" for kind in kinds for side in ("chosen", "rejected")]
    names += ["displacement"] if with_reference else []
    names += [f"rewards/{name}" for name in LIST_METRICS] if lists else []
    names += ["entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy"] if token_statistics else []
    return sorted(names)


def check_best_metric(args: Any, with_reference: bool, eval_dataset: Any) -> None:
    """ValueError for a metric_for_best_model that no evaluation has: Trainer would find out after hours."""
    name = args.metric_for_best_model
    if name is None or eval_dataset is None:
        return
    several_sets = isinstance(eval_dataset, dict)
    sets = {f"{part}_": each for part, each in eval_dataset.items()} if several_sets else {"": eval_dataset}
    of_each = {
        part: evaluation_metrics(
            with_reference=with_reference,
            token_statistics=args.token_statistics,
            lists=has_lists(getattr(each, "column_names", None)),
        )
        for part, each in sets.items()
    }
    if name.removeprefix("eval_") not in {part + metric for part, known in of_each.items() for metric in known}:
        known = max(of_each.values(), key=len)
        several = f", each with one of {', '.join(sets)} in front of it" if several_sets else ""
        raise ValueError(
            f"metric_for_best_model: expected one of {', '.join(known)}{several}, got {name!r}"
            + did_you_mean(name, known, {"accuracy": "rewards/accuracies", "margin": "rewards/margins"})
        )


class MetricSums:
    """Weighted sums of named metrics. Sums stay on the device until means() reads them all at once."""

    def __init__(self) -> None:
        """Start empty."""
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, float] = {}

    def add(self, name: str, total: Tensor, weight: float) -> None:
        """Add a scalar sum over `weight` items."""
        self._sums[name] = self._sums[name] + total if name in self._sums else total
        self._weights[name] = self._weights.get(name, 0.0) + weight

    def add_all(self, other: MetricSums) -> None:
        """Add everything that another one holds."""
        for name, total in other._sums.items():
            self.add(name, total, other._weights[name])

    def state_dict(self) -> dict[str, Any]:
        """Returns sums (tensors) and weights by metric, which load_state_dict() restores."""
        return {"sums": dict(self._sums), "weights": dict(self._weights)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the sums by those that state_dict() returned."""
        self._sums, self._weights = dict(state["sums"]), dict(state["weights"])

    def means(self, ranks: Ranks | None = None) -> dict[str, float]:
        """Every metric's sum divided by its weight, as floats: one device-to-host transfer.

        With ranks it is a collective, and the sums are those of all of them.
        """
        totals = torch.stack([total.double() for total in self._sums.values()]).tolist() if self._sums else []
        own = {name: (total, self._weights[name]) for name, total in zip(self._sums, totals, strict=True)}
        joined: dict[str, tuple[float, float]] = {}
        for theirs in [own] if ranks is None else ranks.all_gather(own):
            for name, (total, weight) in theirs.items():
                before, weighed = joined.get(name, (0.0, 0.0))
                joined[name] = (before + total, weighed + weight)
        return {name: total / weight for name, (total, weight) in joined.items()}

    def add_pairs(
        self, output: PreferenceOutput, batch: PackedBatch, beta: float, *, with_reference: bool = True
    ) -> None:
        """Add a micro-batch's metrics per pair, or list; kl and displacement only where rewards have a reference.

        Args:
            output: of the batch.
            batch: its columns say what the rewards are of: their own beta, token weights, lists.
            beta: of the loss.
            with_reference: rewards are against a reference.
        """
        count, columns = len(batch.pairs), batch.columns
        rewards, logps = (output.of_pairs(name, batch.pairs, columns.lists) for name in ("rewards", "logps"))
        tokens = batch.cu_targets.diff()[batch.pairs.long()].to(rewards.device, rewards.dtype, non_blocking=True)
        values = {"rewards": rewards, "logps": logps, "lengths": tokens}
        if with_reference:
            counted = tokens
            if columns.token_weights is not None:
                sums = segment_sums(columns.token_weights, batch.cu_targets).to(rewards.dtype)
                sums = torch.where(sums > 0, sums, 1.0)  # a response that counts not at all has a log-ratio of 0
                counted = chosen_and_rejected(sums, batch.pairs)
            values["kl"] = rewards / ((beta if columns.beta is None else columns.beta[:, None]) * counted)
            self.add("displacement", (rewards[:, 0] < 0).sum(), count)
        for name, value in values.items():
            for side, column in zip(("chosen", "rejected"), value.unbind(1), strict=True):
                self.add(f"{name}/{side}", column.sum(), count)
        margins = rewards[:, 0] - rewards[:, 1]
        self.add("rewards/margins", margins.sum(), count)
        if columns.lists is not None and columns.ranks is not None:
            self._add_lists(output.of_lists("rewards", columns.lists), columns.ranks)
            return
        self.add("rewards/accuracies", (margins > 0).sum(), count)
        self.add("rewards/ties", (margins == 0).sum(), count)

    def _add_lists(self, rewards: Tensor, ranks: Tensor) -> None:
        found = list_metrics(rewards, ranks)
        if count := int(found.ordered.sum()):
            values = {"accuracies" if name == "accuracy" else name: value for name, value in found.values().items()}
            for name, value in values.items():
                self.add(f"rewards/{name}", value.nansum(), count)

    def add_tokens(self, output: LogprobOutput, batch: PackedBatch) -> None:
        """Add a micro-batch's per-token statistics (TOKEN_STATISTICS): over the tokens of every pair, like TRL."""
        if output.entropy is None or output.mean_logits is None or output.is_top1 is None:
            raise ValueError(f"output: expected the statistics {TOKEN_STATISTICS}; ask the model for them by stats=...")
        chosen, rejected = batch.pairs.long().unbind(1)
        lengths = batch.cu_targets.diff()

        def total(values: Tensor, index: Tensor) -> Tensor:
            parts = values.double().split(lengths.tolist())
            return torch.stack([part.sum() for part in parts])[index].sum()

        tokens = {"chosen": int(lengths[chosen].sum()), "rejected": int(lengths[rejected].sum())}
        for side, index in (("chosen", chosen), ("rejected", rejected)):
            self.add("entropy", total(output.entropy, index), tokens[side])
            self.add(f"logits/{side}", total(output.mean_logits, index), tokens[side])
        self.add("mean_token_accuracy", total(output.is_top1, chosen), tokens["chosen"])


def work_avoided(
    examples: Sequence[Mapping[str, Any]], batches: Sequence[PackedBatch], *, padded: bool = False
) -> dict[str, float]:
    """What these micro-batches do not compute of a padded trainer's tokens for the same examples.

    padding_avoided: the share of its rows (2·B of pairs, of lists one a response), as long as the longest, that is
    pads, less those that padded=True computes; sharing_avoided: the share of the real tokens that is shared (what
    sequences begin with alike, last tokens that need no position), 0 with padded=True, which shares nothing.
    """
    prompts = [len(example["prompt_ids"]) for example in examples]
    responses = [[len(ids) for ids in responses_of(example)] for example in examples]
    rows = sum(map(len, responses))
    longest = max(prompt + max(each) for prompt, each in zip(prompts, responses, strict=True))
    all_padded = rows * longest
    if padded:
        return {"padding_avoided": 1 - sum(b.padded_tokens for b in batches) / all_padded, "sharing_avoided": 0.0}
    real = sum(prompt * len(each) + sum(each) for prompt, each in zip(prompts, responses, strict=True))
    computed = sum(batch.num_tokens for batch in batches)
    return {"padding_avoided": 1 - real / all_padded, "sharing_avoided": 1 - computed / real}
