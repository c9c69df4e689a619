"""activation_offloading: what it copies to the CPU, and that it computes the same."""

import copy

import pytest
import torch

from dpofast import DPOConfig, attach_logprob_head, pack
from dpofast.training.parallel.offload import offloaded_activations
from tests.support.tiny import tiny_model, tiny_pairs
from tests.support.tiny_training import losses_of, make_trainer


def config(folder, **options):
    return DPOConfig(output_dir=str(folder), use_cpu=True, report_to="none", **options)


ON = {"gradient_checkpointing": True, "activation_offloading": True}


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_inputs_of_layers_are_copied_and_no_weights(tmp_path, reentrant):
    copied = {}
    for layers in (2, 6):
        model = attach_logprob_head(tiny_model(num_hidden_layers=layers)).train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        (batch,) = pack(tiny_pairs(20))
        expected = copy.deepcopy(model)
        expected(packed=batch).logps.sum().backward()
        with offloaded_activations(model, config(tmp_path, **ON)) as offloading:
            model(packed=batch).logps.sum().backward()
        for (name, ours), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
            assert torch.equal(ours.grad, theirs.grad), name
        copied[layers] = offloading.last_bytes
        own = batch.num_tokens * model.config.hidden_size * 4
        # beside the layers: of the last norm its float32 input, twice, and its result; of the embedding the ids
        assert layers * own <= copied[layers] <= (layers + 4) * own
    assert copied[6] - copied[2] == 4 * own


def test_training_is_the_same_and_ends_without_hooks(tmp_path):
    options = {"max_steps": 3, "logging_steps": 1, "max_tokens": 40, "gradient_checkpointing": True}
    plain = make_trainer(tmp_path / "plain", **options)
    plain.train()
    ours = make_trainer(tmp_path / "ours", activation_offloading=True, **options)
    ours.train()
    assert losses_of(ours) == losses_of(plain)
    for one, other in zip(ours.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert not ours.model.model._forward_pre_hooks and not ours.model.model._forward_hooks


def test_it_is_refused_without_checkpointing_under_either_name(tmp_path):
    with pytest.raises(ValueError, match="activation_offloading: expected gradient_checkpointing beside it"):
        config(tmp_path, activation_offloading=True)
    assert config(tmp_path, **ON).activation_offloading
    if hasattr(DPOConfig, "activation_checkpointing"):
        assert config(tmp_path, activation_offloading=True, activation_checkpointing=True).activation_offloading
