"""A loss of your own on dpofast's log-probs: here a hinge on the margin of log-probs per token, without a reference.

    python examples/own_loss.py

examples: mappings with prompt_ids, chosen_ids and rejected_ids.
"""

import torch

from dpofast import attach_logprob_head, pack, sequence_logprobs


def hinge_per_token(logps, batch):
    """relu(1 - (chosen - rejected)) of log-probs per token, (P,): any differentiable function of them will do."""
    per_token = logps / batch.cu_targets.diff().to(logps.device)
    chosen, rejected = per_token[batch.pairs.long().to(logps.device)].unbind(1)
    return torch.relu(1 - (chosen - rejected))


def train(model, examples, *, pairs_per_step=4, max_tokens=4096, learning_rate=0.1):
    """One pass over the examples; the loss of every step."""
    attach_logprob_head(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    losses = []
    for start in range(0, len(examples), pairs_per_step):
        step = examples[start : start + pairs_per_step]
        loss_of_step = 0.0
        for batch in pack(step, max_tokens):
            batch = batch.to(model.device)
            logps = sequence_logprobs(model(packed=batch), batch)
            loss = hinge_per_token(logps, batch).sum() / len(step)  # of the step: micro-batches change nothing
            loss.backward()
            loss_of_step += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss_of_step))
    return losses


if __name__ == "__main__":
    from tiny import tiny_examples, tiny_model

    print(train(tiny_model(), tiny_examples()))
