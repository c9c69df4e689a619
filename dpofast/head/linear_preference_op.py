"""Autograd of linear_preference_loss: an autograd.Function, and one torch.library operator for torch.compile.

Both compute loss and gradients in forward (pair_blocks.py); backward multiplies by the upstream scalar. The Function
scales the gradients in place and returns them without a (V, D) copy, and recomputes them for a second backward over a
retained graph. The results of an operator must not be overwritten, so its backward copies the gradients, but
torch.compile traces it without a graph break.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpofast.common.autograd import ReverseModeFunction, check_derivatives, first_order_only, no_second_derivative
from dpofast.common.backend import uses_triton
from dpofast.head.engine.interface import Gradients, Needs
from dpofast.head.engine.rows import scale_tensor
from dpofast.head.engine.sharded_engine import VocabShard
from dpofast.head.linear_logprobs_op import fake_gradients
from dpofast.head.operators import custom_operator, gradients_of
from dpofast.head.options import LogitOptions
from dpofast.head.pair_blocks import PairCall, pair_gradients
from dpofast.head.planning.dtypes import accumulate_dtype
from dpofast.head.validate import check_target_values
from dpofast.losses.columns import PreferenceColumns
from dpofast.losses.config import PreferenceLoss
from dpofast.losses.pairs import StepTotals


class PreferenceArguments(NamedTuple):
    """The operator's arguments, validated by linear_preference_loss. loss: PreferenceLoss.encoded."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    cu_targets: Tensor
    pairs: Tensor
    ref_logps: Tensor | None
    earlier_rewards: Tensor | None
    loss: str
    num_pairs: int
    num_chosen_tokens: float | None
    temperature: float
    logit_scale: float
    softcap: float | None
    ignore_index: int
    backend: str
    max_logits_bytes: int | None
    need_dh: bool
    need_dw: bool
    need_db: bool

    @property
    def needs(self) -> Needs:
        """Which gradients are needed: an operator does not know what its caller's tensors require."""
        return Needs(self.need_dh, self.need_dw, self.need_db)

    def call(self, columns: PreferenceColumns, loss: PreferenceLoss, shard: VocabShard | None = None) -> PairCall:
        """The call that these arguments and the columns are, of the loss that `self.loss` encodes."""
        return PairCall(
            targets=self.targets,
            cu_targets=self.cu_targets,
            pairs=self.pairs,
            ref_logps=self.ref_logps,
            columns=columns,
            loss=loss,
            totals=StepTotals(self.num_pairs, self.num_chosen_tokens, self.earlier_rewards),
            options=LogitOptions(self.temperature, self.logit_scale, self.softcap, self.ignore_index, loss_stats(loss)),
            backend=self.backend,
            max_logits_bytes=self.max_logits_bytes,
            shard=shard,
        )


class PreferenceResults(NamedTuple):
    """The operator's results: loss scalar; losses, logps and rewards as in PreferenceOutput; gradients, or (0,)."""

    loss: Tensor
    losses: Tensor
    logps: Tensor
    rewards: Tensor
    dh: Tensor
    dw: Tensor
    db: Tensor


def loss_stats(loss: PreferenceLoss) -> tuple[str, ...]:
    """What the loss needs to know of a row beside its log-prob."""
    return ("log_sum_sq_probs",) if loss.use_weighting else ()


def preference(
    arguments: PreferenceArguments, columns: PreferenceColumns, loss: PreferenceLoss, shard: VocabShard | None = None
) -> tuple[Tensor, ...]:
    """PreferenceOutput's loss, losses, logps and rewards; arguments encode `loss`. The first is differentiable.

    shard: this rank's part of a head that is split over the vocabulary; every rank calls this then.
    """
    tensors = (arguments.hidden, arguments.weight, arguments.bias)
    check_derivatives(*tensors, arguments.ref_logps, arguments.earlier_rewards)
    if shard is None and torch.compiler.is_compiling():
        return linear_preference_op(*arguments, *columns)[:4]
    return LinearPreference.apply(*tensors, arguments.call(columns, loss, shard), arguments.needs)


class LinearPreference(ReverseModeFunction):
    """(hidden, weight, bias) -> loss, losses, logps, rewards; the first is differentiable."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: PairCall, needs: Needs
    ) -> tuple[Tensor, ...]:
        """Compute loss and gradients."""
        values, gradients = _values_and_gradients(hidden, weight, bias, call, needs)
        ctx.mark_non_differentiable(*values[1:])
        ctx.save_for_backward(hidden, weight, bias)
        ctx.call, ctx.needs, ctx.gradients = call, needs, gradients
        return values

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Any, ...]:  # type: ignore[override]
        """Scale the gradients in place and return them without a (V, D) copy; a second backward recomputes them."""
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            hidden, weight, bias = ctx.saved_tensors
            gradients = pair_gradients(hidden, weight, bias, ctx.call, ctx.needs)[1]
        if not (grad_loss.is_cpu and grad_loss.item() == 1.0):
            for gradient in gradients:
                if gradient is not None:
                    scale_tensor(gradient, grad_loss, triton=uses_triton(ctx.call.backend))
        return (*gradients, None, None)


def _values_and_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, call: PairCall, needs: Needs
) -> tuple[tuple[Tensor, ...], Gradients]:
    vocab = weight.shape[0] if call.shard is None else call.shard.vocab
    check_target_values(call.targets, vocab, call.options.ignore_index)
    terms, gradients = pair_gradients(hidden, weight, bias, call, needs)
    return (terms.losses.sum() / call.totals.num_pairs, terms.losses, terms.logps, terms.rewards), gradients


def _forward(arguments: PreferenceArguments, columns: PreferenceColumns) -> PreferenceResults:
    hidden, call = arguments.hidden, arguments.call(columns, PreferenceLoss.decode(arguments.loss))
    values, gradients = _values_and_gradients(hidden, arguments.weight, arguments.bias, call, arguments.needs)
    return PreferenceResults(*values, *(hidden.new_empty(0) if x is None else x for x in gradients))


def _fake_forward(arguments: PreferenceArguments, columns: PreferenceColumns) -> PreferenceResults:
    hidden, pairs = arguments.hidden, arguments.pairs.shape[0]

    def wide(*shape: int) -> Tensor:
        return hidden.new_empty(shape, dtype=accumulate_dtype(hidden.dtype))

    weighted = PreferenceLoss.decode(arguments.loss).ld_alpha is not None
    sums = (pairs, 2) if weighted else (arguments.cu_targets.shape[0] - 1,)
    rewards = sums if columns.beta is None else (pairs, 2 if columns.lists is None else columns.lists.shape[1])
    gradients = fake_gradients(hidden, arguments.weight, arguments.needs)
    return PreferenceResults(wide(), wide(pairs), wide(*sums), wide(*rewards), *gradients)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    results = PreferenceResults(*output)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(results.dh, results.dw, results.db)
    ctx.needs = PreferenceArguments(*inputs[: len(PreferenceArguments._fields)]).needs


def _backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    dh, dw, db = (
        scale_gradient_op(gradient, grad_loss) if need else None
        for gradient, need in zip(ctx.saved_tensors, ctx.needs, strict=True)
    )
    return (*gradients_of(PreferenceArguments, hidden=dh, weight=dw, bias=db), *gradients_of(PreferenceColumns))


@torch.library.custom_op("dpofast::scale_gradient", mutates_args=())
def scale_gradient_op(gradient: Tensor, scale: Tensor) -> Tensor:
    """gradient · scale, an operator of its own so that differentiating it again raises."""
    return gradient * scale.to(gradient.dtype)


@scale_gradient_op.register_fake
def _(gradient: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(gradient)


linear_preference_op = custom_operator(
    "dpofast::linear_preference",
    (PreferenceArguments, PreferenceColumns),
    len(PreferenceResults._fields),
    _forward,
    _fake_forward,
)
linear_preference_op.register_autograd(_backward, setup_context=_setup_context)
scale_gradient_op.register_autograd(no_second_derivative)
