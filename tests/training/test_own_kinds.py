"""DPOTrainer with a loss of one's own: the built-in kind's run to the bit, any cut of the step, and resuming."""

import pytest
import torch

from examples.own_kind import best_of_list, squared_hinge
from tests.support import own_losses
from tests.support.tiny import tiny_dataset
from tests.support.tiny_training import SAVING, losses_of, make_trainer, weights_of

pytestmark = pytest.mark.slow(20)


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (own_losses.dpo_by_hand, "sigmoid"),
        (own_losses.simpo_by_hand, "simpo"),
        (own_losses.kto_by_hand, "kto_pair"),
        (own_losses.infonca_by_hand, "infonca"),
        (best_of_list, "softmax_dpo"),
    ],
)
def test_it_trains_like_the_kind_that_it_copies(tmp_path, function, kind):
    results = []
    for loss_type in (function, kind):
        trainer = make_trainer(tmp_path, loss_type=loss_type, max_tokens=24, evaluation=tiny_dataset(5, seed=1))
        trainer.train()
        metrics = trainer.evaluate()
        results.append((losses_of(trainer), weights_of(trainer), metrics["eval_loss"], metrics["eval_rewards/margins"]))
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-6, rtol=1e-6)
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-6)
    assert results[0][2:] == pytest.approx(results[1][2:], abs=1e-6)


@pytest.mark.parametrize("function", [squared_hinge, own_losses.kto_by_hand])
def test_micro_batches_change_nothing(tmp_path, function):
    results = []
    for max_tokens in (24, 1000):
        trainer = make_trainer(tmp_path, loss_type=[function, "sigmoid"], optim="sgd", max_tokens=max_tokens)
        trainer.train()
        results.append((losses_of(trainer), weights_of(trainer)))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-5, rtol=1e-5)


def test_a_run_is_resumed_with_the_function_of_the_same_name(tmp_path):
    name = f"{own_losses.__name__}:dpo_by_hand"
    whole = make_trainer(tmp_path, loss_type=own_losses.dpo_by_hand, **SAVING)
    whole.train()
    again = make_trainer(tmp_path, loss_type=name, **SAVING)
    again.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-2")
    assert torch.equal(weights_of(again), weights_of(whole))
    other = make_trainer(tmp_path, loss_type=own_losses.other_by_hand, **SAVING)
    with pytest.raises(ValueError, match=f"loss_type was {name}, is {own_losses.__name__}:other_by_hand"):
        other.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-2")
