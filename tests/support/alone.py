"""Log-probs of a batch's sequences, each from a plain forward of a model over it alone."""

import copy

import torch


@torch.no_grad()
def alone(model, batch):
    """(N,) float64 log-probs of the batch's targets, in nats, each by a fresh copy of the plain model in eval mode."""
    rows, attended, in_response = batch.padded()
    parts = []
    for row, length, response in zip(rows, attended.sum(1).tolist(), in_response.sum(1).tolist(), strict=True):
        ids = row[None, :length]
        logits = copy.deepcopy(model).eval()(input_ids=ids, use_cache=False).logits[0, :-1].double()
        parts.append(logits.log_softmax(-1).gather(1, ids[0, 1:, None])[-response:, 0])
    return torch.cat(parts)
