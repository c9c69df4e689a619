"""LigerFusedLinearDPOLoss on dpofast's engine: liger-kernel 0.8.5's constructor, forward and return values.

    from dpofast.integrations.liger import LigerFusedLinearDPOLoss      # instead of liger_kernel.chunked_loss

Differences from liger's: only labelled rows reach the head (counting them is one sync with the device); label_smoothing
applies to "sigmoid" too (conservative DPO), and is refused where a loss has none; a response without tokens counts as 0
and not as NaN; cached reference log-probs are accepted instead of the reference's hidden states and head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dpofast.head.linear_logprobs import linear_logprobs
from dpofast.head.linear_preference import linear_preference_loss
from dpofast.losses.config import PreferenceLoss
from dpofast.losses.functional import preference_loss
from dpofast.losses.sequences import segment_sums

# liger's loss types; dpofast's kinds have the same names.
LOSS_TYPES = (
    "sigmoid",
    "hinge",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
)
_DISCOPOP_TAU = 0.05


class Metrics(NamedTuple):
    """What liger returns beside the loss, in its order, all detached.

    Attributes:
        chosen_logps, rejected_logps: (P,) nats.
        chosen_logits_mean, rejected_logits_mean: scalars, over all positions, ignored ones included, as liger does.
        nll_loss: scalar, 0 unless compute_nll_loss asks for it.
        chosen_rewards, rejected_rewards: (P,).
    """

    chosen_logps: Tensor
    rejected_logps: Tensor
    chosen_logits_mean: Tensor
    rejected_logits_mean: Tensor
    nll_loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


@dataclass(frozen=True, eq=False)
class _Labelled:
    """The N labelled tokens of target (2·P, T), in row order.

    Attributes:
        rows: (N,) int64, their indices into the flattened target.
        targets: (N,) int64.
        lengths: (2·P,) int64, labelled tokens of each response.
        cu_targets: (2·P + 1,) int32 on the CPU.
    """

    rows: Tensor
    targets: Tensor
    lengths: Tensor
    cu_targets: Tensor

    @staticmethod
    def from_target(target: Tensor, ignore_index: int) -> _Labelled:
        labelled = target != ignore_index
        lengths = labelled.sum(1)
        rows = labelled.flatten().nonzero().squeeze(1)
        cu_targets = nn.functional.pad(lengths.cumsum(0), (1, 0)).int().cpu()
        return _Labelled(rows, target.flatten()[rows], lengths, cu_targets)

    def hidden(self, hidden: Tensor) -> Tensor:
        """(N, D) of hidden (2·P, T, D)."""
        return hidden.flatten(0, 1).index_select(0, self.rows)


class LigerFusedLinearDPOLoss(nn.Module):
    """The preference loss of stacked chosen and rejected responses, from hidden states and the LM head."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = _DISCOPOP_TAU,
    ) -> None:
        """Check the options.

        Args:
            ignore_index: the label of tokens that do not count, negative.
            beta: factor of the log-ratios to the reference.
            alpha: weight of the chosen responses' negative log-likelihood, where compute_nll_loss asks for it.
            compute_nll_loss: add that term.
            compiled: no effect: nothing is compiled.
            use_ref_model: False uses 0 as the reference's log-probs.
            average_log_prob: log-probs per token instead of sums, cached ones included.
            chunk_size: no effect: chunks are sized by bytes.
            loss_type: one of LOSS_TYPES, each the kind of PreferenceLoss of that name.
            label_smoothing: the probability that a preference is flipped, for the losses that have one.
            discopop_tau: temperature of "discopop".

        Raises:
            ValueError: an unknown loss type, or an option outside its range.
        """
        super().__init__()
        if loss_type not in LOSS_TYPES:
            raise ValueError(f"loss_type: expected one of {list(LOSS_TYPES)}, got {loss_type!r}")
        options: dict[str, Any] = {} if discopop_tau == _DISCOPOP_TAU else {"discopop_tau": discopop_tau}
        self.loss = PreferenceLoss(kind=loss_type, beta=beta, label_smoothing=label_smoothing, **options)
        self.ignore_index, self.beta, self.alpha = ignore_index, beta, alpha
        self.compute_nll_loss, self.compiled, self.use_ref_model = compute_nll_loss, compiled, use_ref_model
        self.average_log_prob, self.chunk_size, self.loss_type = average_log_prob, chunk_size, loss_type
        self.label_smoothing, self.discopop_tau = label_smoothing, discopop_tau

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        *,
        ref_chosen_logps: Tensor | None = None,
        ref_rejected_logps: Tensor | None = None,
    ) -> tuple[Tensor, Metrics]:
        """The loss, averaged over pairs, and liger's metrics.

        Args:
            lin_weight: (V, D), the head.
            _input: (2·P, T, D) hidden states, chosen responses first, then rejected ones.
            target: (2·P, T) int64, the token that each position predicts, or ignore_index.
            bias: (V,) or None.
            ref_input, ref_weight, ref_bias: the reference's, used without gradient.
            ref_chosen_logps: (P,) the reference's log-probs, nats, instead of ref_input and ref_weight.
            ref_rejected_logps: (P,).

        Returns:
            The loss, a scalar, and Metrics.

        Raises:
            ValueError: shapes that do not fit, a reference that is missing, or given twice.
        """
        if target.dim() != 2 or target.shape[0] % 2 or not target.shape[0] or _input.shape[:2] != target.shape:
            raise ValueError(
                f"_input (2P, T, D) and target (2P, T): expected chosen and rejected rows of equal number, got "
                f"{tuple(_input.shape)} and {tuple(target.shape)}"
            )
        num_pairs = target.shape[0] // 2
        labelled = _Labelled.from_target(target, self.ignore_index)
        targets, cu_targets = labelled.targets, labelled.cu_targets
        first = torch.arange(num_pairs, dtype=torch.int32)
        pairs = torch.stack((first, first + num_pairs), dim=1)

        cached = self._cached_reference(ref_chosen_logps, ref_rejected_logps, num_pairs)
        if cached is not None or not self.use_ref_model:
            if ref_input is not None or ref_weight is not None:
                raise ValueError("ref_input, ref_weight: expected none beside cached log-probs or use_ref_model=False")
            ref_logps = target.new_zeros(len(target), dtype=torch.float32) if cached is None else cached
        else:
            if ref_input is None or ref_weight is None or ref_input.shape[:2] != target.shape:
                raise ValueError(
                    "ref_input (2P, T, D) and ref_weight: expected both, or ref_chosen_logps and ref_rejected_logps, "
                    "with use_ref_model=True"
                )
            with torch.no_grad():
                ref_output = linear_logprobs(labelled.hidden(ref_input), ref_weight, targets, bias=ref_bias)
                ref_logps = self._sequence_logps(ref_output.logps, labelled)

        nll_loss = _input.new_zeros((), dtype=torch.float32)
        if self.average_log_prob or self.compute_nll_loss:  # both need the log-probs of tokens
            token_logps = linear_logprobs(labelled.hidden(_input), lin_weight, targets, bias=bias).logps
            logps = self._sequence_logps(token_logps, labelled)
            output = preference_loss(logps, pairs, ref_logps, loss=self.loss)
            loss = output.loss
            if self.compute_nll_loss:
                chosen_tokens = int(cu_targets[num_pairs])
                nll_loss = -token_logps[:chosen_tokens].sum() / max(chosen_tokens, 1)
                loss = loss + self.alpha * nll_loss
        else:
            output = linear_preference_loss(
                labelled.hidden(_input), lin_weight, targets, cu_targets, pairs, ref_logps, loss=self.loss, bias=bias
            )
            loss = output.loss
        chosen_mean, rejected_mean = _mean_logits(_input.detach(), lin_weight.detach(), bias).chunk(2)
        chosen_logps, rejected_logps = output.logps.chunk(2)
        chosen_rewards, rejected_rewards = output.rewards.chunk(2)
        return loss, Metrics(
            chosen_logps=chosen_logps,
            rejected_logps=rejected_logps,
            chosen_logits_mean=chosen_mean.mean(),
            rejected_logits_mean=rejected_mean.mean(),
            nll_loss=nll_loss.detach(),
            chosen_rewards=chosen_rewards,
            rejected_rewards=rejected_rewards,
        )

    def _sequence_logps(self, token_logps: Tensor, labelled: _Labelled) -> Tensor:
        """(2·P,) sums of token_logps (N,) over each response, or means."""
        sums = segment_sums(token_logps, labelled.cu_targets)
        return sums / labelled.lengths.clamp(min=1) if self.average_log_prob else sums

    def _cached_reference(self, chosen: Tensor | None, rejected: Tensor | None, pairs: int) -> Tensor | None:
        """(2·P,) float32, detached, from both parts; None where there are none."""
        if chosen is None and rejected is None:
            return None
        if not self.use_ref_model:
            raise ValueError("ref_chosen_logps, ref_rejected_logps: expected none with use_ref_model=False")
        if chosen is None or rejected is None or chosen.shape != (pairs,) or rejected.shape != (pairs,):
            got = [None if part is None else tuple(part.shape) for part in (chosen, rejected)]
            raise ValueError(f"ref_chosen_logps, ref_rejected_logps: expected both of shape ({pairs},), got {got}")
        return torch.cat((chosen, rejected)).detach().float()


def _mean_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(2·P,) mean logits over positions and vocabulary, from the means of hidden states and of the head's rows."""
    mean = hidden.mean(1, dtype=torch.float32) @ weight.mean(0, dtype=torch.float32)
    return mean if bias is None else mean + bias.detach().mean(dtype=torch.float32)
