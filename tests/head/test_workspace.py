"""head/engine/workspace.py: memory is reused by the next tensor of the same purpose, never by two at the same time."""

import gc
import threading

import pytest
import torch

from bench.cost import Cost
from dpofast import linear_logprobs
from dpofast.head.engine.workspace import Scratch

LIKE = torch.empty(0)
SHAPE = (1024, 2048)  # 8 MiB


def test_the_next_tensor_gets_the_memory_of_the_last() -> None:
    scratch = Scratch()
    first = scratch.empty(SHAPE, like=LIKE, dtype=torch.float32)
    first.fill_(1.0)
    assert first.shape == SHAPE and first.is_contiguous() and first.untyped_storage().nbytes() == 8 << 20
    address = first.data_ptr()
    del first
    smaller = scratch.empty((3, 1 << 20), like=LIKE, dtype=torch.bfloat16)
    assert smaller.data_ptr() == address and smaller.dtype == torch.bfloat16


def test_two_tensors_at_a_time_have_memory_of_their_own() -> None:
    scratch = Scratch()
    one, two = (scratch.empty(SHAPE, like=LIKE, dtype=torch.float32).fill_(value) for value in (1.0, 2.0))
    assert one.eq(1.0).all() and two.eq(2.0).all()


def test_a_view_keeps_the_memory() -> None:
    scratch = Scratch()
    row = scratch.empty(SHAPE, like=LIKE, dtype=torch.float32).fill_(1.0)[3]
    other = scratch.empty(SHAPE, like=LIKE, dtype=torch.float32).fill_(2.0)
    assert row.eq(1.0).all() and other.eq(2.0).all()


def test_a_larger_block_takes_the_place_of_the_one_that_is_kept() -> None:
    scratch = Scratch()
    scratch.empty(SHAPE, like=LIKE, dtype=torch.float32)
    large = scratch.empty((2, *SHAPE), like=LIKE, dtype=torch.float32).data_ptr()
    scratch.empty(SHAPE, like=LIKE, dtype=torch.float32)
    assert scratch.empty((2, *SHAPE), like=LIKE, dtype=torch.float32).data_ptr() == large


@pytest.mark.parametrize(("shape", "like"), [((1024,), LIKE), (SHAPE, torch.empty(0, device="meta"))])
def test_small_tensors_and_other_devices_are_the_allocators(shape: tuple[int, ...], like: torch.Tensor) -> None:
    scratch = Scratch()
    assert scratch.empty(shape, like=like, dtype=torch.float32).device == like.device
    assert scratch._idle is None


@pytest.mark.usefixtures("nan_empty")
def test_unwritten_elements_show_as_those_of_torch_empty_do() -> None:
    assert Scratch().empty(SHAPE, like=LIKE, dtype=torch.float16).isnan().all()


def test_it_is_counted_as_made_and_as_freed() -> None:
    with Cost() as cost:
        scratch = Scratch().empty(SHAPE, like=LIKE, dtype=torch.float32)
        scratch.zero_()
    assert cost.peak_bytes == cost.live_bytes == 8 << 20
    del scratch
    assert cost.live_bytes == 0


def test_threads_share_no_memory() -> None:
    scratch, wrong = Scratch(), []

    def work(value: float) -> None:
        for _ in range(50):
            tensor = scratch.empty(SHAPE, like=LIKE, dtype=torch.float32).fill_(value)
            if not tensor.eq(value).all():
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(float(number),)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_graph_that_waits_for_its_backward_keeps_what_it_saved() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 8), torch.randn(40_000, 8)
    targets = torch.randint(0, len(weight), (64,))

    def graph() -> tuple[torch.Tensor, torch.Tensor]:
        leaf = weight.clone().requires_grad_()
        return leaf, linear_logprobs(hidden, leaf, targets).logps.sum()

    (expected,) = torch.autograd.grad(*reversed(graph()))
    (first, loss), (second, later) = graph(), graph()  # 10 MB of E each
    later.backward()
    graph()
    gc.collect()
    loss.backward()
    assert torch.equal(first.grad, expected) and torch.equal(second.grad, expected)


def test_memory_that_runs_out_is_a_memory_error() -> None:
    with pytest.raises(MemoryError, match=r"no memory for a buffer of [\d,]{20,} bytes"):
        Scratch().empty((1 << 30, 1 << 24), like=LIKE, dtype=torch.float32)
