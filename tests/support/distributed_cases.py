"""Test cases that compare vocabulary-parallel log-probs and gradients with the float64 reference on the whole head.

tests/head/test_vocab_parallel.py runs every case on every rank. `case` registers a function in CASES.
"""

import itertools
from unittest import mock

import torch
import torch.distributed as dist

from dpofast import LogprobOutput, reference
from dpofast.head import vocab_parallel as distributed
from dpofast.head.options import STATS, LogitOptions
from tests.support.row_cases import head_inputs

VOCAB = 61
SIZES = {2: ((17, 44), (0, 61)), 4: ((30, 0, 1, 30), (5, 7, 9, 40))}
SOFTCAP = {"logit_scale": 1.3, "softcap": 5.0, "temperature": 1.5}
CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


def inputs(n=23, d=12, vocab=VOCAB, dtype=torch.float32, seed=0):
    """head_inputs of the whole head."""
    return head_inputs(n, d, vocab, dtype, seed)


def own_rows(tensor, sizes):
    return tensor.split(sizes)[dist.get_rank()].clone()


def call(hidden, weight, targets, bias=None, *, group=None, backend="torch", max_logits_bytes=None, **options):
    logps, values = distributed.vocab_parallel_logprobs(
        hidden,
        weight,
        targets,
        bias=bias,
        options=LogitOptions(**options),
        process_group=group or dist.group.WORLD,
        backend=backend,
        max_logits_bytes=max_logits_bytes,
    )
    return LogprobOutput(logps, **values)


def gradients(function, leaves, upstream):
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    output = function(*leaves)
    output.backward(upstream.to(output.dtype))
    return output.detach(), [leaf.grad for leaf in leaves]


def parallel_gradients(tensors, targets, upstream, sizes, **keywords):
    """Return logps, dh, and dW and db of the whole head, gathered from all ranks."""
    hidden, weight, bias = tensors
    logps, (dh, dw, db) = gradients(
        lambda h, w, b: call(h, w, targets, b, **keywords).logps,
        (hidden, own_rows(weight, sizes), own_rows(bias, sizes)),
        upstream,
    )
    return logps, [dh, joined(dw), joined(db)]


def joined(local):
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, local)
    return torch.cat(parts)


def truth_of(tensors, targets, upstream, **options):
    wide = [tensor.double() for tensor in tensors]
    return gradients(lambda h, w, b: reference.linear_logprobs(h, w, targets, bias=b, **options), wide, upstream)


def relative_error(values, truth):
    return float((values.double() - truth).abs().max() / truth.abs().max().clamp_min(1e-12))


@case
def as_exact_as_the_framework():
    for dtype, options, backend in itertools.product(
        (torch.float32, torch.bfloat16, torch.float16), ({}, SOFTCAP), ("torch", "triton")
    ):
        *tensors, targets, upstream = inputs(dtype=dtype)
        truth, true_grads = truth_of(tensors, targets, upstream, **options)
        _, own_grads = gradients(
            lambda h, w, b, t=targets, o=options: reference.linear_logprobs(
                h.float(), w.float(), t, bias=b.float(), **o
            ),
            tensors,
            upstream,
        )
        for sizes in SIZES[dist.get_world_size()][: 1 if backend == "triton" else 2]:
            logps, grads = parallel_gradients(tensors, targets, upstream, sizes, backend=backend, **options)
            assert logps.dtype == torch.float32
            assert relative_error(logps, truth) < 1e-6
            # E, c·h and each rank's product E·W are rounded to bfloat16, on top of the framework's one rounding.
            rounding = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 1e-6
            for ours, own, true in zip(grads, own_grads, true_grads, strict=True):
                assert ours.dtype == dtype
                assert relative_error(ours, true) <= 2 * relative_error(own, true) + rounding


@case
def float64_is_exact_in_every_plan():
    *tensors, targets, upstream = inputs(dtype=torch.float64)
    for options in ({}, SOFTCAP):
        truth, true_grads = truth_of(tensors, targets, upstream, **options)
        for sizes, rows, needs in itertools.product(
            SIZES[dist.get_world_size()],
            (6, 14, 1000),
            ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 0, 1), (1, 1, 1)),
        ):
            hidden, weight, bias = tensors[0].clone(), *(own_rows(tensor, sizes) for tensor in tensors[1:])
            leaves = [leaf.requires_grad_(bool(need)) for leaf, need in zip((hidden, weight, bias), needs, strict=True)]
            # Ranks may differ in their budget: the least counts, and it is the largest shard's rows that must fit.
            budget = (rows + dist.get_rank()) * max(sizes) * 8
            logps = call(hidden, weight, targets, bias, max_logits_bytes=budget, **options).logps
            torch.testing.assert_close(logps.detach(), truth, atol=1e-12, rtol=1e-12)
            if not any(needs):
                assert not logps.requires_grad
                continue
            for times in (1, 2):  # retain_graph: the second backward adds the same again
                logps.backward(upstream.double(), retain_graph=True)
                for leaf, need, true, own in zip(
                    leaves, needs, true_grads, (lambda x: x, *(lambda x, s=sizes: own_rows(x, s),) * 2), strict=True
                ):
                    assert (leaf.grad is not None) == bool(need)
                    if need:
                        torch.testing.assert_close(leaf.grad, times * own(true), atol=1e-12, rtol=1e-12)


@case
def small_budgets_of_a_16_bit_head():
    *tensors, targets, upstream = inputs(n=50, dtype=torch.bfloat16)
    sizes = SIZES[dist.get_world_size()][1]
    whole = parallel_gradients(tensors, targets, upstream, sizes)
    for rows in (4, 7, 20):
        chunked = parallel_gradients(tensors, targets, upstream, sizes, max_logits_bytes=rows * max(sizes) * 6)
        torch.testing.assert_close(chunked[0], whole[0], atol=1e-6, rtol=1e-6)
        for ours, expected in zip(chunked[1], whole[1], strict=True):
            # The same roundings of E and c·h, in another order of summation: one unit in bfloat16's last place.
            torch.testing.assert_close(ours, expected, atol=1e-6, rtol=torch.finfo(torch.bfloat16).eps)


@case
def log_probs_are_the_same_bits_on_every_rank():
    for backend in ("torch", "triton"):
        *tensors, targets, upstream = inputs()
        sizes = SIZES[dist.get_world_size()][0]
        logps, (dh, _, _) = parallel_gradients(tensors, targets, upstream, sizes, backend=backend)
        for local in (logps, dh):
            everywhere = [torch.empty_like(local) for _ in range(dist.get_world_size())]
            dist.all_gather(everywhere, local)
            assert all(torch.equal(other, local) for other in everywhere)


@case
def statistics():
    for backend, dtype in (("torch", torch.float32), ("triton", torch.float32), ("torch", torch.float64)):
        for options, sizes in itertools.product(({}, SOFTCAP), SIZES[dist.get_world_size()]):
            hidden, weight, bias, targets, _ = inputs(dtype=dtype)
            weight[40] = weight[8]  # two equal columns, on two ranks: of equal maxima the first is the top one
            bias[40] = bias[8]
            z = reference.scaled_logits(torch.nn.functional.linear(hidden, weight, bias), **options)
            top = z.argmax(dim=1)
            targets[1::2] = top[1::2]
            targets[3] = 40
            hidden[3] = weight[40] * 9
            first = sizes[0]  # the top one is a later rank's first column, the target is the first rank's
            targets[6] = first - 1 if first else 1
            hidden[6] = weight[first] * 9
            z = reference.scaled_logits(
                torch.nn.functional.linear(hidden.double(), weight.double(), bias.double()), **options
            )
            expected = reference.token_statistics(z, targets)
            assert not expected["is_top1"][[3, 6]].any() and expected["is_top1"].any()
            own = own_rows(weight, sizes), targets, own_rows(bias, sizes)
            output = call(hidden, *own, stats=STATS, backend=backend, max_logits_bytes=14 * max(sizes) * 8, **options)
            assert torch.equal(output.is_top1, expected["is_top1"])
            for name in ("entropy", "mean_logits", "log_sum_sq_probs"):
                tolerance = 1e-12 if dtype == torch.float64 else 3e-6
                ours = getattr(output, name)
                assert not ours.requires_grad
                torch.testing.assert_close(ours.double(), expected[name], atol=tolerance, rtol=tolerance)
            assert call(hidden, *own, stats=("entropy",), backend=backend, **options).is_top1 is None
    output = call(hidden.requires_grad_(), *own, stats=STATS)
    output.entropy.zero_()  # the caller's own: backward does not miss it
    output.logps.sum().backward()


@case
def a_shard_of_padding_columns_adds_nothing():
    hidden, weight, bias, targets, upstream = inputs()
    sizes = SIZES[dist.get_world_size()][0]
    bias[: sizes[0]] = float("-inf")
    targets = targets.clamp(min=sizes[0]).masked_fill(targets == -100, -100)
    truth, true_grads = truth_of((hidden, weight, bias), targets, upstream)
    for backend in ("torch", "triton"):
        logps, grads = parallel_gradients((hidden, weight, bias), targets, upstream, sizes, backend=backend)
        assert relative_error(logps, truth) < 1e-6
        for ours, true in zip(grads, true_grads, strict=True):
            torch.testing.assert_close(ours.double(), true, atol=1e-5, rtol=1e-5)
        output = call(hidden, own_rows(weight, sizes), targets, own_rows(bias, sizes), stats=STATS, backend=backend)
        z = torch.nn.functional.linear(hidden.double(), weight.double(), bias.double())
        for name, expected in reference.token_statistics(z, targets).items():
            torch.testing.assert_close(getattr(output, name).double(), expected.double(), atol=3e-6, rtol=3e-6)


@case
def large_logits_lose_nothing():
    # One column of width 1: the float32 logits are the weights themselves, so all error is that of the softmax.
    generator = torch.Generator().manual_seed(1)
    for level in (1e4, -1e4):
        weight = torch.randn(VOCAB, 1, generator=generator) + level
        hidden, targets, upstream = torch.ones(16, 1), torch.arange(0, VOCAB, 4), torch.ones(16)
        truth, true_grads = truth_of((hidden, weight, torch.zeros(VOCAB)), targets, upstream)
        for backend in ("torch", "triton"):
            for sizes in SIZES[dist.get_world_size()]:
                logps, (_, dw, _) = parallel_gradients(
                    (hidden, weight, torch.zeros(VOCAB)), targets, upstream, sizes, backend=backend
                )
                torch.testing.assert_close(logps.double(), truth, atol=1e-6, rtol=1e-6)
                torch.testing.assert_close(dw.double(), true_grads[1], atol=1e-5, rtol=1e-6)


@case
def one_hot_rows():
    weight = torch.full((VOCAB, 1), -1e4)
    weight[3] = 1e4
    tensors = torch.ones(2, 1), weight, torch.zeros(VOCAB)
    targets = torch.tensor([3, 50])
    truth, true_grads = truth_of(tensors, targets, torch.ones(2))
    for backend in ("torch", "triton"):
        logps, grads = parallel_gradients(
            tensors, targets, torch.ones(2), SIZES[dist.get_world_size()][1], backend=backend
        )
        torch.testing.assert_close(logps.double(), truth)
        for ours, true in zip(grads, true_grads, strict=True):
            torch.testing.assert_close(ours.double(), true)


@case
def nan_stays_in_its_row_and_ignored_rows_count_as_zero():
    *tensors, targets, upstream = inputs()
    sizes = SIZES[dist.get_world_size()][0]
    _, clean = parallel_gradients(tensors, targets, upstream, sizes)
    ignored = targets == -100
    hidden = tensors[0].masked_fill(ignored.unsqueeze(1), float("nan"))
    for backend, rows in itertools.product(("torch", "triton"), (4, 1000)):
        logps, grads = parallel_gradients(
            (hidden, *tensors[1:]),
            targets,
            upstream.masked_fill(ignored, float("inf")),
            sizes,
            backend=backend,
            max_logits_bytes=rows * max(sizes) * 4,
        )
        assert (logps[ignored] == 0).all() and (grads[0][ignored] == 0).all()
        for ours, expected in zip(grads, clean, strict=True):
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
        broken = tensors[0].clone()
        broken[1] = float("nan")
        own = own_rows(tensors[1], sizes)
        output = call(broken, own, targets, backend=backend, stats=("entropy",))
        assert output.logps[1].isnan() and output.entropy[1].isnan()
        assert output.logps.isnan().sum() == 1
    zero = call(tensors[0].requires_grad_(), own.requires_grad_(), torch.full_like(targets, -100)).logps
    zero.sum().backward()
    assert (zero == 0).all() and (tensors[0].grad == 0).all() and (own.grad == 0).all()


@case
def a_target_outside_the_vocabulary_gives_nan_where_it_is_not_checked():
    hidden, weight, bias, targets, _ = inputs()
    own = own_rows(weight, SIZES[dist.get_world_size()][0])
    targets[2], targets[3] = VOCAB, -1
    for backend, needs_dw in itertools.product(("torch", "triton"), (False, True)):
        hidden = hidden.detach().requires_grad_()
        # As on a GPU, where looking at the targets would cost a sync.
        with mock.patch.object(distributed, "check_target_values"):
            output = call(hidden, own.detach().requires_grad_(needs_dw), targets, backend=backend, stats=("entropy",))
        output.logps.sum().backward()
        expected = torch.zeros(len(targets), dtype=torch.bool)
        expected[[2, 3]] = True
        assert torch.equal(output.logps.isnan(), expected)
        assert torch.equal(hidden.grad.isnan().all(dim=1), expected)
        assert torch.equal(hidden.grad.isnan().any(dim=1), expected)


@case
def no_rows():
    for needs, stats in itertools.product(((0, 0), (1, 0), (1, 1)), ((), STATS)):
        hidden, weight, bias, targets, _ = inputs(n=0)
        sizes = SIZES[dist.get_world_size()][0]
        hidden.requires_grad_(bool(needs[0]))
        weight, bias = (own_rows(tensor, sizes).requires_grad_(bool(needs[1])) for tensor in (weight, bias))
        output = call(hidden, weight, targets, bias, stats=stats)
        assert output.logps.shape == (0,) and (not stats or output.entropy.shape == (0,))
        if any(needs):
            output.logps.sum().backward()
            assert hidden.grad.shape == hidden.shape
        if needs[1]:
            assert (weight.grad == 0).all() and (bias.grad == 0).all()


@case
def autocast_changes_nothing():
    *tensors, targets, upstream = inputs()
    sizes = SIZES[dist.get_world_size()][0]
    logps, grads = parallel_gradients(tensors, targets, upstream, sizes, max_logits_bytes=8 * max(sizes) * 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again, cast = parallel_gradients(tensors, targets, upstream, sizes, max_logits_bytes=8 * max(sizes) * 4)
    assert torch.equal(logps, again)
    assert all(torch.equal(ours, expected) for ours, expected in zip(cast, grads, strict=True))
