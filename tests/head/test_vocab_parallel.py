"""Vocabulary-parallel heads on gloo ranks: what they exchange, agree on and refuse; distributed_cases has the numbers.

One start per world size runs every case on every rank; a test then looks at what the ranks wrote. A rank that waits
for another longer than TIMEOUT fails, and with it the case.
"""

import functools
import json
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from bench.cost import Cost
from dpofast.head.vocab_parallel import from_dtensor
from tests.support.distributed_cases import (
    CASES,
    SIZES,
    VOCAB,
    call,
    case,
    gradients,
    inputs,
    own_rows,
    relative_error,
    truth_of,
)
from tests.support.rank_processes import rank_context
from tests.support.vocab_pair_cases import LENGTHS  # noqa: F401 (registers its cases)

pytestmark = pytest.mark.slow(80)

TIMEOUT = timedelta(seconds=60)
WORLDS = (2, 4)


def raises(message, function, error=ValueError):
    """Every rank raises, so that nobody waits; the call after it shows that the group is still in step."""
    with pytest.raises(error, match=message):
        function()
    dist.barrier()


@case
def a_group_of_some_ranks():
    members = list(range(1, dist.get_world_size()))
    group = dist.new_group(members, timeout=TIMEOUT)
    if dist.get_rank() not in members:
        return
    *tensors, targets, upstream = inputs()
    cuts = [VOCAB // len(members)] * (len(members) - 1)
    local = [tensor.split([*cuts, VOCAB - sum(cuts)])[dist.get_rank(group)] for tensor in tensors[1:]]
    truth, true_grads = truth_of(tensors, targets, upstream)
    logps, (dh, *_) = gradients(
        lambda h, w, b: call(h, w, targets, b, group=group).logps, (tensors[0], *local), upstream
    )
    assert relative_error(logps, truth) < 1e-6
    torch.testing.assert_close(dh.double(), true_grads[0], atol=1e-5, rtol=1e-5)


@case
def exchanges_and_gemms():
    """One exchange of integers; floats once a chunk where E needs them at once, and otherwise once in all."""
    hidden, weight, _, targets, upstream = inputs(n=20)
    sizes = SIZES[dist.get_world_size()][0]
    unit = 2 * hidden.numel() * sizes[dist.get_rank()]
    # Frozen: four chunks of 5 rows, and a temporary. Trained: 4 rows of scratch, 4 kept, 16 recomputed; c·h for each,
    # a temporary and db.
    vocab, width = max(sizes), hidden.shape[1]
    few, half = 6 * vocab, 8 * (vocab + width) + 2 * vocab
    for needs, floats, gathers, reduces, gemms in (
        ((0, 0), few, 2, 0, 1),
        ((1, 0), few, 1 + 4, 1, 2),
        ((1, 1), half, 1 + 1 + 1, 1, 3 + 16 / 20),
        ((0, 1), half, 1 + 1 + 1, 0, 2 + 16 / 20),
    ):
        h, w = hidden.clone().requires_grad_(bool(needs[0])), own_rows(weight, sizes).requires_grad_(bool(needs[1]))
        with (
            mock.patch.object(dist, "all_gather", wraps=dist.all_gather) as gather,
            mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduce,
            Cost() as cost,
        ):
            logps = call(h, w, targets, max_logits_bytes=floats * 4).logps
            if any(needs):
                logps.backward(upstream)
        assert (gather.call_count, reduce.call_count) == (gathers, reduces), needs
        assert cost.gemm_flops == pytest.approx(gemms * unit), needs


@case
def sharded_parameter():
    *tensors, targets, upstream = inputs(vocab=4 * dist.get_world_size() + 1)  # uneven; at world 4: 5, 5, 5, 2
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weight, bias = (torch.nn.Parameter(distribute_tensor(tensor, mesh, [Shard(0)])) for tensor in tensors[1:])
    (local, group), (local_bias, _) = from_dtensor(weight), from_dtensor(bias, name="bias")
    hidden = tensors[0].clone().requires_grad_()
    logps = call(hidden, local, targets, local_bias, group=group).logps
    logps.backward(upstream)
    truth, true_grads = truth_of(tensors, targets, upstream)
    assert relative_error(logps.detach(), truth) < 1e-6
    assert isinstance(weight.grad, DTensor) and weight.grad.placements == (Shard(0),)
    for ours, true in zip((hidden.grad, weight.grad.full_tensor(), bias.grad.full_tensor()), true_grads, strict=True):
        torch.testing.assert_close(ours.double(), true, atol=1e-5, rtol=1e-5)

    replicated = torch.nn.Parameter(distribute_tensor(tensors[1], mesh, [Replicate()]))
    local, group = from_dtensor(replicated)
    assert group is None and torch.equal(local, tensors[1])
    local.sum().backward()
    assert replicated.grad.placements == (Replicate(),)


@case
def refused_placements():
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    square = init_device_mesh("cpu", (world // 2, 2))
    weight = torch.randn(8, 8)
    message = r"weight: expected a DTensor with Shard\(0\) or Replicate on a one-dimensional mesh"
    raises(message, lambda: from_dtensor(distribute_tensor(weight, mesh, [Shard(1)])))
    raises(message, lambda: from_dtensor(DTensor.from_local(weight, mesh, [Partial()])))
    raises(message, lambda: from_dtensor(distribute_tensor(weight, square, [Replicate(), Shard(0)])))
    backwards = DeviceMesh("cpu", list(reversed(range(world))))
    raises(
        "bias: expected a mesh in the order of its process group",
        lambda: from_dtensor(distribute_tensor(weight, backwards, [Shard(0)]), name="bias"),
    )


@case
def differences_between_ranks():
    hidden, weight, bias, targets, _ = inputs()
    sizes = SIZES[dist.get_world_size()][0]
    local, local_bias = own_rows(weight, sizes), own_rows(bias, sizes)
    last = dist.get_rank() == dist.get_world_size() - 1
    name = "expected the same on every rank of process_group"
    narrow, wide = (slice(None), slice(0, 7)) if last else (slice(None), slice(None)), 3 if last else None
    raises(rf"hidden \(N, D\): {name}", lambda: call(hidden[:wide], local, targets[:wide]))
    raises(rf"hidden \(N, D\): {name}", lambda: call(hidden[narrow], local[narrow], targets))
    half = torch.bfloat16 if last else torch.float32
    raises(f"the dtype of hidden: {name}", lambda: call(hidden.to(half), local.to(half), targets))
    raises(f"temperature.*stats: {name}", lambda: call(hidden, local, targets, temperature=2.0 if last else 1.0))
    raises(f"bias, given or None: {name}", lambda: call(hidden, local, targets, local_bias if last else None))
    trained = local.clone().requires_grad_(last)
    raises(f"require a gradient: {name}", lambda: call(hidden, trained, targets))
    swapped = targets.clone()
    if last:
        swapped[[1, 2]] = targets[[2, 1]]
    raises(f"targets: {name}", lambda: call(hidden, local, swapped))


@case
def refused_arguments():
    hidden, weight, bias, targets, _ = inputs()
    sizes = SIZES[dist.get_world_size()][0]
    local = own_rows(weight, sizes)
    last = dist.get_rank() == dist.get_world_size() - 1
    # One rank's argument is wrong: it says what, and all others that it did.
    wrong = hidden[:, :5] if last else hidden
    raises("expected equal D" if last else "refused their arguments", lambda: call(wrong, local, targets))
    wrong = "triton?" if last else "torch"
    raises("backend: expected" if last else "refused", lambda: call(hidden, local, targets, backend=wrong))
    sparse = local.to_sparse() if last else local
    error = TypeError if last else ValueError
    raises("weight: expected a plain" if last else "refused", lambda: call(hidden, sparse, targets), error)
    # Wrong everywhere.
    raises("targets: expected int64", lambda: call(hidden, local, targets.int()))
    raises("targets: expected shape", lambda: call(hidden, local, targets[1:]))
    raises("bias: expected shape", lambda: call(hidden, local, targets, bias))
    for outside in (VOCAB, -1):
        strays = targets.clone()
        strays[2] = outside
        raises(
            rf"targets: expected ids in \[0, {VOCAB}\).*got {outside} at position 2",
            lambda t=strays: call(hidden, local, t),
        )
    raises("backend: expected 'torch' with process_group", lambda: call(hidden, local, targets, backend="reference"))
    raises(
        "or 'triton' for other dtypes than float64",
        lambda: call(hidden.double(), local.double(), targets, backend="triton"),
    )
    raises("weight: expected at least one row over all ranks", lambda: call(hidden, local[:0], targets))
    raises("max_logits_bytes: expected at least one row", lambda: call(hidden, local, targets, max_logits_bytes=8))
    raises("process_group: expected a torch", lambda: call(hidden, local, targets, group="world"), TypeError)


@case
def first_derivatives_only():
    hidden, weight, _, targets, _ = inputs()
    hidden.requires_grad_()
    logps = call(hidden, own_rows(weight, SIZES[dist.get_world_size()][0]), targets).logps
    (gradient,) = torch.autograd.grad(logps.sum(), hidden, create_graph=True)
    raises("first derivatives only", lambda: gradient.sum().backward(), RuntimeError)


def _rank(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world, timeout=TIMEOUT
    )
    outcomes = {}
    for name, function in CASES.items():
        started = time.perf_counter()
        try:
            function()
            outcomes[name] = ""
        except Exception:
            outcomes[name] = traceback.format_exc()
        Path(folder, f"{rank}.json").write_text(json.dumps(outcomes))
        if rank == 0:
            print(f"{world} ranks: {name} {time.perf_counter() - started:.2f} s")
    dist.destroy_process_group()


@functools.cache
def outcomes(world):
    """What each rank wrote: {case: traceback or ''}. Ranks that never come back are stopped."""
    context = rank_context()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=_rank, args=(rank, world, folder)) for rank in range(world)]
        for process in ranks:
            process.start()
        deadline = time.monotonic() + 3 * TIMEOUT.total_seconds()
        for process in ranks:
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()
        written = (Path(folder, f"{rank}.json") for rank in range(world))
        return [json.loads(path.read_text()) if path.exists() else {} for path in written]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", CASES)
def test_on_every_rank(name, world):
    for rank, written in enumerate(outcomes(world)):
        failure = written.get(name, "did not finish: a deadlock, or the process died")
        assert not failure, f"rank {rank} of {world}:\n{failure}"
