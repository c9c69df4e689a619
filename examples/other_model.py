"""A model that is not from transformers: a recurrent network, trained by linear_preference_loss.

    python examples/other_model.py

All that is needed are the hidden states that predict the response tokens, and the head.
examples: mappings with prompt_ids, chosen_ids and rejected_ids.
"""

import copy

import torch
from torch import nn

from dpofast import PreferenceLoss, linear_logprobs, linear_preference_loss, pack


class RecurrentLM(nn.Module):
    """Embedding, GRU, head; forward returns the hidden states that predict a batch's targets, (N, D)."""

    def __init__(self, vocab=97, size=32):
        super().__init__()
        self.embedding = nn.Embedding(vocab, size)
        self.layers = nn.GRU(size, size, batch_first=True)
        self.head = nn.Linear(size, vocab, bias=False)

    def forward(self, batch):
        input_ids, _, response = batch.padded()  # one row for each sequence, (S, L)
        hidden, _ = self.layers(self.embedding(input_ids))
        return hidden[:, :-1][response[:, 1:].bool()]  # in the order of batch.targets


@torch.no_grad()
def reference_logprobs(model, batch):
    """The reference's log-prob of each sequence, (S,)."""
    logps = linear_logprobs(model(batch), model.head.weight, batch.targets).logps
    return torch.segment_reduce(logps, "sum", lengths=batch.cu_targets.diff().long())


def train(model, examples, *, pairs_per_step=4, learning_rate=0.5):
    """One pass over the examples, against the model as it is before; the loss of every step."""
    ref_model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    losses = []
    for start in range(0, len(examples), pairs_per_step):
        (batch,) = pack(examples[start : start + pairs_per_step])
        output = linear_preference_loss(
            model(batch),
            model.head.weight,
            batch.targets,
            batch.cu_targets,
            batch.pairs,
            reference_logprobs(ref_model, batch),
            loss=PreferenceLoss(beta=0.1),
            columns=batch.columns,
        )
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(output.loss.detach()))
    return losses


if __name__ == "__main__":
    from tiny import tiny_examples

    torch.manual_seed(0)
    print(train(RecurrentLM(), tiny_examples()))
