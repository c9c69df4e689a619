"""A training step on a GPU makes the host wait once: for the loss, which is checked and logged."""

from dataclasses import replace
from unittest import mock

import pytest
import torch

from dpofast.packing.batch import PackedBatch
from tests.support.as_cuda import CUDA, AsCuda, counting_syncs, move
from tests.support.tiny_training import losses_of, make_trainer

pytestmark = pytest.mark.slow(20)
CASES = {
    "one micro-batch": {},
    "several": {"max_tokens": 40},
    "live reference": {"max_tokens": 40, "precompute_ref_log_probs": False},
    "weighted by pair": {"max_tokens": 40, "ld_alpha": 0.5},
    "chosen tokens": {"max_tokens": 40, "rpo_alpha": 1.0},
    "checkpointing": {"max_tokens": 40, "gradient_checkpointing": True},
}


def as_on_cuda(trainer):
    """A trainer whose models and settings say that they are on a GPU."""
    for model in (trainer.model, trainer.ref_model):
        if model is not None:
            move(model)
    trainer._training_packer = replace(trainer._training_packer, device=CUDA)
    trainer._settings = replace(trainer._settings, device=CUDA)
    return trainer


@pytest.mark.parametrize("case", CASES)
def test_a_step_waits_for_its_loss_alone(case, tmp_path):
    expected = make_trainer(tmp_path / "cpu", max_steps=1, train_sampling_strategy="sequential", **CASES[case])
    expected.train()
    trainer = make_trainer(tmp_path / "gpu", train_sampling_strategy="sequential", **CASES[case])
    trainer.create_optimizer()
    step = next(iter(as_on_cuda(trainer).get_train_dataloader()))
    with mock.patch.object(PackedBatch, "pin_memory", lambda self: self), counting_syncs() as counting:
        loss = trainer.training_step(trainer.model, step)
    assert [found.split()[-1] for found in counting.syncs] == ["tolist"], counting.syncs
    assert counting.syncs[0].startswith("training/trainer.py")
    assert len(counting.launched) >= 2  # the head's rows and the loss are kernels
    torch.testing.assert_close(float(loss), losses_of(expected)[0], atol=1e-5, rtol=0)


def test_waits_are_seen():
    with counting_syncs() as counting:
        values = torch.arange(6, device=CUDA)
        assert type(values) is AsCuda and values.device == (values + 1).device == CUDA
        values.tolist(), values[0].item(), bool(values.any()), values.nonzero(), values[values > 2], values.cpu()
        torch.tensor([1.0], device=CUDA), torch.ones(3).to(CUDA), torch.zeros(6).copy_(values)
        assert len(counting.syncs) == 9
        torch.ones(3).to(CUDA, non_blocking=True), values.to("cpu", non_blocking=True), values.to(torch.int32)
        torch.ones(3).tolist(), torch.ones(3).nonzero(), values[torch.tensor([1, 2])]
        assert len(counting.syncs) == 9
