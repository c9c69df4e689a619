"""Code that calls LigerFusedLinearDPOLoss: the import changes, and the call does not.

    python examples/liger_loss.py

batches: dicts of padded input_ids, attention_mask and completion_mask (2P, L), chosen rows first.
"""

import torch

from dpofast.integrations.liger import LigerFusedLinearDPOLoss  # was: from liger_kernel.chunked_loss import ...


def train(model, ref_model, batches, *, learning_rate=0.1):
    """A step on every batch; their losses."""
    loss_function = LigerFusedLinearDPOLoss(beta=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    losses = []
    for batch in batches:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)[:, 1:]
        hidden = model.base_model(**inputs).last_hidden_state[:, :-1]
        with torch.no_grad():
            ref_hidden = ref_model.base_model(**inputs).last_hidden_state[:, :-1]
        loss, _ = loss_function(
            model.lm_head.weight, hidden, labels, ref_input=ref_hidden, ref_weight=ref_model.lm_head.weight
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


if __name__ == "__main__":
    from tiny import tiny_model, tiny_padded

    print(train(tiny_model(), tiny_model(), tiny_padded()))
