"""A batch's log-probs, loss and gradients by model(packed=...) and by the reference over padded rows."""

import torch

from dpofast import PreferenceLoss, reference
from dpofast.model.attach import PackedPreference
from tests.support.tiny import VOCAB


def groups():
    """Groups of 2 to 6 branches, mixed lengths, one-token prompts and responses; all pairs, or neighbours."""
    lengths = {
        1: (3, 1),
        7: (1, 1, 5),
        4: (6, 2, 1, 9),
        12: (2, 8, 1, 4, 3),
        2: (1, 2, 3, 1, 12, 7),
    }  # prompt: its responses
    draw = torch.Generator().manual_seed(1)

    def ids(length, first=None):
        drawn = torch.randint(3, VOCAB, (length,), generator=draw).tolist()
        return drawn if first is None else [first, *drawn[1:]]

    return [
        {
            "prompt_ids": ids(prompt),
            "branches": [ids(length, first=3 + branch) for branch, length in enumerate(responses)],
            "pairs": [(a, b) for a in range(len(responses)) for b in range(len(responses)) if a + 1 == b or a < b < 4],
        }
        for prompt, responses in lengths.items()
    ]


def one_pass(model, batch, ref_logps, loss):
    """Per-token log-probs, the loss, and its gradients, by model(packed=...)."""
    tokens = model(packed=batch).logps.detach()
    model.zero_grad()
    output = model(packed=batch, preference=PackedPreference(ref_logps, loss, batch.num_pairs))
    output.loss.backward()
    return tokens, output.loss.detach(), gradients(model)


def slow_truth(model, batch, ref_logps, loss):
    """The same by the reference: padded rows, full logits."""
    model.zero_grad()
    tokens = reference.padded_logprobs(model, *batch.padded(), use_cache=False)
    losses, _ = reference.sigmoid_loss(
        reference.sequence_logprobs(tokens, batch.cu_targets), batch.pairs, ref_logps, beta=loss.beta
    )
    losses.mean().backward()
    return tokens.detach(), losses.mean().detach(), gradients(model)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_to_the_truth(model, batch):
    ref_logps, loss = -4 * torch.rand(batch.num_sequences), PreferenceLoss(beta=0.5)
    tokens, value, ours = one_pass(model, batch, ref_logps, loss)
    true_tokens, true_value, theirs = slow_truth(model, batch, ref_logps, loss)
    torch.testing.assert_close(tokens, true_tokens, atol=1e-5, rtol=0)
    torch.testing.assert_close(value, true_value, atol=1e-5, rtol=0)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        # RWKV's random weights make gradients of 150, of which float32 knows the fifth digit; all others stay under 1
        close = 1e-5 * max(1.0, float(theirs[name].abs().max()))
        torch.testing.assert_close(gradient, theirs[name], atol=close, rtol=0, msg=lambda text, n=name: f"{n}: {text}")
