"""Tensor parallelism: the plain loop on a Llama whose layers torch splits, and whose head is split by its vocabulary.

    python examples/tensor_parallel_loop.py         # two CPU processes

Every rank of the mesh runs pytorch_loop.train on the same examples; logits of a rank's own words are all it computes.
"""

import torch
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from dpofast import attach_logprob_head

PLAN = {
    **{f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"},
    **{f"mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")},
    **{f"{name}_proj": RowwiseParallel() for name in ("self_attn.o", "mlp.down")},
}


def shard(model, mesh):
    """Split a model, whole and equal on every rank, over a one-dimensional mesh. Returns the model."""
    attach_logprob_head(model)  # first: it checks the numbers of the whole model
    for layer in model.model.layers:
        parallelize_module(layer, mesh, PLAN)
    # A parameter alone, and no plan for lm_head: linear_logprobs brings the exchanges that it needs.
    model.lm_head.weight = nn.Parameter(distribute_tensor(model.lm_head.weight.detach(), mesh, [Shard(0)]))
    return model


def _rank(rank, folder):
    from pytorch_loop import train
    from tiny import tiny_examples, tiny_model

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    losses = train(shard(tiny_model(), mesh), shard(tiny_model(), mesh), tiny_examples())
    if rank == 0:
        print(losses)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        # forkserver: such a process ends without finalizing Python. torch's caches of sharded operators keep gloo's
        # threads alive until then, and one that still frees a tensor would abort the process (torch 2.13, Python 3.11).
        torch.multiprocessing.start_processes(_rank, (folder,), nprocs=2, start_method="forkserver")
