"""A module in the manner of Lightning and torchtune: take lightning.LightningModule as the base, and the rest stays.

    python examples/lightning_module.py

It computes reference log-probs once, and then the whole loss in one call: the cheapest path where the head trains.
"""

from dataclasses import replace

import torch

from dpofast import PreferenceLoss, attach_logprob_head, pack, sequence_logprobs
from dpofast.model.attach import PackedPreference


class PreferenceModule(torch.nn.Module):
    """training_step takes a PackedBatch with its ref_logps."""

    def __init__(self, model, learning_rate=0.1):
        super().__init__()
        self.model = attach_logprob_head(model)
        self.learning_rate = learning_rate
        self.loss = PreferenceLoss(beta=0.1)

    def training_step(self, batch, batch_idx):
        preference = PackedPreference(ref_logps=batch.ref_logps, loss=self.loss, num_pairs=batch.num_pairs)
        return self.model(packed=batch, preference=preference).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)


@torch.no_grad()
def batches_with_reference(ref_model, examples, pairs_per_step=4):
    """Packed batches of pairs_per_step pairs, the reference's log-probs in them."""
    attach_logprob_head(ref_model)
    for start in range(0, len(examples), pairs_per_step):
        (batch,) = pack(examples[start : start + pairs_per_step])
        yield replace(batch, ref_logps=sequence_logprobs(ref_model(packed=batch), batch))


def train(model, ref_model, examples):
    """What a Lightning Trainer does with such a module; the loss of every step."""
    module = PreferenceModule(model)
    optimizer = module.configure_optimizers()
    losses = []
    for index, batch in enumerate(list(batches_with_reference(ref_model, examples))):
        loss = module.training_step(batch, index)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


if __name__ == "__main__":
    from tiny import tiny_examples, tiny_model

    print(train(tiny_model(), tiny_model(), tiny_examples()))
