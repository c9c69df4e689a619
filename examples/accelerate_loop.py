"""A loop on accelerate: any number of processes, mixed precision.

    python examples/accelerate_loop.py

dataset: rows with prompt_ids, chosen_ids and rejected_ids.
"""

import torch
from accelerate import Accelerator

from dpofast import PreferenceLoss, attach_logprob_head, pack, preference_loss, sequence_logprobs


def collate(examples):
    """A batch is one packed row; accelerate moves it to the device."""
    (batch,) = pack(examples)
    return batch


def train(model, ref_model, dataset, *, pairs_per_step=4, learning_rate=0.1):
    """One pass over the dataset; the loss of every step."""
    accelerator = Accelerator()
    attach_logprob_head(model)  # before prepare, which wraps the model
    attach_logprob_head(ref_model)
    loader = torch.utils.data.DataLoader(dataset, batch_size=pairs_per_step, collate_fn=collate)
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    ref_model = accelerator.prepare_model(ref_model, evaluation_mode=True)
    losses = []
    for batch in loader:
        logps = sequence_logprobs(model(packed=batch), batch)
        with torch.no_grad():
            ref_logps = sequence_logprobs(ref_model(packed=batch), batch)
        dpo = PreferenceLoss(beta=0.1)
        loss = preference_loss(logps, batch.pairs, ref_logps, loss=dpo, columns=batch.columns).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(accelerator.reduce(loss.detach(), "mean")))
    return losses


if __name__ == "__main__":
    from tiny import tiny_examples, tiny_model

    print(train(tiny_model(), tiny_model(), tiny_examples()))
