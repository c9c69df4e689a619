"""Images in prompts: log-probs and gradients of every family against its own forward over each sequence alone."""

import copy

import pytest
import torch

from dpofast import PackedPreference, PreferenceLoss, attach_logprob_head
from dpofast.model.checks.images import images_refused
from tests.support.close import named
from tests.support.vision_models import FAMILIES, PACKED, vision_model
from tests.support.vision_prompts import alone, mixed_prompts, packed, prompt, sequences, with_branches

_TOWERS = ("visual", "vision_tower", "vision_model")
# of families whose vision tower has a row for each patch
_FEW = ("qwen3_vl", "llava_next", "llava_onevision", "idefics3", "mistral3", "lfm2_vl")


def attached(family, padded=False):
    """A model that takes images, and its plain original."""
    model = vision_model(family)
    plain = copy.deepcopy(model)
    attach_logprob_head(model, padded=padded)
    assert images_refused(model) is None
    return model, plain


def tower_rows(model):
    """A list that grows by the rows of pixels in each call of the vision tower."""
    (tower,) = (getattr(model.model, name) for name in _TOWERS if hasattr(model.model, name))
    rows = []

    def count(module, args, options):
        rows.append(len(args[0] if args else options["pixel_values"]))

    tower.register_forward_pre_hook(count, with_kwargs=True)
    return rows


def assert_equal_gradients(model, plain):
    """Of all weights, text, projector and vision, as far as float32 goes."""
    for (name, ours), (_, own) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert (ours.grad is None) == (own.grad is None), name
        if own.grad is not None:
            close = 1e-5 * max(1.0, float(own.grad.abs().max()))
            torch.testing.assert_close(ours.grad, own.grad, atol=close, rtol=1e-4, msg=named(name))
    names = [name for name, one in plain.named_parameters() if one.grad is not None and float(one.grad.abs().max()) > 0]
    assert any(any(tower in name for tower in _TOWERS) for name in names)
    assert any("projector" in name or "merger" in name or "connector" in name for name in names)


@pytest.mark.parametrize(
    "family, padded",
    [(family, padded) for family in FAMILIES for padded in (False, True) if padded or family in PACKED],
)
def test_equals_each_sequence_run_alone(family, padded):
    model, plain = attached(family, padded)
    prompts = mixed_prompts(family)
    (batch,) = packed(model, prompts)
    rows = tower_rows(model)
    truth = alone(plain, family, sequences(prompts))
    assert truth.std() > 0.5
    logps = model(packed=batch).logps
    torch.testing.assert_close(logps, truth, atol=1e-5, rtol=0)
    if not padded:
        distinct = {(tuple(one.ids), one.key): one for one in prompts}.values()
        assert rows == [sum(one.patches for one in distinct)]
    weights = torch.randn(len(truth), generator=torch.Generator().manual_seed(1)) / len(truth)
    (logps * weights).sum().backward()
    (truth * weights).sum().backward()
    assert_equal_gradients(model, plain)


@pytest.mark.parametrize("family", PACKED)
def test_positions_are_prompts_and_branches_once(family):
    model, plain = attached(family)
    prompts = mixed_prompts(family)
    (batch,) = packed(model, prompts, share="prompt")
    distinct = {}
    for one, response in sequences(prompts):
        distinct.setdefault((tuple(one.ids), one.key), []).append(len(response) - 1)
    assert batch.num_tokens == sum(len(ids) + sum(branches) for (ids, _), branches in distinct.items())
    with torch.no_grad():
        truth = alone(plain, family, sequences(prompts))
        torch.testing.assert_close(model(packed=batch).logps, truth, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", _FEW)
def test_preference_gives_the_losses_and_gradients_of_sequences_alone(family):
    model, plain = attached(family)
    prompts = mixed_prompts(family)
    (batch,) = packed(model, prompts)
    ref = torch.linspace(-9.0, -4.0, batch.num_sequences)
    preference = PackedPreference(ref_logps=ref, loss=PreferenceLoss(beta=0.1), num_pairs=batch.num_pairs)
    output = model(packed=batch, preference=preference)
    output.loss.backward()
    truth = torch.stack([part.sum() for part in alone(plain, family, sequences(prompts)).split(
        batch.cu_targets.diff().tolist()
    )])  # fmt: skip
    chosen, rejected = batch.pairs.long().T
    ratios = truth - ref
    loss = -torch.nn.functional.logsigmoid(0.1 * (ratios[chosen] - ratios[rejected])).mean()
    loss.backward()
    torch.testing.assert_close(output.loss, loss, atol=1e-5, rtol=0)
    assert_equal_gradients(model, plain)


@pytest.mark.parametrize("family", ["qwen2_vl", "llava", "internvl", "lfm2_vl"])
def test_equal_text_with_different_images_shares_no_row_of_an_image(family):
    model, plain = attached(family)
    prompts = with_branches([prompt(family, [(0, 1)]), prompt(family, [(0, 2)])], (2, 2))
    for one in prompts:
        one.branches = [[10, 11], [12, 13]]
    (batch,) = packed(model, prompts)
    before = prompts[0].ids.index(90)
    assert batch.num_tokens == before + 2 * (len(prompts[0].ids) - before) + 4
    with torch.no_grad():
        logps = model(packed=batch).logps
        torch.testing.assert_close(logps, alone(plain, family, sequences(prompts)), atol=1e-5, rtol=0)
    assert (logps[:4] - logps[4:]).abs().max() > 1e-3  # they see their own image


@pytest.mark.parametrize("family", _FEW)
def test_a_later_turn_shares_the_images_before_it(family):
    """The tower sees an image of several prompts once where their rows are shared, and each time where they are not."""
    model, plain = attached(family)
    begun = [(0, 1), (1, 2)]
    prompts = [prompt(family, begun), prompt(family, [*begun, (2, 3)]), prompt(family, [*begun, (2, 4)])]
    with_branches(prompts, (2, 2, 3))
    truth = alone(plain, family, sequences(prompts)).detach()
    rows = tower_rows(model)
    seen = {}
    for share in ("prefix", "prompt", "none"):
        (batch,) = packed(model, prompts, share=share)
        rows.clear()
        with torch.no_grad():
            torch.testing.assert_close(model(packed=batch).logps, truth, atol=1e-5, rtol=0)
        (seen[share],) = rows
    first, *later = (one.patches for one in prompts)
    assert seen["prefix"] == first + sum(patches - first for patches in later)
    assert seen["prompt"] == first + sum(later)
    assert seen["none"] == 2 * first + 2 * later[0] + 3 * later[1]


@pytest.mark.parametrize("family", ["qwen3_vl", "llava_next"])
def test_micro_batches_have_the_images_of_their_own_rows(family):
    model, plain = attached(family)
    prompts = mixed_prompts(family)
    batches = packed(model, prompts, max_tokens=60)
    assert len(batches) > 1
    order = {}
    for index, one in enumerate(prompts):
        order.setdefault((tuple(one.ids), one.key), index)
    with torch.no_grad():
        for batch in batches:
            examples = {int(example) for example in batch.pair_examples}
            own = sequences([one for index, one in enumerate(prompts) if index in examples])
            rows = tower_rows(model)
            torch.testing.assert_close(model(packed=batch).logps, alone(plain, family, own), atol=1e-5, rtol=0)
            assert len(rows) == (batch.media is not None)


@pytest.mark.parametrize("family", _FEW)
def test_gradient_checkpointing_computes_the_same(family):
    model, _ = attached(family)
    (batch,) = packed(model, mixed_prompts(family))
    plain = copy.deepcopy(model)
    plain(packed=batch).logps.mean().backward()
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model(packed=batch).logps.mean().backward()
    assert_equal_gradients(model, plain)


def test_the_balancing_loss_counts_rows_of_images_like_rows_of_text():
    model, plain = attached("qwen3_vl_moe")
    prompts = mixed_prompts("qwen3_vl_moe")
    (shared,) = packed(model, prompts)
    (apart,) = packed(model, prompts, share="none")
    losses = [model(packed=batch, balance=True).aux_loss for batch in (shared, apart)]
    torch.testing.assert_close(losses[0], losses[1], atol=1e-5, rtol=0)
    counts = model(packed=shared, count_routing=True)
    torch.testing.assert_close(counts.chosen, model(packed=apart, count_routing=True).chosen)


def test_adapters_of_text_and_vision_have_the_gradients_of_sequences_alone():
    peft = pytest.importorskip("peft")
    base = vision_model("qwen3_vl")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "qkv", "linear_fc2"], init_lora_weights=False)
    torch.manual_seed(1)
    model = peft.get_peft_model(base, config)
    plain = copy.deepcopy(model)
    attach_logprob_head(model)
    prompts = mixed_prompts("qwen3_vl")
    (batch,) = packed(model, prompts)
    logps = model(packed=batch).logps
    truth = alone(plain, "qwen3_vl", sequences(prompts))
    torch.testing.assert_close(logps, truth, atol=1e-5, rtol=0)
    logps.mean().backward()
    truth.mean().backward()
    trained = 0
    for (name, ours), (_, own) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert (ours.grad is None) == (not ours.requires_grad), name
        if own.grad is not None:
            torch.testing.assert_close(ours.grad, own.grad, atol=1e-5, rtol=1e-4, msg=named(name))
            trained += 1
    assert trained > 8


def test_a_table_that_follows_the_length_keeps_the_images_of_rows_that_are_no_longer_shared():
    """Dynamic NTK gives sequences beyond the original context a table each: they share no rows then."""
    model = vision_model("llava")
    config = copy.deepcopy(model.config)
    config.text_config.max_position_embeddings = 16
    config.text_config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    torch.manual_seed(0)
    model = type(model)(config).eval()
    plain = copy.deepcopy(model)
    attach_logprob_head(model)
    prompts = with_branches([prompt("llava", [(0, 1)]), prompt("llava", [(0, 2), (0, 3)], after=(8,) * 9)], (2, 2))
    prompts[1].branches = [[20, 21, 22], [20, 23, 24, 25, 26]]
    (batch,) = packed(model, prompts)
    with torch.no_grad():
        # dynamic NTK keeps the table of the longest call so far
        truth = torch.cat([alone(copy.deepcopy(plain), "llava", [one]) for one in sequences(prompts)])
        torch.testing.assert_close(model(packed=batch).logps, truth, atol=1e-5, rtol=0)


def test_a_16_bit_model_takes_the_processors_float32_pixels():
    model = attach_logprob_head(vision_model("mistral3").to(torch.bfloat16))
    (batch,) = packed(model, mixed_prompts("mistral3"))
    assert images_refused(model) is None
    assert model(packed=batch).logps.isfinite().all()
