"""Count what one decoder layer of transformers reads and writes outside products and attention."""

import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from bench.cost import _GEMMS, Cost


class _NoAttention(torch.autograd.Function):
    """Keeps its inputs as attention does, and runs no operator that counts."""

    @staticmethod
    def forward(ctx, query, key, value):
        ctx.save_for_backward(query, key, value)
        batch, heads, length, width = query.shape
        return query.new_empty(batch, length, heads, width)

    @staticmethod
    def backward(ctx, grad):
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors)


AttentionInterface.register("no_attention", lambda module, q, k, v, mask, **kwargs: (_NoAttention.apply(q, k, v), None))


class Traffic(TorchDispatchMode):
    """Bytes of the inputs and outputs of operators that are neither products nor views, and how many operators run."""

    def __init__(self):
        super().__init__()
        self.bytes = self.operators = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        inputs, outputs = (
            [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)] for tree in ((args, kwargs), result)
        )
        storages = {tensor.untyped_storage()._cdata for tensor in inputs}
        view = not func._schema.is_mutable and all(t.untyped_storage()._cdata in storages for t in outputs)
        if view or func.__name__.startswith(("empty", "new_empty")):
            return result
        self.operators += 1
        if func.overloadpacket not in _GEMMS:
            self.bytes += sum(map(_bytes, [*inputs, *outputs]))
        return result


def _bytes(tensor):
    """Without the elements that a broadcast repeats."""
    count = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count


def layer_traffic(config: LlamaConfig, tokens: int, precision: str, lora: int = 0) -> dict[str, int]:
    """Bytes of a forward, of a backward, and kept between them, and operators, of one layer: a model of two minus one.

    Args:
        config: of a Llama.
        tokens: in one row.
        precision: "float32", "bfloat16", or "autocast" for float32 weights under bfloat16's autocast.
        lora: rank of an adapter on every linear layer, 0 for none.
    """
    two, one = (_count(config, depth, tokens, precision, lora) for depth in (2, 1))
    return {name: two[name] - one[name] for name in two}


def _count(config, depth, tokens, precision, lora):
    config = LlamaConfig(**{**config.to_dict(), "num_hidden_layers": depth})
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    model = LlamaForCausalLM(config).to(dtype)
    model.config._attn_implementation = "no_attention"
    if lora:
        get_peft_model(model, LoraConfig(r=lora, target_modules="all-linear", task_type="CAUSAL_LM"))
    inputs = torch.zeros(1, tokens, config.hidden_size, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"), Cost() as cost, Traffic() as forward:
        hidden = model.model(inputs_embeds=inputs, use_cache=False).last_hidden_state
    saved = cost.live_bytes
    gradient = torch.empty_like(hidden)
    with Traffic() as backward:
        hidden.backward(gradient)
    return {
        "forward": forward.bytes,
        "backward": backward.bytes,
        "saved": saved,
        "forward operators": forward.operators,
        "backward operators": backward.operators,
    }
