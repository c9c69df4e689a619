"""Sequence parallelism: the plain loop, in which the processes of a group share the rows of every batch.

    python examples/sequence_parallel_loop.py         # two CPU processes

Every rank of the group has the same examples and the whole model, and computes every second row of a packed batch: half
of the activations of one process. Log-probs and losses are those of the whole batch on each of them.
"""

import torch

from dpofast import PreferenceLoss, attach_logprob_head, pack, preference_loss, sequence_logprobs


def train(model, ref_model, examples, group, *, pairs_per_step=4, max_tokens=4096, learning_rate=0.1):
    """One pass over the examples; the loss of every step."""
    attach_logprob_head(model)
    attach_logprob_head(ref_model)
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    losses = []
    for start in range(0, len(examples), pairs_per_step):
        step = examples[start : start + pairs_per_step]
        loss_of_step = 0.0
        for batch in pack(step, max_tokens):
            batch = batch.split_over(group).to(model.device)  # split on the CPU
            logps = sequence_logprobs(model(packed=batch), batch)
            with torch.no_grad():
                ref_logps = sequence_logprobs(ref_model(packed=batch), batch)
            loss = PreferenceLoss(beta=0.1)
            output = preference_loss(
                logps, batch.pairs, ref_logps, loss=loss, num_pairs=len(step), columns=batch.columns
            )
            output.loss.backward()
            loss_of_step += output.loss.detach()
        for weight in model.parameters():  # each rank has a part of the gradient
            torch.distributed.all_reduce(weight.grad, group=group)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss_of_step))
    return losses


def _rank(rank, folder):
    from tiny import tiny_examples, tiny_model

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    losses = train(tiny_model(), tiny_model(), tiny_examples(), torch.distributed.group.WORLD)
    if rank == 0:
        print(losses)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(_rank, (folder,), nprocs=2, start_method="forkserver")
