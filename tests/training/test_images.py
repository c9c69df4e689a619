"""DPOTrainer on prompts with images: the step against a loop over each sequence alone, and what surrounds it."""

import pytest
import torch

from tests.support.tiny_training import losses_of, weights_of
from tests.support.vision_training import image_dataset, image_pairs, image_trainer, loop

pytestmark = pytest.mark.slow(80)


@pytest.mark.parametrize("family, padded", [("qwen3_vl", False), ("llava", False), ("idefics3", False), ("gemma3", True)])
def test_steps_equal_a_loop_over_each_sequence_alone(tmp_path, family, padded):
    rows = image_pairs(family)
    expected = loop(family, rows, 2, epochs=2)  # ten steps
    trainer = image_trainer(
        tmp_path, family, per_device_train_batch_size=2, num_train_epochs=2, padded=padded, max_tokens=120, precompute_ref_log_probs=False
    )
    trainer.train()
    losses = losses_of(trainer)
    assert len(losses) == 10
    assert losses == pytest.approx(expected.losses, abs=1e-5)
    for (name, ours), (_, own) in zip(
        trainer.model.named_parameters(), expected.model.named_parameters(), strict=True
    ):
        torch.testing.assert_close(ours, own, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
