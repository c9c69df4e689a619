"""The layout on the mask of a packed call: layers that pass no keywords on have it, in recomputation as well."""

import threading

import pytest
import torch

from dpofast import PreferenceLoss, attach_logprob_head, pack
from dpofast.model.attach import PackedPreference
from tests.support.families import family_model
from tests.support.padded_truth import gradients, groups, slow_truth
from tests.support.tiny import tiny_pairs

pytestmark = pytest.mark.slow(10)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("family", ["nemotron", "stablelm", "gpt-j", "llama"])
def test_calls_in_flight_keep_their_own_layouts_through_checkpointing_in_another_thread(family, use_reentrant):
    models = [attach_logprob_head(family_model(family)).train() for _ in range(2)]
    with torch.no_grad():
        models[1].get_output_embeddings().weight.mul_(2)
    batches = pack([*groups(), *tiny_pairs(4)], max_tokens=90)
    assert len(batches) > 1
    loss = PreferenceLoss(beta=0.5)
    jobs = [(model, batch, -4 * torch.rand(batch.num_sequences)) for batch in batches for model in models]
    truths = [slow_truth(*job, loss)[2] for job in jobs]
    for model in models:
        model.zero_grad()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    losses = [
        model(packed=batch, preference=PackedPreference(ref_logps, loss, batch.num_pairs)).loss
        for model, batch, ref_logps in jobs
    ]
    # A GPU's backward runs in threads of its own, too, which inherit no context variables.
    thread = threading.Thread(target=lambda: [loss.backward() for loss in reversed(losses)])
    thread.start()
    thread.join()
    for model in models:
        theirs = [truth for (of, *_), truth in zip(jobs, truths, strict=True) if of is model]
        ours = gradients(model)
        assert ours.keys() == theirs[0].keys()
        for name, gradient in ours.items():
            expected = sum(truth[name] for truth in theirs)
            torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=0, msg=lambda text, n=name: f"{n}: {text}")
