"""A plain PyTorch loop: packing, log-probs, the loss, and gradients that do not depend on micro-batches.

    python examples/pytorch_loop.py

examples: mappings with prompt_ids, chosen_ids and rejected_ids.
"""

import torch

from dpofast import PreferenceLoss, attach_logprob_head, pack, preference_loss, sequence_logprobs


def train(model, ref_model, examples, *, pairs_per_step=4, max_tokens=4096, learning_rate=0.1):
    """One pass over the examples; the loss of every step."""
    attach_logprob_head(model)
    attach_logprob_head(ref_model)
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    losses = []
    for start in range(0, len(examples), pairs_per_step):
        step = examples[start : start + pairs_per_step]
        loss_of_step = 0.0
        for batch in pack(step, max_tokens):  # micro-batches: they do not change the result
            batch = batch.to(model.device)
            logps = sequence_logprobs(model(packed=batch), batch)
            with torch.no_grad():
                ref_logps = sequence_logprobs(ref_model(packed=batch), batch)
            loss = PreferenceLoss(beta=0.1)
            output = preference_loss(
                logps, batch.pairs, ref_logps, loss=loss, num_pairs=len(step), columns=batch.columns
            )
            output.loss.backward()
            loss_of_step += output.loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss_of_step))
    return losses


if __name__ == "__main__":
    from tiny import tiny_examples, tiny_model

    print(train(tiny_model(), tiny_model(), tiny_examples()))
