"""The part "step" of bench.gpu: a training step of a random Llama on packed pairs, against the same pairs padded.

Both run one optimizer step (fused AdamW) on the same pairs with given reference log-probs. The padded step computes
full logits for a few pairs at a time, as a plain PyTorch implementation does. Their log-probs are compared first.
"""

import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench.cases import SEED
from bench.gpu.lines import one_line
from bench.gpu.paths import no_sync
from bench.gpu.setting import Setting, measure
from bench.timing import seen
from dpofast import PreferenceLoss, attach_logprob_head, pack, preference_loss, reference, sequence_logprobs
from dpofast.model.attach import PackedPreference
from dpofast.packing.batch import PackedBatch

# Mean difference of a token's log-prob, in nats: a bfloat16 backbone rounds a packed batch differently.
TOLERANCE = {torch.bfloat16: 5e-2, torch.float32: 1e-4}
BETA = 0.1
# Pairs whose full logits exist at the same time in the padded step.
PADDED_PAIRS = 4


def make_model(setting: Setting) -> Any:
    """A Llama in the setting's shapes, random weights, its log-prob head attached."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    width = setting.d // 2
    config = LlamaConfig(
        vocab_size=setting.v,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=setting.layers,
        num_attention_heads=max(2, width // 64),
        num_key_value_heads=max(2, width // 64) // 2,
        max_position_embeddings=setting.prompt + setting.response,
        use_cache=False,
    )
    with torch.device(setting.device):
        model = LlamaForCausalLM(config)
    return attach_logprob_head(model.to(setting.dtype).train())


def make_examples(setting: Setting) -> list[dict[str, list[int]]]:
    """Pairs of random ids; lengths vary by a factor of three."""
    draw = random.Random(SEED)

    def ids(longest: int) -> list[int]:
        return [draw.randrange(setting.v) for _ in range(draw.randint(longest // 3, longest))]

    names = {"prompt_ids": setting.prompt, "chosen_ids": setting.response, "rejected_ids": setting.response}
    return [{name: ids(longest) for name, longest in names.items()} for _ in range(setting.pairs)]


def packed_step(model: Any, batches: list[PackedBatch], refs: list[Tensor], pairs: int) -> Tensor:
    """Gradients of the mean loss, the whole loss of a micro-batch in one pass over the head. Returns the loss."""
    total = torch.zeros((), device=refs[0].device)
    for batch, ref_logps in zip(batches, refs, strict=True):
        known = PackedPreference(ref_logps, PreferenceLoss(beta=BETA), pairs)
        loss = model(packed=batch, preference=known).loss
        loss.backward()
        total += loss.detach()
    return total


def padded_step(model: Any, batches: list[PackedBatch], refs: list[Tensor], pairs: int) -> Tensor:
    """Gradients of the same loss from padded rows and full logits. Returns the loss."""
    total = torch.zeros((), device=refs[0].device)
    for batch, ref_logps in zip(batches, refs, strict=True):
        logps = padded_logps(model, batch)
        loss = preference_loss(logps, batch.pairs, ref_logps, loss=PreferenceLoss(beta=BETA), num_pairs=pairs).loss
        loss.backward()
        total += loss.detach()
    return total


def padded_logps(model: Any, batch: PackedBatch) -> Tensor:
    """Summed log-probs (S,) of a batch, padded."""
    tokens = reference.padded_logprobs(model, *batch.padded(), use_cache=False)
    return reference.sequence_logprobs(tokens, batch.cu_targets)


def run(setting: Setting, left: Callable[[], float]) -> Iterator[tuple[str, Any]]:
    """Check that packed and padded log-probs agree, then peak memory, host syncs and times of both steps.

    Raises:
        ValueError: log-probs do not agree.
    """
    model, examples = make_model(setting), make_examples(setting)
    packed = [batch.to(setting.device) for batch in pack(examples, max_tokens=16_384)]
    chunks = [examples[at : at + PADDED_PAIRS] for at in range(0, len(examples), PADDED_PAIRS)]
    padded = [batch.to(setting.device) for chunk in chunks for batch in pack(chunk)]
    with torch.no_grad():
        refs = [sequence_logprobs(model(packed=batch), batch) for batch in packed]
        # Random pairs share no prompt, so all sequences stand in the order of the examples.
        apart = list(torch.cat(refs).split([batch.num_sequences for batch in padded]))
        own = torch.cat([padded_logps(model, batch) for batch in padded])
    targets = sum(batch.num_targets for batch in packed)
    difference = float((torch.cat(refs) - own).abs().sum() / targets)
    attention = model.config._attn_implementation
    yield (
        "setting",
        {
            "pairs": len(examples),
            "targets": targets,
            "attention": attention,
            "difference_nats_per_token": difference,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        },
    )
    if not difference <= TOLERANCE[setting.dtype]:
        raise ValueError(f"packed and padded differ by {difference:.2e} nats a token")
    positions = {
        "packed": sum(batch.num_tokens for batch in packed),
        "padded": sum(batch.padded()[0].numel() for batch in padded),
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=setting.device.type == "cuda")

    def step(gradients: Callable[..., Tensor], batches: list[PackedBatch], refs: list[Tensor]) -> Callable[[], Tensor]:
        def function() -> Tensor:
            loss = gradients(model, batches, refs, len(examples))
            optimizer.step()
            optimizer.zero_grad()
            return loss

        return function

    steps = {"packed": step(packed_step, packed, refs), "padded": step(padded_step, padded, apart)}
    ready: dict[str, Callable[[], Tensor]] = {}
    for name, function in steps.items():
        try:
            function()  # the first step allocates the optimizer's state
            loss, peak = seen(function, setting.device)
        except torch.cuda.OutOfMemoryError as error:
            if name == "packed":
                raise
            optimizer.zero_grad()
            yield name, {"failed": one_line(error)}
            continue
        yield name, {"loss": float(loss), "peak_bytes": peak, "positions": positions[name], "targets": targets}
        ready[name] = function
    times = measure(ready, setting, list(ready)[-1])
    yield "times", times
    waits = None
    try:
        with no_sync(setting.device):
            steps["packed"]()
    except RuntimeError as error:
        waits = one_line(error)
    yield "host syncs", waits


def table(pieces: dict[str, Any]) -> str:
    """One line a step."""
    setting, times = pieces["setting"], pieces.get("times", {})
    title = f"step of {setting['pairs']} pairs"
    columns = f"{'of padded':>11}{'positions':>11}{'targets/s':>11}{'peak MiB':>10}{'loss':>8}"
    lines = [f"{title:20}{'s':>9}{'p20':>9}{'p80':>9}{columns}"]
    for name in ("packed", "padded"):
        row = pieces.get(name, {"failed": "not measured"})
        if "failed" in row or name not in times:
            lines.append(f"{name:20} {row.get('failed', 'not timed')}")
            continue
        time = times[name]
        peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
        lines.append(
            f"{name:20}{time['median']:9.4f}{time['p20']:9.4f}{time['p80']:9.4f}{time['ratio']['median']:11.3f}"
            f"{row['positions']:11}{setting['targets'] / time['median']:11.0f}{peak:>10}{row['loss']:8.4f}"
        )
    waits = pieces.get("host syncs", "not looked for")
    lines.append(
        f"{setting['parameters'] / 1e6:.0f} M parameters, attention {setting['attention']}; log-probs differ by "
        f"{setting['difference_nats_per_token']:.1e} nats a token; host syncs of the packed step: {waits or 'none'}"
    )
    return "\n".join(lines)
