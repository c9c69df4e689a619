"""A FlashAttention on the CPU, written out, which torch.nn.attention.varlen runs once it is activated as packages are.

So torch's own varlen_attn runs here, forward and backward, up to the two operators that are CUDA's alone.
"""

import contextlib

import torch
from torch.nn.attention import _registry, register_flash_attention_impl, restore_flash_attention_impl

from dpofast.model.attention.flash import activate_flash_attention

NAME = "stand-in"


def attended(query, key, value, cu_q, cu_k, causal, scale, left, right):
    """Attention (T, H, D) and log-sum-exp (H, T) by FlashAttention's definition: bottom-right, windows inclusive."""
    outputs, sums = [], []
    groups = query.shape[1] // key.shape[1]
    assert query.shape[1] == groups * key.shape[1], "Number of heads in key/value must divide number of heads in query"
    for g in range(len(cu_q) - 1):
        q = query[cu_q[g] : cu_q[g + 1]].transpose(0, 1)
        k, v = (x[cu_k[g] : cu_k[g + 1]].transpose(0, 1).repeat_interleave(groups, dim=0) for x in (key, value))
        distance = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1] - torch.arange(k.shape[1])
        seen = ((left < 0) | (distance <= left)) & ((right < 0) | (distance >= -right))
        if causal:
            seen &= distance >= 0
        scores = (q @ k.transpose(1, 2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
        scores = scores.masked_fill(~seen, -torch.inf)
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
        sums.append(scores.logsumexp(-1))
    return torch.cat(outputs), torch.cat(sums, dim=1)


def _forward(query, key, value, cu_q, cu_k, max_q, max_k, dropout, causal, return_debug_mask, *, scale=None,
             window_size_left=None, window_size_right=None, **_):  # fmt: skip
    assert max_q == cu_q.diff().max() and max_k == cu_k.diff().max() and dropout == 0
    assert cu_q.dtype == cu_k.dtype == torch.int32
    wide = (x.float() for x in (query, key, value))
    out, lse = attended(*wide, cu_q, cu_k, causal, scale, window_size_left, window_size_right)
    nothing = torch.zeros(2, dtype=torch.uint64)
    return out.to(query.dtype), lse, nothing, nothing.clone(), torch.empty(0)


def _backward(grad, query, key, value, out, lse, cu_q, cu_k, max_q, max_k, dropout, causal, rng_state, unused, *,
              scale=None, window_size_left=None, window_size_right=None):  # fmt: skip
    leaves = [x.detach().float().requires_grad_() for x in (query, key, value)]
    with torch.inference_mode(False), torch.enable_grad():
        again, _ = attended(*leaves, cu_q, cu_k, causal, scale, window_size_left, window_size_right)
        grads = torch.autograd.grad(again, leaves, grad.float())
    return tuple(g.to(query.dtype) for g in grads)


class _Handle:
    def __init__(self):
        self.library = torch.library.Library("aten", "IMPL")
        self.library.impl("_flash_attention_forward", _forward, "CPU")
        self.library.impl("_flash_attention_backward", _backward, "CPU")

    def remove(self):
        self.library._destroy()


@contextlib.contextmanager
def flash_on_the_cpu():
    """Inside, torch's varlen_attn runs on CPU tensors."""
    register_flash_attention_impl(NAME, register_fn=_Handle)
    try:
        activate_flash_attention(NAME, torch.device("cuda"))
        yield
        restore_flash_attention_impl()
    finally:
        del _registry._FLASH_ATTENTION_IMPLS[NAME]
