"""Log-probs from hidden states and a head whose vocabulary is split over the ranks of a process group.

Rank r holds V_r consecutive rows of the (V, D) head; hidden states and targets are the same on all ranks. A rank
multiplies with its own rows alone. In forward three floats per row and rank are exchanged,

    m_r = max z,   S_r = Σ exp(z − m_r),   z_y or −inf where another rank owns the target (and the statistics asked for)

and in backward one (N, D) sum for dh. With m = max m_r, S = Σ S_r·exp(m_r − m) and an incoming gradient g:

    logp = z_y − m − log S      E = (exp(z − m)/S − onehot(y))·dz/dx, on this rank's columns
    dh = Σ_r −g ⊙ (E·W)         dW = Eᵀ·(−g ⊙ h)         db = −Eᵀ·g

E is written by a second pass over the logits, once m and S are known; its entries are within ±1·dz/dx, so nothing
overflows. m and S are kept apart because one float for m + log S would round every probability by 5e-4 at logits of
1e4. Plans and buffers are those of head.py, made for the largest shard, so that all ranks cut the same chunks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dpofast import reference
from dpofast.common.autograd import first_order_only
from dpofast.head.engine.matmul import logits_into
from dpofast.head.engine.row_engine import Gradients, Head, HeadPlan, chunks, scale_rows
from dpofast.head.engine.rows import row_blocks, scale_in_place
from dpofast.head.options import LogitOptions


@dataclass(frozen=True)
class VocabShard:
    """What the ranks agreed on. sizes: V_r of every rank; max_logits_bytes: the least of theirs."""

    group: dist.ProcessGroup
    rank: int
    sizes: tuple[int, ...]
    max_logits_bytes: int

    @property
    def offset(self) -> int:
        """The first id of this rank's rows."""
        return sum(self.sizes[: self.rank])

    @property
    def vocab(self) -> int:
        """V, over all ranks."""
        return sum(self.sizes)


class _ShardedHead(Head):
    """This rank's rows of one call's head, and the two passes over its logits with the exchange between them."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        shard: VocabShard,
        options: LogitOptions,
        backend: str,
        plan: HeadPlan,
    ) -> None:
        super().__init__(hidden, weight, bias, targets, options, backend, plan)
        self.shard, self.triton = shard, backend == "triton"
        self.size = weight.shape[0]
        local = targets - shard.offset
        self.ignored = targets == options.ignore_index
        self.owned = (local >= 0) & (local < self.size) & ~self.ignored
        self.invalid = ((targets < 0) | (targets >= shard.vocab)) & ~self.ignored
        self.index = torch.where(self.owned, local, 0)
        # For the kernels: V_r is no column, so a row whose target lies elsewhere has no onehot.
        self.kernel_targets = torch.where(self.owned, local, self.size).masked_fill(self.ignored, options.ignore_index)

    def chunk(self, rows: slice, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Where the logits of these rows go, and where E: into kept (K, V_r) for its rows, else into the scratch."""
        n = rows.stop - rows.start
        if rows.start >= len(kept):
            return self._logits[:n], self._tile[:n]
        return kept[rows] if self.narrow == self.wide else self._logits[:n], kept[rows]

    def logits(self, rows: slice, out: Tensor) -> None:
        """out <- z in torch, and raw logits for the kernels, which scale them on the way in."""
        if self.size == 0:
            return
        logits_into(out, self.hidden[rows], self.weight, self.plan.upcast_rows)
        if not self.triton:
            if self.bias is not None:
                out.add_(self.bias)
            scale_in_place(out, self.options, keep_derivative=False)

    def local_sums(self, rows: slice, z: Tensor) -> Tensor:
        """(3 + statistics, R): m_r, S_r, z_y, and each statistic as if this rank's columns were all there is."""
        names = self.options.stats
        sums = z.new_zeros(3 + len(names), len(z))
        row_max, sum_exp, target, *stats = sums.unbind()
        if self.size == 0:
            row_max.fill_(torch.finfo(z.dtype).min)
        elif self.triton:
            self._triton_sums(rows, z, row_max, sum_exp, target, dict(zip(names, stats, strict=True)))
        else:
            self._torch_sums(rows, z, row_max, sum_exp, target, dict(zip(names, stats, strict=True)))
        target.masked_fill_(~self.owned[rows], float("-inf"))
        sums[:3].masked_fill_(self.invalid[rows], float("nan"))
        if "is_top1" in names:
            stats[names.index("is_top1")].mul_(self.owned[rows])
        return sums

    def _triton_sums(
        self, rows: slice, x: Tensor, row_max: Tensor, sum_exp: Tensor, target: Tensor, stats: dict[str, Tensor]
    ) -> None:
        from dpofast.kernels.token_logprobs import token_logprobs

        index, options = self.index[rows], self.options
        safe_targets = index.masked_fill(self.ignored[rows], options.ignore_index)
        result = token_logprobs(x, safe_targets, bias=self.bias, stats=tuple(stats), **options.kernel_arguments())
        sum_exp.copy_(result.sum_exp)
        # Padding columns of bias −inf may fill a shard: the kernel calls such a row broken, here it adds nothing.
        row_max.copy_(result.row_max.masked_fill(sum_exp == 0, torch.finfo(x.dtype).min))
        for name, value in stats.items():
            value.copy_(result.stats[name])
        picked = x.gather(1, index.unsqueeze(1)).squeeze(1)
        if self.bias is not None:
            picked.add_(self.bias[index])
        scale_in_place(picked, options, keep_derivative=False)
        target.copy_(picked)

    def _torch_sums(
        self, rows: slice, z: Tensor, row_max: Tensor, sum_exp: Tensor, target: Tensor, stats: dict[str, Tensor]
    ) -> None:
        index = self.index[rows]
        # From the lowest finite number up, so that a shard of nothing but −inf gives exp(−inf) = 0.
        row_max.copy_(z.amax(dim=1).clamp_(min=torch.finfo(z.dtype).min))
        target.copy_(z.gather(1, index.unsqueeze(1)).squeeze(1))
        for block in row_blocks(len(z), self.plan.temporary_rows):
            sum_exp[block] = (z[block] - row_max[block].unsqueeze(1)).exp_().sum(dim=1)
            if stats:
                values = reference.token_statistics(z[block], index[block])
                for name, value in stats.items():
                    value[block] = values[name]

    def exchange(self, sums: Tensor) -> Tensor:
        """local_sums of every rank -> the same over the whole vocabulary, (3 + statistics, R)."""
        gathered = sums.new_empty(len(self.shard.sizes), *sums.shape)
        dist.all_gather(list(gathered.unbind()), sums, self.shard.group)
        row_maxes, exps, targets, *stats = gathered.unbind(1)
        row_max = row_maxes.amax(dim=0)
        exps = exps * (row_maxes - row_max).exp_()
        sum_exp = exps.sum(dim=0)
        share = exps / sum_exp  # the probability that falls to each rank
        # where, not times zero: the statistics of a rank without columns or probability may be NaN
        zero, log_share = share == 0, share.log()
        joined = [row_max, sum_exp, targets.amax(dim=0)]
        for name, values in zip(self.options.stats, stats, strict=True):
            if name == "entropy":
                joined.append(torch.where(zero, 0.0, share * (values - log_share)).sum(dim=0))
            elif name == "log_sum_sq_probs":
                joined.append(torch.where(zero, -torch.inf, 2 * log_share + values).logsumexp(dim=0))
            elif name == "mean_logits":
                sizes = values.new_tensor(self.shard.sizes).unsqueeze(1)
                joined.append((values * sizes).sum(dim=0) / self.shard.vocab)
            else:  # is_top1: among equal maxima the first column counts, so the first rank does
                joined.append(values.gather(0, row_maxes.argmax(dim=0, keepdim=True)).squeeze(0))
        return torch.stack(joined)

    def exp_rows(self, rows: slice, z: Tensor, row_max: Tensor, sum_exp: Tensor, out: Tensor) -> None:
        """out (R, V_r) <- E, zeros where ignored; overwrites z, which is what `logits` left, and may be out."""
        if self.size == 0:
            return
        if self.triton:
            from dpofast.kernels.token_logprobs import token_logprobs_grad

            minus_one, arguments = torch.full_like(row_max, -1.0), self.options.kernel_arguments()
            targets = self.kernel_targets[rows]
            token_logprobs_grad(z, targets, row_max, sum_exp, minus_one, out=out, bias=self.bias, **arguments)
            return
        scale = self.options.gradient_scale
        onehot = self.owned[rows].to(z.dtype).mul_(-scale)
        for block in row_blocks(len(z), self.plan.temporary_rows):
            e = z[block]
            slope = None
            if self.options.softcap is not None:
                slope = 1 - (e * (self.options.temperature / self.options.softcap)).square_()
            e.sub_(row_max[block].unsqueeze(1)).exp_().mul_((scale / sum_exp[block]).unsqueeze(1))
            e.scatter_add_(1, self.index[rows][block].unsqueeze(1), onehot[block].unsqueeze(1))
            if slope is not None:
                e.mul_(slope)
            out[block] = e.masked_fill_(self.ignored[rows][block].unsqueeze(1), 0.0)

    def summed(self, dh: Tensor) -> Tensor:
        """The sum over ranks of dh (N, D), in float32 or float64, rounded to hidden's dtype; overwrites dh."""
        dist.all_reduce(dh, group=self.shard.group)
        return dh.to(self.hidden.dtype)


def _temporaries(options: LogitOptions, backend: str) -> int:
    """Blocks as wide as the shard that the row work holds at once."""
    if backend == "triton":
        return 0
    # Of token_statistics: log p, p, their product, a mask and zeros. Of softcap: its slope, and z/softcap before it.
    return 5 if options.stats else 2 if options.softcap is not None else 1


class VocabParallelLogprobs(torch.autograd.Function):
    """(hidden, weight, bias, targets) -> logps and the statistics named in options; a gradient of logps only."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        shard: VocabShard,
        options: LogitOptions,
        backend: str,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor, ...]:
        """Log-probs (N,), then one (N,) tensor a statistic."""
        need_dh, need_dw, need_db = needs
        trains, N = need_dw or need_db, len(targets)
        plan = HeadPlan.make(
            N,
            weight,
            shard.max_logits_bytes,
            keep=trains,
            temporaries=_temporaries(options, backend),
            vocab=max(shard.sizes),
        )
        head = _ShardedHead(hidden, weight, bias, targets, shard, options, backend, plan)
        kept, _ = head.kept()
        frozen = need_dh and not trains
        # Each rank's own E·W is kept, and summed over the ranks in backward: as many bytes as here, but in one
        # exchange, and in none where no backward comes.
        products = hidden.new_empty(N if frozen else 0, hidden.shape[1], dtype=head.narrow)

        joined, later = [], []
        for rows in chunks(0, plan.kept_rows, plan.step) + chunks(plan.kept_rows, N, plan.scratch_rows):
            z, exp = head.chunk(rows, kept)
            head.logits(rows, z)
            sums = head.local_sums(rows, z)
            if not frozen and rows.start >= plan.kept_rows:
                later.append(sums)  # no E now, so the sums can wait and travel together
                continue
            joined.append(head.exchange(sums))
            head.exp_rows(rows, z, joined[-1][0], joined[-1][1], exp)
            if frozen:
                head.hidden_product(products[rows], exp)
        if later:
            joined.append(head.exchange(torch.cat(later, dim=1)))

        whole = torch.cat(joined, dim=1) if joined else hidden.new_empty(3 + len(options.stats), 0, dtype=head.wide)
        row_max, sum_exp, target, *stats = whole.masked_fill(head.ignored, 0.0).unbind()
        logps = (target - row_max - sum_exp.log()).masked_fill_(head.ignored, 0.0)
        # Copies: a caller may overwrite a statistic, and backward needs its neighbours in `whole` as they are.
        stats = [
            value > 0.5 if name == "is_top1" else value.clone()
            for name, value in zip(options.stats, stats, strict=True)
        ]
        ctx.mark_non_differentiable(*stats)
        ctx.shard, ctx.options, ctx.backend, ctx.plan, ctx.needs = shard, options, backend, plan, needs
        if any(needs):
            ctx.save_for_backward(hidden, weight, bias, targets, row_max, sum_exp, kept, products)
        return (logps, *stats)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad_logps: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """dh (the sum over ranks), dW and db (this rank's rows) for the gradient of logps (N,)."""
        hidden, weight, bias, targets, row_max, sum_exp, kept, products = ctx.saved_tensors
        need_dh, need_dw, need_db = ctx.needs
        plan: HeadPlan = ctx.plan
        head = _ShardedHead(hidden, weight, bias, targets, ctx.shard, ctx.options, ctx.backend, plan)
        # where, not times zero: an ignored row counts as 0 even if its gradient or its hidden state is not finite
        c = torch.where(head.ignored, 0.0, -grad_logps)
        with torch.autocast(hidden.device.type, enabled=False):
            if not (need_dw or need_db):
                return (head.summed(products * c.unsqueeze(1)), *(None,) * 7)
            dh = torch.zeros_like(hidden, dtype=head.wide) if need_dh else None
            flushes = [slice(0, plan.kept_rows)] if plan.kept_rows else []
            flushes += chunks(plan.kept_rows, len(targets), plan.scratch_rows)
            gradients = Gradients(head, (False, need_dw, need_db), flushes=len(flushes))
            for rows in flushes:
                z, exp = head.chunk(rows, kept)
                if rows.start >= plan.kept_rows:
                    head.logits(rows, z)
                    head.exp_rows(rows, z, row_max[rows], sum_exp[rows], exp)
                if head.size:
                    gradients.flush(rows, exp, c[rows])
                if dh is not None:
                    product = torch.empty_like(hidden[rows], dtype=head.narrow)
                    head.hidden_product(product, exp)
                    scale_rows(dh[rows], product, c[rows], plan.step)
            dw, db = gradients.finish()[1:]
            return (None if dh is None else head.summed(dh), dw, db, *(None,) * 5)
