"""Steps that do not fit into memory, and max_tokens that is found by probing."""

import errno
import gc
import logging
import mmap
import subprocess
import sys
import weakref

import pytest
import torch

from dpofast.head.engine import tiled_engine, workspace
from dpofast.training.memory import out_of_memory
from tests.support.ranks_cases import RunsOutOfMemory
from tests.support.tiny import tiny_dataset, tiny_model
from tests.support.tiny_training import fails_in_training, losses_of, make_trainer, weights_of

pytestmark = pytest.mark.slow(15)

SGD = {"optim": "sgd", "learning_rate": 0.1}


@pytest.mark.parametrize("options", [{}, {"loss_type": "aot", "max_tokens": 60}], ids=str)
def test_a_step_that_does_not_fit_is_done_again_in_smaller_parts(tmp_path, caplog, options):
    expected = make_trainer(tmp_path, **SGD, **options)
    expected.train()
    model = tiny_model()
    RunsOutOfMemory(model, most=25, rank=0)
    trainer = make_trainer(tmp_path, model=model, **SGD, **options)
    with caplog.at_level(logging.WARNING, logger="dpofast"):
        trainer.train()
    assert trainer.max_tokens <= 25
    assert "out of memory at step 1: max_tokens is now" in caplog.text and "done again" in caplog.text
    assert losses_of(trainer) == pytest.approx(losses_of(expected), abs=1e-5)
    torch.testing.assert_close(weights_of(trainer), weights_of(expected), atol=1e-5, rtol=1e-5)
    for log, other in zip(trainer.state.log_history, expected.state.log_history, strict=True):
        assert log.get("lengths/chosen") == other.get("lengths/chosen")  # pairs of the failed attempt are not counted


def test_a_scratch_buffer_that_cannot_be_mapped_halves_max_tokens(tmp_path, monkeypatch):
    """mmap's error is an OSError, which is no MemoryError."""
    trainer, expected = (make_trainer(tmp_path, **SGD) for _ in range(2))
    expected.train()
    real, sizes = mmap.mmap, []

    def mapped(descriptor, size, **options):
        sizes.append(size)
        if len(sizes) == 1:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return real(descriptor, size, **options)

    monkeypatch.setattr(workspace, "_LEAST_BYTES", 1)
    monkeypatch.setattr(mmap, "mmap", mapped)
    for name, value in list(vars(tiled_engine).items()):
        if isinstance(value, workspace.Scratch):  # earlier tests of this process left large blocks in them
            monkeypatch.setattr(tiled_engine, name, workspace.Scratch())
    trainer.train()
    assert len(sizes) > 1 and trainer.max_tokens < expected.max_tokens
    torch.testing.assert_close(weights_of(trainer), weights_of(expected), atol=1e-5, rtol=1e-5)


def test_the_last_backward_may_run_out_of_memory_too(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, **SGD)
    backward, failed = trainer.accelerator.backward, []

    def backward_once_too_large(loss):
        if not failed:
            failed.append(loss)
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 TB")
        backward(loss)

    monkeypatch.setattr(trainer.accelerator, "backward", backward_once_too_large)
    trainer.train()
    expected = make_trainer(tmp_path, **SGD)
    expected.train()
    torch.testing.assert_close(weights_of(trainer), weights_of(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("where", ["forward", "last backward"])
def test_no_graph_of_the_failed_attempt_is_alive_when_its_memory_is_given_back(tmp_path, monkeypatch, where):
    model, alive = tiny_model(), []
    if where == "forward":
        RunsOutOfMemory(model, most=25, rank=0)
    layer = model.model.layers[0]
    layer.register_forward_hook(lambda module, args, output: alive.append(weakref.ref(output)))
    trainer = make_trainer(tmp_path, model=model, max_tokens=40, **SGD)
    if where == "last backward":
        backward = trainer.accelerator.backward

        def too_large(loss):
            if trainer.max_tokens == 40 and loss is not None:
                raise torch.OutOfMemoryError("CUDA out of memory")
            backward(loss)

        monkeypatch.setattr(trainer.accelerator, "backward", too_large)
    seen = []

    def given_back(device):
        seen.append([ref for ref in alive if ref() is not None] + [p for p in model.parameters() if p.grad is not None])

    alive.clear()  # of the reference pass
    monkeypatch.setattr("dpofast.training.memory.fit.give_back", given_back)
    gc.disable()
    try:
        trainer.train()
    finally:
        gc.enable()
    assert alive and seen and not any(seen)


def test_one_pair_that_does_not_fit_stops(tmp_path):
    model = tiny_model()
    RunsOutOfMemory(model, most=0, rank=0)
    with pytest.raises(RuntimeError, match=r"out of memory at step 1 with one row.*: set gradient_checkpointing"):
        make_trainer(tmp_path, model=model).train()


def test_another_error_is_not_taken_for_it(tmp_path):
    trainer = make_trainer(tmp_path, model=fails_in_training(tiny_model()))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        trainer.train()


def test_auto_probes_once_and_changes_no_result(tmp_path):
    data = tiny_dataset(300)
    expected = make_trainer(tmp_path, train=data, max_steps=3, **SGD)
    trainer = make_trainer(tmp_path, train=data, max_steps=3, max_tokens="auto", **SGD)
    assert 1 <= trainer.max_tokens <= 2048
    assert all(p.grad is None for p in trainer.model.parameters())
    for run in (expected, trainer):
        run.train()
    torch.testing.assert_close(weights_of(trainer), weights_of(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [{"padded": True}, {"share": "none"}])
def test_auto_counts_the_prompts_of_rows_that_share_none(rows, tmp_path, monkeypatch):
    asked, probed = [], []

    def probe(run, device, cap, *, kept):
        asked.append(cap // 16)
        probed.append(run(asked[-1]))
        return cap

    monkeypatch.setattr("dpofast.training.memory.fit.probe_max_tokens", probe)
    make_trainer(tmp_path, train=tiny_dataset(40), max_tokens="auto", **rows)
    assert asked[0] <= probed[0] < asked[0] + 60  # the last pair goes beyond


@pytest.mark.parametrize(
    ("free", "kept", "expected"),
    [(10_000_000, 0, 1600), (10_000_000, 4_500_000, 700), (2_000_000_000, 0, 2048)],
)
def test_auto_follows_the_line_through_two_peaks(monkeypatch, free, kept, expected):
    monkeypatch.setattr(out_of_memory, "free_bytes", lambda device: free)
    asked = []

    def peak(device, run):
        run()
        return 500_000 + 5_000 * asked[-1]

    def probe(positions):
        asked.append(positions)
        return positions

    monkeypatch.setattr(out_of_memory, "peak_bytes", peak)
    found = out_of_memory.probe_max_tokens(probe, torch.device("cpu"), 2048, kept=kept)
    assert found == pytest.approx(expected, abs=1) and len(asked) == 3


def test_auto_refuses_where_nothing_fits(monkeypatch):
    monkeypatch.setattr(out_of_memory, "free_bytes", lambda device: 1000)
    monkeypatch.setattr(out_of_memory, "peak_bytes", lambda device, run: run() or 10_000_000)
    sizes = iter([100, 100, 400])
    with pytest.raises(ValueError, match="max_tokens: 'auto' found no room"):
        out_of_memory.probe_max_tokens(lambda positions: next(sizes), torch.device("cpu"), 2048)


def test_peak_bytes_sees_what_was_allocated():
    size = 64 * 2**20
    peak = out_of_memory.peak_bytes(torch.device("cpu"), lambda: torch.ones(size // 4).sum())
    assert 0.8 * size < peak < 1.5 * size


def test_peak_bytes_sees_what_was_allocated_in_memory_freed_before():
    # In a process of its own, where nothing else moves what the C library keeps.
    code = """
import torch
from dpofast.training.memory.out_of_memory import peak_bytes
mib = 2**18
torch.ones(30 * mib)  # once such a block was freed, smaller ones are kept
blocks = [torch.ones(24 * mib) for _ in range(12)]
above = [torch.ones(mib) for _ in range(4)]  # only what lies at the end is given back
del blocks
print(peak_bytes(torch.device("cpu"), lambda: torch.ones(64 * mib).sum()))
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 50 * 2**20 < int(child.stdout) < 100 * 2**20


def test_bad_max_tokens(tmp_path):
    for value in ("large", "0", -3):
        with pytest.raises(ValueError, match="max_tokens: expected at least 1, or 'auto'"):
            make_trainer(tmp_path, max_tokens=value)
