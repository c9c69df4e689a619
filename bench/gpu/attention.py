"""The part "attention" of bench.gpu: each backend over one packed row of pairs, against padded rows of the same pairs.

One layer of Llama 3.1 8B's heads, forward and backward. The padded rows repeat a prompt for each response, as trainers
do that share none, and run torch's scaled_dot_product_attention, which is FlashAttention there. Before a time is
recorded, output and gradients must be within twice the error of the segment-wise backend in the same dtype, of float32.
Copying K and V rows for every segment, which varlen needs, is timed alone.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.attention_case import shared_prompt_batch
from bench.cases import SEED
from bench.gpu.lines import one_line
from bench.gpu.setting import Setting, measure
from dpofast.model.attention.flex import flex_attention_packed, flex_refusal
from dpofast.model.attention.gather import KeyRows, gather_rows
from dpofast.model.attention.layout import AttentionOptions, PackedLayout
from dpofast.model.attention.sdpa import sdpa_attention
from dpofast.model.attention.varlen import varlen_attention, varlen_refusal
from dpofast.packing.batch import PackedBatch

BASE, SLOW, GATHER, COPY = "padded rows", "segment by segment", "index_select", "copy of K and V"
OPTIONS = AttentionOptions()
# What takes longest to compile comes last.
BACKENDS: dict[str, tuple[Callable[..., Tensor], Callable[..., str | None]]] = {
    "varlen": (varlen_attention, varlen_refusal),
    SLOW: (sdpa_attention, lambda *_: None),
    "flex": (flex_attention_packed, flex_refusal),
}


def make_batch(setting: Setting) -> PackedBatch:
    """Pairs of one length: a prompt and two responses."""
    prompt, chosen, rejected = setting.prompt // 3, setting.response * 4 // 5, setting.response * 7 // 10
    return shared_prompt_batch(setting.groups, prompt, (chosen, rejected))


def random_heads(setting: Setting, *shape: int, heads: tuple[int, ...]) -> list[Tensor]:
    """For each count of heads a tensor (rows, heads, positions, width)."""
    generator = torch.Generator(setting.device).manual_seed(SEED)
    rows, positions = shape
    return [
        torch.randn(rows, count, positions, setting.width, generator=generator, device=setting.device).to(setting.dtype)
        for count in heads
    ]


def with_gradients(attend: Callable[..., Tensor], inputs: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """The output of attend and the gradients of its inputs."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    output = attend(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream)]


def errors(got: list[Tensor], truth: list[Tensor]) -> list[float]:
    """The norm of each difference over the norm of the truth."""
    return [float((a.float() - b).norm() / b.norm()) for a, b in zip(got, truth, strict=True)]


def run(setting: Setting, left: Callable[[], float]) -> Iterator[tuple[str, Any]]:
    """The copy of K and V, then each backend: its errors, and its times with and without gradients.

    Raises:
        RuntimeError: at the end, a backend that should run did not, or was wrong.
    """
    batch = make_batch(setting)
    layout = PackedLayout(batch.segments)
    heads = (setting.heads_q, setting.heads_kv, setting.heads_kv)
    inputs = random_heads(setting, 1, batch.num_tokens, heads=heads)
    (upstream,) = random_heads(setting, 1, batch.num_tokens, heads=heads[:1])
    upstream = upstream.transpose(1, 2)
    # Rows are padded on the right, so that causal ones need no mask.
    sequences, longest = batch.num_sequences, int(batch.segments.runs.cu_seqlens_k.diff().max())
    rows = random_heads(setting, sequences, longest, heads=heads)
    (rows_upstream,) = random_heads(setting, sequences, longest, heads=heads[:1])
    padded = functools.partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    yield (
        "setting",
        {
            "positions": batch.num_tokens,
            "padded_positions": sequences * longest,
            "keys": int(batch.segments.runs.cu_seqlens_k[-1]),
            "heads": heads,
            "width": setting.width,
        },
    )
    yield COPY, measure(copies(batch, inputs), setting, GATHER)

    def attend(name: str, *inputs: Tensor) -> Tensor:
        return BACKENDS[name][0](*inputs, layout, OPTIONS)

    slow = functools.partial(attend, SLOW)
    truth = with_gradients(slow, [x.float() for x in inputs], upstream.float())
    own = errors(with_gradients(slow, inputs, upstream), truth)
    wrong = []
    for name, (_, refusal) in BACKENDS.items():
        if reason := refusal(inputs[0], inputs[2], OPTIONS):
            yield name, {"left_out": reason}
            continue
        function = functools.partial(attend, name)
        try:
            off = errors(with_gradients(function, inputs, upstream), truth)
            floor = torch.finfo(setting.dtype).eps
            right = all(error <= 2 * allowed + floor for error, allowed in zip(off, own, strict=True))
            both = {
                BASE: functools.partial(with_gradients, padded, rows, rows_upstream),
                name: functools.partial(with_gradients, function, inputs, upstream),
            }
            forward = {BASE: functools.partial(padded, *rows), name: functools.partial(function, *inputs)}
            figures = {"off": off, "right": right, "forward and backward": measure(both, setting, BASE)}
            with torch.no_grad():
                figures["forward"] = measure(forward, setting, BASE)
        except Exception as error:
            wrong.append(f"{name}: {one_line(error)}")
            yield name, {"left_out": one_line(error)}
            continue
        yield name, figures
        if not right:
            wrong.append(f"{name}: off by {max(off):.1e} of the norm, {SLOW} by {max(own):.1e}")
    if wrong:
        raise RuntimeError("; ".join(wrong))


def copies(batch: PackedBatch, inputs: list[Tensor]) -> dict[str, Callable[[], Any]]:
    """The ways to copy the rows of K and V that each segment attends to, with the backward."""
    key, value = (tensor[0].transpose(0, 1).contiguous() for tensor in inputs[1:])
    rows = KeyRows(*(part.to(key.device) for part in KeyRows.of(batch.segments)))
    upstream = torch.ones(len(rows.rows), *key.shape[1:], dtype=key.dtype, device=key.device)

    def index_select(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return key.index_select(0, rows.rows), value.index_select(0, rows.rows)

    def run(gather: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        leaves = [tensor.detach().requires_grad_() for tensor in (key, value)]
        torch.autograd.grad(gather(*leaves), leaves, [upstream, upstream])

    ways = {GATHER: index_select, "gather_rows": functools.partial(gather_rows, rows=rows)}
    return {name: functools.partial(run, way) for name, way in ways.items()}


def table(pieces: dict[str, Any]) -> str:
    """Milliseconds of one layer, and over those of the padded rows."""
    setting = pieces["setting"]
    lines = [
        f"attention of one layer: {setting['positions']} packed positions, {setting['padded_positions']} padded, "
        f"{setting['keys']} keys, heads {setting['heads']} of {setting['width']}",
        f"{'':44}{'ms':>9}{'p20':>9}{'p80':>9}{'ratio':>9}{'p20':>9}{'p80':>9}",
    ]

    def line(title: str, time: dict[str, Any]) -> str:
        values = "".join(f"{1e3 * time[key]:9.3f}" for key in ("median", "p20", "p80"))
        return f"{title:44}{values}" + "".join(f" {time['ratio'][key]:8.3f}" for key in ("median", "p20", "p80"))

    for name, figures in pieces.items():
        if name == COPY:
            lines += [line(f"{COPY}, {way}", time) for way, time in figures.items()]
        elif "left_out" in figures:
            lines.append(f"{name} is left out: {figures['left_out']}")
        elif name != "setting":
            for direction in ("forward", "forward and backward"):
                times = figures[direction]
                lines += [line(f"{direction}, {BASE}", times[BASE]), line(f"{direction}, {name}", times[name])]
            if not figures["right"]:
                lines.append(f"WRONG: {name} is off by {figures['off']} of the norm")
    return "\n".join(lines)
