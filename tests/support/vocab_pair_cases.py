"""Cases of linear_preference_loss with a head that is split over ranks, against float64 on the whole head."""

import itertools

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from bench.cost import Cost
from dpofast import PreferenceLoss, linear_preference_loss, reference
from dpofast.losses.functional import token_preference_loss
from dpofast.losses.sequences import pair_logprobs
from tests.support.distributed_cases import SIZES, SOFTCAP, VOCAB, case, inputs, joined, own_rows
from tests.support.losses_cases import LOSSES

LENGTHS = (5, 3, 1, 7, 0, 4, 2, 6)
# A chain, an interleaved couple of pairs, and a sequence that no pair names; the fifth is empty.
PAIRS = torch.tensor([[0, 1], [3, 2], [3, 5], [6, 4]], dtype=torch.int32)
CU_TARGETS = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32)


def pair_inputs(dtype=torch.float32):
    """Hidden states, weight and bias of the whole head, targets, and reference log-probs of the sequences."""
    *tensors, targets, _ = inputs(n=sum(LENGTHS), dtype=dtype)
    return tensors, targets, torch.linspace(-12, -3, len(LENGTHS))


def reference_of(loss, ref, targets):
    """Reference log-probs as the loss takes them."""
    if not loss.needs_reference:
        return None
    if loss.ld_alpha is None:
        return ref
    tokens = -torch.rand(len(targets), generator=torch.Generator().manual_seed(3))
    return pair_logprobs(tokens, CU_TARGETS, PAIRS, ld_alpha=loss.ld_alpha)


def whole(tensors, targets, ref, loss, upstream, **options):
    """Return the output, and gradients of upstream · loss, in float64 from the logits of the whole head."""
    leaves = [tensor.detach().double().requires_grad_() for tensor in tensors]
    z = reference.scaled_logits(torch.nn.functional.linear(*leaves[:2], leaves[2]), **options)
    logps = reference.logprobs(z, targets)
    stats = reference.token_statistics(z.detach(), targets) if loss.use_weighting else {}
    output = token_preference_loss(
        logps,
        CU_TARGETS,
        PAIRS,
        ref,
        loss=loss,
        num_pairs=7,
        counted=targets != -100,
        log_sum_sq_probs=stats.get("log_sum_sq_probs"),
    )
    (output.loss * upstream).backward()
    return output, [leaf.grad for leaf in leaves]


def split(tensors, targets, ref, loss, upstream, sizes, needs=(1, 1, 1), **options):
    """Return the output, and gradients of hidden and of the gathered head, None where not needed."""
    own = tensors[0].clone(), *(own_rows(tensor, sizes) for tensor in tensors[1:])
    hidden, weight, bias = (leaf.requires_grad_(bool(need)) for leaf, need in zip(own, needs, strict=True))
    output = linear_preference_loss(
        hidden,
        weight,
        targets,
        CU_TARGETS,
        PAIRS,
        ref,
        loss=loss,
        num_pairs=7,
        bias=bias,
        process_group=dist.group.WORLD,
        **options,
    )
    if any(needs):
        (output.loss * upstream).backward()
    return output, [hidden.grad, *(None if leaf.grad is None else joined(leaf.grad) for leaf in (weight, bias))]


@case
def pairs_of_many_losses():
    """Losses, log-probs, rewards and gradients of many kinds and modifiers, in flushes of a few rows."""
    sizes = SIZES[dist.get_world_size()][0]
    for name in sorted({*list(LOSSES)[:: dist.get_world_size() + 2], "aot", "sigmoid weighted", "sigmoid ld"}):
        settings = LOSSES[name]
        loss = PreferenceLoss(**settings)
        tensors, targets, ref = pair_inputs(torch.float64)
        ref = reference_of(loss, ref, targets)
        expected, true_grads = whole(tensors, targets, ref, loss, 1.7)
        got, grads = split(tensors, targets, ref, loss, 1.7, sizes, max_logits_bytes=18 * max(sizes) * 8)
        for field in ("loss", "losses", "logps", "rewards"):
            ours, theirs = (getattr(output, field).detach().double() for output in (got, expected))
            torch.testing.assert_close(
                ours, theirs, atol=1e-6, rtol=1e-6, msg=lambda m, n=name, f=field: f"{n} {f} {m}"
            )
        for ours, true in zip(grads, true_grads, strict=True):
            torch.testing.assert_close(
                ours, true, atol=1e-6 * float(true.abs().max()), rtol=1e-6, msg=lambda m, n=name: f"{n} {m}"
            )


@case
def pairs_in_every_plan():
    """Frozen and trained heads, every budget and split, softcap and temperature; both backends; a second backward."""
    loss = PreferenceLoss(beta=0.3)
    for dtype, backend in ((torch.float64, "torch"), (torch.float32, "torch"), (torch.float32, "triton")):
        tensors, targets, ref = pair_inputs(dtype)
        tolerance = 1e-9 if dtype == torch.float64 else 2e-5
        for options in ({}, SOFTCAP):
            _, true_grads = whole(tensors, targets, ref, loss, 0.5, **options)
            plans = itertools.product(
                SIZES[dist.get_world_size()], (8, 16, 1000), ((0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 1))
            )
            for sizes, rows, needs in list(plans)[:: {torch.float64: 1}.get(dtype, 7 if backend == "torch" else 23)]:
                budget = {"max_logits_bytes": rows * max(sizes) * 8, "backend": backend}
                _, grads = split(tensors, targets, ref, loss, 0.5, sizes, needs, **budget, **options)
                for ours, need, true in zip(grads, needs, true_grads, strict=True):
                    assert (ours is not None) == bool(need)
                    if need:
                        scale = float(true.abs().max())
                        torch.testing.assert_close(ours.double(), true, atol=tolerance * scale, rtol=tolerance)


@case
def pairs_take_three_gemms():
    """Of this rank's rows: logits, dh and dW once each, though the budget holds 20 of 28 rows; of a frozen head 2."""
    (hidden, weight, _), targets, ref = pair_inputs()
    sizes = SIZES[dist.get_world_size()][0]
    pairs = torch.tensor([[1, 2], [5, 6]], dtype=torch.int32)
    for trained, units in ((True, 3), (False, 2)):
        leaves = hidden.clone().requires_grad_(), own_rows(weight, sizes).requires_grad_(trained)
        with Cost() as cost:
            output = linear_preference_loss(
                *leaves,
                targets,
                CU_TARGETS,
                pairs,
                ref,
                process_group=dist.group.WORLD,
                max_logits_bytes=20 * max(sizes) * 4,
            )
            output.loss.backward()
        assert cost.gemm_flops == units * 2 * hidden.numel() * sizes[dist.get_rank()]


@case
def pairs_with_a_sharded_parameter():
    tensors, targets, ref = pair_inputs()
    mesh, loss = init_device_mesh("cpu", (dist.get_world_size(),)), PreferenceLoss(beta=0.3)
    weight, bias = (torch.nn.Parameter(distribute_tensor(tensor, mesh, [Shard(0)])) for tensor in tensors[1:])
    hidden = tensors[0].clone().requires_grad_()
    output = linear_preference_loss(hidden, weight, targets, CU_TARGETS, PAIRS, ref, loss=loss, num_pairs=7, bias=bias)
    output.loss.backward()
    _, true_grads = whole(tensors, targets, ref, loss, 1.0)
    assert isinstance(weight.grad, DTensor) and weight.grad.placements == (Shard(0),)
    for ours, true in zip((hidden.grad, weight.grad.full_tensor(), bias.grad.full_tensor()), true_grads, strict=True):
        torch.testing.assert_close(ours.double(), true, atol=1e-5, rtol=1e-5)


@case
def pairs_that_differ_between_ranks():
    tensors, targets, ref = pair_inputs()
    sizes = SIZES[dist.get_world_size()][0]
    last = dist.get_rank() == dist.get_world_size() - 1
    own = tensors[0], own_rows(tensors[1], sizes)
    group = {"process_group": dist.group.WORLD}

    def refused(message, **change):
        arguments = {"targets": targets, "cu_targets": CU_TARGETS, "pairs": PAIRS, "ref_logps": ref, **change}
        with pytest.raises(ValueError, match=message):
            linear_preference_loss(*own, **arguments, **group)
        dist.barrier()

    swapped = PAIRS.flip(1) if last else PAIRS
    refused("cu_targets, pairs: expected the same on every rank of process_group", pairs=swapped)
    other = PreferenceLoss(beta=0.2 if last else 0.1)
    refused("loss, num_pairs.*: expected the same on every rank", loss=other)
    missing = torch.tensor([[0, 99]], dtype=torch.int32) if last else PAIRS
    refused("pairs: " if last else "refused their arguments", pairs=missing)
    strays = targets.clone()
    strays[1] = VOCAB
    refused(rf"targets: expected ids in \[0, {VOCAB}\)", targets=strays)
    refused("backend: expected 'torch' with process_group", backend="reference")
