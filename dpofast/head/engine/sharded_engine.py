"""LM-head engine for a vocabulary that is split over the ranks of a process group: ShardedEngine.

Rank r holds V_r consecutive rows of the (V, D) head; hidden states and targets are the same on all ranks. A rank
multiplies with its own rows alone. In forward three floats per row and rank are gathered,

    m_r = max z,   S_r = Σ exp(z − m_r),   z_y or −inf where another rank owns the target (and the statistics asked for)

and in backward dh (N, D) is all-reduced. With m = max m_r, S = Σ S_r·exp(m_r − m) and an incoming gradient g:

    logp = z_y − m − log S      E = (exp(z − m)/S − onehot(y))·dz/dx, on this rank's columns
    dh = Σ_r −g ⊙ (E·W)         dW = Eᵀ·(−g ⊙ h)         db = −Eᵀ·g

Unlike the other engines' E, this one is divided by S and carries logit_scale/temperature, so RowSums.rescale is −1. It
is written by a second pass over the logits, once m and S are known; its entries are within ±1·dz/dx, so nothing
overflows. float16, in which small probabilities would vanish, keeps E in float32. m and S are
kept apart because one float for m + log S would round every probability by 5e-4 at logits of 1e4. The plan is
HeadPlan's, made for the largest shard, so that all ranks cut the same chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dpofast import reference
from dpofast.head.engine.interface import Gradients, HeadInputs, KeptRows, Needs, RowResult, RowSums
from dpofast.head.engine.matmul import logits_into, product_into
from dpofast.head.engine.online_softmax import rescale_factor
from dpofast.head.engine.row_engine import RowBuffers, RowGradients
from dpofast.head.engine.rows import scale_in_place, scale_rows
from dpofast.head.planning.device import HeadDevice
from dpofast.head.planning.dtypes import scaleless_exp_dtype
from dpofast.head.planning.plan import HeadPlan, chunks, even_chunks


@dataclass(frozen=True)
class VocabShard:
    """This rank's part of a head that is split over the vocabulary, as the ranks agreed on it.

    Attributes:
        group: the process group; its rank order is the order of the shards.
        rank: this process's rank in it.
        sizes: V_r of every rank.
        max_logits_bytes: the least of all ranks'.
        device: what the plan knows of the device: the fewest multiprocessors of all ranks'.
    """

    group: dist.ProcessGroup
    rank: int
    sizes: tuple[int, ...]
    max_logits_bytes: int
    device: HeadDevice

    @property
    def offset(self) -> int:
        """The first id of this rank's rows."""
        return sum(self.sizes[: self.rank])

    @property
    def vocab(self) -> int:
        """V, over all ranks."""
        return sum(self.sizes)


class ShardedEngine:
    """LM-head engine for one call (HeadEngine): this rank's rows of the head; most methods are collectives."""

    def __init__(
        self, inputs: HeadInputs, shard: VocabShard, backend: str, *, keep: bool, largest: int | None = None
    ) -> None:
        """Plan inside the shard's byte budget, and allocate nothing yet.

        keep: the head trains; largest: the most rows whose E must be kept at the same time, None for all.
        """
        options, targets = inputs.options, inputs.targets
        self.inputs, self.shard, self.triton = inputs, shard, backend == "triton"
        self.narrow = scaleless_exp_dtype(inputs.hidden.dtype)
        self.plan = HeadPlan.make(
            len(targets),
            inputs.weight,
            shard.max_logits_bytes,
            keep=keep,
            largest=largest,
            temporaries=_temporaries(inputs, backend),
            vocab=max(shard.sizes),
            device=shard.device,
            narrow=self.narrow,
        )
        self._buffers = RowBuffers(inputs, self.plan, self.narrow)
        self.size = inputs.weight.shape[0]
        local = targets - shard.offset
        self.ignored = inputs.ignored()
        self.owned = (local >= 0) & (local < self.size) & ~self.ignored
        self.invalid = ((targets < 0) | (targets >= shard.vocab)) & ~self.ignored
        self.index = torch.where(self.owned, local, 0)
        # For the kernels: V_r is no column, so a row whose target lies elsewhere has no onehot.
        self.kernel_targets = torch.where(self.owned, local, self.size).masked_fill(self.ignored, options.ignore_index)

    def new_kept(self) -> KeptRows:
        """Uninitialized buffers for the plan's kept rows of E."""
        return self._buffers.new_kept()

    def empty_sums(self, rows: int) -> RowSums:
        """Uninitialized sums of that many rows."""
        new = self.inputs.hidden.new_empty
        return RowSums(*(new(count, dtype=self.inputs.wide) for count in (rows, 0, rows, rows)))

    def remaining_chunks(self, start: int, stop: int) -> list[slice]:
        """Rows [start, stop), which are not kept, in chunks that fit the scratch."""
        return even_chunks(start, stop, self.plan.scratch_rows)

    def logps(self, rows: slice) -> list[RowResult]:
        """Log-probs of any number of consecutive rows, without E: all their sums are gathered at once."""
        sums = []
        for part, z in self._buffers.logits(rows):
            self._logits_into(part, z)
            sums.append(self._local_sums(part, z))
        return [self._result(rows, self._gathered(torch.cat(sums, dim=1)))] if sums else []

    def all_logps(self) -> list[RowResult]:
        """Log-probs of all rows, for a call that needs no gradient."""
        return self.logps(slice(0, len(self.inputs.targets)))

    def keep(self, kept: KeptRows, rows: slice) -> list[RowResult]:
        """Write E of any number of rows into the first rows of kept, a chunk at a time."""
        return self._with_exp(rows, kept.exp)

    def hidden_products(self, products: Tensor) -> list[RowResult]:
        """Write this rank's own E·W into products (N, D).

        They are all-reduced in backward: as many bytes as here, but in one exchange, and in none where no backward
        comes.
        """
        results = []
        for rows in self.remaining_chunks(0, len(self.inputs.targets)):
            exp = self._buffers.exp(rows)
            results += self._with_exp(rows, exp)
            product_into(products[rows], exp, self.inputs.weight, self.plan.upcast_rows)
        return results

    def recomputed_exp(self, rows: slice, sums: RowSums) -> tuple[Tensor, Tensor]:
        """E of at most scratch_rows rows, in the scratch, valid until the next call; and its rescale. No collective."""
        exp = self._buffers.exp(rows)
        for part, z, here in self._buffers.logits_and_exp(rows, exp):
            self._logits_into(part, z)
            known = sums.part(slice(part.start - rows.start, part.stop - rows.start))
            self._exp_into(here, part, z, known.row_max, known.sum_exp)
        return exp, sums.rescale

    def gradients(self, needs: Needs) -> ShardedGradients:
        """Allocate the gradients that are needed."""
        return ShardedGradients(self, needs)

    def all_reduced(self, dh: Tensor) -> Tensor:
        """The sum over ranks of dh (N, D), in float32 or float64, rounded to hidden's dtype; overwrites dh."""
        dist.all_reduce(dh, group=self.shard.group)
        return dh.to(self.inputs.hidden.dtype)

    def _with_exp(self, rows: slice, exp: Tensor) -> list[RowResult]:
        """The results of rows, a chunk at a time, and their E in the first rows of exp."""
        results = []
        for part, z, here in self._buffers.logits_and_exp(rows, exp):
            self._logits_into(part, z)
            results.append(self._result(part, self._gathered(self._local_sums(part, z))))
            self._exp_into(here, part, z, results[-1].sums.row_max, results[-1].sums.sum_exp)
        return results

    def _logits_into(self, rows: slice, out: Tensor) -> None:
        """Write z in torch, and for the kernels raw logits, which they scale on the way in."""
        if self.size == 0:
            return
        logits_into(out, self.inputs.hidden[rows], self.inputs.weight, self.plan.upcast_rows)
        if not self.triton:
            if self.inputs.bias is not None:
                out.add_(self.inputs.bias)
            scale_in_place(out, self.inputs.options, keep_derivative=False)

    def _local_sums(self, rows: slice, z: Tensor) -> Tensor:
        """(3 + statistics, R): m_r, S_r, z_y, and each statistic as if this rank's columns were all there is."""
        names = self.inputs.options.stats
        sums = z.new_zeros(3 + len(names), len(z))
        row_max, sum_exp, target, *stats = sums.unbind()
        if self.size == 0:
            row_max.fill_(torch.finfo(z.dtype).min)
        else:
            fill = self._triton_sums if self.triton else self._torch_sums
            fill(rows, z, row_max, sum_exp, target, dict(zip(names, stats, strict=True)))
        target.masked_fill_(~self.owned[rows], float("-inf"))
        sums[:3].masked_fill_(self.invalid[rows], float("nan"))
        if "is_top1" in names:
            stats[names.index("is_top1")].mul_(self.owned[rows])
        return sums

    def _triton_sums(
        self, rows: slice, x: Tensor, row_max: Tensor, sum_exp: Tensor, target: Tensor, stats: dict[str, Tensor]
    ) -> None:
        from dpofast.kernels.token_logprobs import token_logprobs

        index, options, bias = self.index[rows], self.inputs.options, self.inputs.bias
        safe_targets = index.masked_fill(self.ignored[rows], options.ignore_index)
        result = token_logprobs(x, safe_targets, bias=bias, stats=tuple(stats), **options.kernel_arguments())
        sum_exp.copy_(result.sum_exp)
        # Padding columns of bias −inf may fill a shard: the kernel calls such a row broken, here it adds nothing.
        row_max.copy_(result.row_max.masked_fill(sum_exp == 0, torch.finfo(x.dtype).min))
        for name, value in stats.items():
            value.copy_(result.stats[name])
        picked = x.gather(1, index.unsqueeze(1)).squeeze(1)
        if bias is not None:
            picked.add_(bias[index])
        scale_in_place(picked, options, keep_derivative=False)
        target.copy_(picked)

    def _torch_sums(
        self, rows: slice, z: Tensor, row_max: Tensor, sum_exp: Tensor, target: Tensor, stats: dict[str, Tensor]
    ) -> None:
        index = self.index[rows]
        # From the lowest finite number up, so that a shard of nothing but −inf gives exp(−inf) = 0.
        row_max.copy_(z.amax(dim=1).clamp_(min=torch.finfo(z.dtype).min))
        target.copy_(z.gather(1, index.unsqueeze(1)).squeeze(1))
        for block in chunks(0, len(z), self.plan.temporary_rows):
            sum_exp[block] = (z[block] - row_max[block].unsqueeze(1)).exp_().sum(dim=1)
            if stats:
                values = reference.token_statistics(z[block], index[block])
                for name, value in stats.items():
                    value[block] = values[name]

    def _gathered(self, sums: Tensor) -> Tensor:
        """Gather _local_sums of every rank, and merge them into those of the whole vocabulary: the same shape."""
        gathered = sums.new_empty(len(self.shard.sizes), *sums.shape)
        dist.all_gather(list(gathered.unbind()), sums, self.shard.group)
        row_maxes, exps, targets, *stats = gathered.unbind(1)
        row_max = row_maxes.amax(dim=0)
        exps = exps * rescale_factor(row_maxes, row_max)
        sum_exp = exps.sum(dim=0)
        share = exps / sum_exp  # the probability that falls to each rank
        # where, not times zero: the statistics of a rank without columns or probability may be NaN
        zero, log_share = share == 0, share.log()
        merged = [row_max, sum_exp, targets.amax(dim=0)]
        for name, values in zip(self.inputs.options.stats, stats, strict=True):
            if name == "entropy":
                merged.append(torch.where(zero, 0.0, share * (values - log_share)).sum(dim=0))
            elif name == "log_sum_sq_probs":
                merged.append(torch.where(zero, -torch.inf, 2 * log_share + values).logsumexp(dim=0))
            elif name == "mean_logits":
                sizes = values.new_tensor(self.shard.sizes).unsqueeze(1)
                merged.append((values * sizes).sum(dim=0) / self.shard.vocab)
            else:  # is_top1: among equal maxima the first column counts, so the first rank does
                merged.append(values.gather(0, row_maxes.argmax(dim=0, keepdim=True)).squeeze(0))
        return torch.stack(merged)

    def _result(self, rows: slice, gathered: Tensor) -> RowResult:
        """The result of rows from their sums over the whole vocabulary."""
        names = self.inputs.options.stats
        row_max, sum_exp, target, *stats = gathered.masked_fill(self.ignored[rows], 0.0).unbind()
        logps = (target - row_max - sum_exp.log()).masked_fill_(self.ignored[rows], 0.0)
        rescale = torch.full_like(row_max, -1.0).masked_fill_(self.ignored[rows], 0.0)
        # Copies: the caller's own, beside the views that backward needs.
        values = {
            name: value > 0.5 if name == "is_top1" else value.clone() for name, value in zip(names, stats, strict=True)
        }
        return RowResult(logps, RowSums(rescale, logps.new_empty(0), row_max, sum_exp), values)

    def _exp_into(self, out: Tensor, rows: slice, z: Tensor, row_max: Tensor, sum_exp: Tensor) -> None:
        """Write E into out (R, V_r), zeros where ignored; overwrites z, which _logits_into left, and may be out."""
        if self.size == 0:
            return
        options = self.inputs.options
        if self.triton:
            from dpofast.kernels.token_logprobs import token_logprobs_grad

            minus_one, arguments = torch.full_like(row_max, -1.0), options.kernel_arguments()
            targets = self.kernel_targets[rows]
            token_logprobs_grad(z, targets, row_max, sum_exp, minus_one, out=out, bias=self.inputs.bias, **arguments)
            return
        scale = options.gradient_scale
        onehot = self.owned[rows].to(z.dtype).mul_(-scale)
        for block in chunks(0, len(z), self.plan.temporary_rows):
            e = z[block]
            slope = None
            if options.softcap is not None:
                slope = 1 - (e * (options.temperature / options.softcap)).square_()
            e.sub_(row_max[block].unsqueeze(1)).exp_().mul_((scale / sum_exp[block]).unsqueeze(1))
            e.scatter_add_(1, self.index[rows][block].unsqueeze(1), onehot[block].unsqueeze(1))
            if slope is not None:
                e.mul_(slope)
            out[block] = e.masked_fill_(self.ignored[rows][block].unsqueeze(1), 0.0)


class ShardedGradients:
    """Accumulates this rank's dW and db, and dh, which is all-reduced at the end (GradientAccumulator)."""

    def __init__(self, engine: ShardedEngine, needs: Needs) -> None:
        """Allocate the gradients that are needed."""
        self.engine = engine
        inputs, plan = engine.inputs, engine.plan
        self.dh = torch.zeros_like(inputs.hidden, dtype=inputs.wide) if needs.hidden else None
        blocks = (plan.kept_rows > 0) + len(engine.remaining_chunks(plan.kept_rows, len(inputs.targets)))
        self._own = RowGradients(engine, needs._replace(hidden=False), once=blocks <= 1)

    def add(self, rows: slice, coefficients: Tensor, sums: RowSums, kept: KeptRows | None) -> None:
        """Add the share of the first rows of kept, or of at most scratch_rows rows that are computed again."""
        engine = self.engine
        exp = engine.recomputed_exp(rows, sums)[0] if kept is None else kept.exp[: rows.stop - rows.start]
        if engine.size:
            self._own.add_exp(rows, exp, coefficients)
        if self.dh is not None:
            product = torch.empty_like(engine.inputs.hidden[rows], dtype=engine.narrow)
            product_into(product, exp, engine.inputs.weight, engine.plan.upcast_rows)
            scale_rows(self.dh[rows], product, coefficients, triton=engine.triton)

    def finish(self) -> Gradients:
        """dh of all ranks, and dW and db of this one's rows; None where not needed. A collective where dh is needed."""
        _, dw, db = self._own.finish()
        return None if self.dh is None else self.engine.all_reduced(self.dh), dw, db


def _temporaries(inputs: HeadInputs, backend: str) -> int:
    """Blocks as wide as the shard that the row work holds at once."""
    if backend == "triton":
        return 0
    # Of token_statistics: log p, p, their product, a mask and zeros. Of softcap: its slope, and z/softcap before it.
    return 5 if inputs.options.stats else 2 if inputs.options.softcap is not None else 1
