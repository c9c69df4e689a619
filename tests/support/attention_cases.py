"""Layouts, inputs and attention written out from the position rule, shared by the tests of attention."""

import dataclasses
from itertools import pairwise

import torch

from dpofast import pack
from dpofast.model.attention.layout import AttentionOptions
from tests.support.histories import histories

HEADS, KV_HEADS, WIDTH = 4, 2, 16
LENGTHS = {9: (4, 1, 6), 1: (3, 1), 14: (2, 2, 9, 1)}
LONG = {150: (90, 40, 260), 3: (5, 140), 128: (129, 129)}
OPTIONS = {
    "plain": AttentionOptions(),
    "scaled": AttentionOptions(scaling=0.5),
    "window": AttentionOptions(window=4),
    "softcap": AttentionOptions(softcap=2.0),
    "sinks": AttentionOptions(sinks=torch.tensor([0.5, -1.0, 2.0, 0.0])),
    "all": AttentionOptions(scaling=0.4, window=5, softcap=1.5, sinks=torch.tensor([0.1, 1.0, -2.0, 3.0])),
}


def packed_segments(given):
    """The segments of examples, or of groups by their lengths: prompt -> responses."""
    if isinstance(given, dict):
        given = [
            {
                "prompt_ids": [prompt] * prompt,
                "branches": [[branch] * length for branch, length in enumerate(responses)],
                "pairs": [(0, branch) for branch in range(1, len(responses))],
            }
            for prompt, responses in given.items()
        ]
    (batch,) = pack(given)
    return batch.segments


def visibility(segments, window):
    """(T, T) bool: row q sees key k, from the paths of the rows and their places in them."""
    seen = torch.zeros(segments.num_rows, segments.num_rows, dtype=torch.bool)
    for row, path in enumerate(histories(segments)):
        seen[row, torch.tensor(path[-(window or len(path)) :])] = True
    return seen


def random_inputs(segments, dtype=torch.float32, device="cpu", value_width=WIDTH):
    rows = int(segments.cu_seqlens_q[-1])
    shapes = (HEADS, WIDTH), (KV_HEADS, WIDTH), (KV_HEADS, value_width)
    return [torch.randn(1, heads, rows, width).to(device, dtype) for heads, width in shapes]


def written_out(query, key, value, segments, options):
    """Every segment's keys in order of position; scores, softcap, mask, sinks and softmax as they are defined."""
    outputs = []
    seen = histories(segments)
    for start, stop in pairwise(segments.cu_seqlens_q.tolist()):
        rows, own = seen[stop - 1], stop - start
        k, v = (tensor[:, :, rows].repeat_interleave(HEADS // KV_HEADS, dim=1) for tensor in (key, value))
        q = query[:, :, start:stop]
        scores = q @ k.transpose(2, 3) * (WIDTH**-0.5 if options.scaling is None else options.scaling)
        if options.softcap is not None:
            scores = options.softcap * torch.tanh(scores / options.softcap)
        distance = torch.arange(len(rows) - own, len(rows))[:, None] - torch.arange(len(rows))
        hidden = (distance < 0) | (distance >= (options.window or len(rows)))
        scores = scores.masked_fill(hidden.to(scores.device), -torch.inf)
        if options.sinks is not None:
            sink = options.sinks.to(scores).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat((scores, sink), dim=-1)
        outputs.append(scores.softmax(dim=-1)[..., : len(rows)] @ v)
    return torch.cat(outputs, dim=2).transpose(1, 2)


def gradients_of(attend, inputs, options, upstream):
    """The output of attend and the gradients of its inputs, the sinks among them."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    if options.sinks is not None:
        leaves.append(options.sinks.to(inputs[0]).detach().clone().requires_grad_())
        options = dataclasses.replace(options, sinks=leaves[-1])
    output = attend(*leaves[:3], options)
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream.to(output))]


class FakeTensor:
    """A tensor's device, dtype and shape, for choices on devices that are not here."""

    def __init__(self, device="cuda", dtype=torch.bfloat16, width=128):
        self.device, self.dtype, self.shape = torch.device(device), dtype, (1, 4, 10, width)
