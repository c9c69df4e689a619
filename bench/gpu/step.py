"""The part "step" of bench.gpu: a training step of a random Llama on packed pairs, against the same pairs padded.

Both run one optimizer step (fused AdamW) on the same pairs with given reference log-probs. The padded step computes
full logits for a few pairs at a time, as a plain PyTorch implementation does. Their log-probs are compared first.
"""

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.cases import SEED
from bench.gpu.paths import no_sync
from bench.gpu.setting import Setting, measure, one_line
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


def run(setting: Setting, figures: dict[str, Any], left: Callable[[], float]) -> None:
    """Check that packed and padded log-probs agree, then time both steps and record peak memory and host syncs."""
    model, examples = make_model(setting), make_examples(setting)
    packed = [batch.to(setting.device) for batch in pack(examples, max_tokens=16_384)]
    chunks = [examples[at : at + PADDED_PAIRS] for at in range(0, len(examples), PADDED_PAIRS)]
    padded = [batch.to(setting.device) for chunk in chunks for batch in pack(chunk)]
    with torch.no_grad():
        refs = [sequence_logprobs(model(packed=batch), batch) for batch in packed]
        # Random pairs share no prompt, so all sequences stand in the order of the examples.
        apart = list(torch.cat(refs).split([batch.num_sequences for batch in padded]))
        own = torch.cat([padded_logps(model, batch) for batch in padded])
    ours = torch.cat(refs)
    targets = sum(batch.num_targets for batch in packed)
    figures["difference_nats_per_token"] = float((ours - own).abs().sum() / targets)
    if not figures["difference_nats_per_token"] <= TOLERANCE[setting.dtype]:
        raise ValueError(f"packed and padded differ by {figures['difference_nats_per_token']:.2e} nats a token")
    figures["pairs"], figures["targets"] = len(examples), targets
    figures["attention"] = model.config._attn_implementation
    positions = {"packed": sum(batch.num_tokens for batch in packed), "padded": 0}
    positions["padded"] = sum(batch.padded()[0].numel() for batch in padded)
    cuda = setting.device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=cuda)

    def step(gradients: Callable[..., Tensor], batches: list[PackedBatch], refs: list[Tensor]) -> Callable[[], Tensor]:
        def function() -> Tensor:
            loss = gradients(model, batches, refs, len(examples))
            optimizer.step()
            optimizer.zero_grad()
            return loss

        return function

    steps = {"packed": step(packed_step, packed, refs), "padded": step(padded_step, padded, apart)}
    ready: dict[str, Callable[[], Tensor]] = {}
    figures["steps"] = {}
    for name, function in steps.items():
        try:
            function()  # the first step allocates the optimizer's state
            loss, peak = seen(function, setting.device)
        except torch.cuda.OutOfMemoryError as error:
            if name == "packed":
                raise
            print(f"the padded step did not run: {one_line(error)}", flush=True)
            figures["steps"][name] = {"failed": one_line(error)}
            optimizer.zero_grad()
            continue
        figures["steps"][name] = {"loss": float(loss), "peak_bytes": peak, "positions": positions[name]}
        ready[name] = function
    try:
        with no_sync(setting.device):
            steps["packed"]()
    except RuntimeError as error:
        figures["packed_step_syncs"] = one_line(error)
    else:
        figures["packed_step_syncs"] = None
    optimizer.zero_grad()
    for name, seconds in measure(ready, setting).items():
        figures["steps"][name]["seconds"] = seconds


def table(figures: dict[str, Any]) -> str:
    """One line a step."""
    title = f"step of {figures['pairs']} pairs"
    lines = [f"{title:20}{'s':>9}{'p20':>9}{'p80':>9}{'positions':>11}{'targets/s':>11}{'peak MiB':>10}{'loss':>8}"]
    for name, row in figures["steps"].items():
        if "failed" in row:
            lines.append(f"{name:20} did not run: {row['failed']}")
            continue
        seconds = row["seconds"]
        peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
        lines.append(
            f"{name:20}{seconds['median']:9.4f}{seconds['p20']:9.4f}{seconds['p80']:9.4f}{row['positions']:11}"
            f"{figures['targets'] / seconds['median']:11.0f}{peak:>10}{row['loss']:8.4f}"
        )
    difference = figures["difference_nats_per_token"]
    lines.append(
        f"attention {figures['attention']}; log-probs differ by {difference:.1e} nats a token; "
        f"host syncs of the packed step: {figures['packed_step_syncs'] or 'none'}"
    )
    return "\n".join(lines)
