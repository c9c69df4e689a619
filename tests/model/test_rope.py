"""Rotary tables chosen by length: every sequence has the log-probs of a plain forward over it alone."""

import copy
import math
import pickle
import random

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from transformers import MixtralConfig, MixtralForCausalLM, PhimoeConfig
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.models.phimoe.modeling_phimoe import PhimoeRotaryEmbedding

from dpofast import DPOConfig, DPOTrainer, attach_logprob_head, detach_logprob_head, pack
from dpofast.integrations._trl.forward import fuse
from dpofast.integrations._trl.scores import FusedOptions
from dpofast.model.rope import longest_sequence, packed_positions, split_by_table, table_of_length
from tests.support.alone import alone
from tests.support.deep_examples import tries
from tests.support.histories import histories
from tests.support.tiny import SHAPE, VOCAB, tiny_model
from tests.support.tries import unpadded

BORDER = 32
LONGROPE = {
    "max_position_embeddings": 512,
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
        "original_max_position_embeddings": BORDER, "factor": 16.0,
    },
}  # fmt: skip
DYNAMIC = {
    "max_position_embeddings": BORDER,
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
}
KINDS = {"longrope": LONGROPE, "dynamic": DYNAMIC}


def rope_model(kind, **options):
    """A model whose log-probs move by tenths of a nat with the table."""
    model = tiny_model(**KINDS[kind], **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model


def pair(prompt, chosen, rejected, seed=0):
    draw = random.Random(f"{seed} {prompt} {chosen} {rejected}")

    def ids(length):
        return [draw.randrange(3, VOCAB) for _ in range(length)]

    return {"prompt_ids": ids(prompt), "chosen_ids": [5, *ids(chosen - 1)], "rejected_ids": [6, *ids(rejected - 1)]}


# Both sides of the border, its very edge, one pair with a response on either side, one-token responses
PAIRS = [
    pair(6, 5, 4),
    pair(20, BORDER - 20, BORDER - 19),
    pair(20, 40, 3),
    pair(BORDER - 1, 1, 2),
    pair(40, 50, 30),
    pair(BORDER, 1, 9),
]


# Prompts that begin alike, responses that fork late, one on either side of the border; a prompt that goes on a pair
_LATE, _ON = pair(8, 12, 20), PAIRS[2]
PAIRS += [
    {
        "prompt_ids": PAIRS[1]["prompt_ids"][:12] + _LATE["prompt_ids"],
        "chosen_ids": _LATE["chosen_ids"][:8] + [7, 8, 9],
        "rejected_ids": _LATE["chosen_ids"] + _LATE["rejected_ids"],
    },
    {**pair(1, 3, 12), "prompt_ids": _ON["prompt_ids"] + _ON["chosen_ids"][:6]},
]


def batch_of(pairs):
    (batch,) = pack(pairs, max_tokens=4096)
    return batch


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_long_sequence_leaves_the_log_probs_of_the_others_alone(kind, padded):
    model = rope_model(kind)
    batch = batch_of(PAIRS)
    truth = alone(model, batch)
    beside = copy.deepcopy(model)  # what one call over all of them gives
    rows, attended, in_response = batch.padded()
    logits = beside(input_ids=rows, attention_mask=attended).logits[:, :-1].log_softmax(-1)
    mixed = logits.gather(-1, rows[:, 1:, None])[..., 0][in_response[:, 1:].bool()]
    assert (mixed - truth).abs().max() > 0.01
    attach_logprob_head(model, padded=padded)
    for _ in range(2):  # dynamic NTK keeps a table between calls
        torch.testing.assert_close(model(packed=batch).logps.double(), truth, atol=2e-5, rtol=0)
        short = batch_of(PAIRS[:2])
        torch.testing.assert_close(model(packed=short).logps.double(), truth[: short.num_targets], atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_each_sequence_alone(kind):
    model = rope_model(kind)
    batch = batch_of(PAIRS)
    rows, attended, in_response = batch.padded()
    expected = []
    for row, length, response in zip(rows, attended.sum(1).tolist(), in_response.sum(1).tolist(), strict=True):
        plain = copy.deepcopy(model)
        logps = plain(input_ids=row[None, :length]).logits[0, :-1].log_softmax(-1)
        logps.gather(1, row[1:length, None])[-response:].sum().backward()
        expected.append([parameter.grad for parameter in plain.parameters()])
    attach_logprob_head(model).train()
    model.gradient_checkpointing_enable()
    model(packed=batch).logps.sum().backward()
    for parameter, *parts in zip(model.parameters(), *expected, strict=True):
        torch.testing.assert_close(parameter.grad, sum(parts), atol=1e-3, rtol=1e-3)


@pytest.fixture(scope="module", params=KINDS)
def short_context(request):
    """An attached model with the original context of 6 tokens, and the length up to which it has one table."""
    shape = copy.deepcopy(KINDS[request.param])
    if request.param == "longrope":
        shape["rope_parameters"]["original_max_position_embeddings"] = 6
    else:
        shape["max_position_embeddings"] = 6
    return attach_logprob_head(tiny_model(**shape, num_hidden_layers=1).eval()), 6 if request.param == "longrope" else 5


@given(tries())
def test_every_row_has_the_table_of_all_sequences_through_it(short_context, examples):
    model, border = short_context
    (batch,) = pack(examples)
    split = split_by_table(model, batch)
    positions = packed_positions(model, split)
    lengths = [len(prompt) + len(response) for prompt, response in unpadded(batch)]
    assert longest_sequence(batch) == longest_sequence(split) == max(lengths)
    if max(lengths) <= border:
        assert split is batch and vars(positions) == {}
        return
    dynamic = "dynamic" in model.config.rope_parameters["rope_type"]
    tables = [border if length <= border else length if dynamic else max(lengths) for length in lengths]
    values, paths = positions.dpofast_table_lengths.values[0].tolist(), histories(split.segments)
    unseen = set(range(split.num_tokens))
    for table, end in zip(tables, split.cu_targets[1:].tolist(), strict=True):
        path = paths[split.logit_rows[end - 1]]
        assert {values[row] for row in path} == {table}
        unseen -= set(path)
    assert not unseen and positions.dpofast_table_lengths.distinct == sorted(set(tables))


def test_within_the_original_context_nothing_is_done():
    model = attach_logprob_head(rope_model("longrope"))
    seen = []
    hook = model.model.rotary_emb.register_forward_hook(lambda module, args, options, output: seen.append(options),
                                                        with_kwargs=True)  # fmt: skip
    batch = batch_of(PAIRS[:1])
    model(packed=batch)
    hook.remove()
    assert [vars(options["position_ids"]) for options in seen] == [{}]


def test_copies_and_pickles_follow_lengths_and_detached_models_do_not():
    model = attach_logprob_head(rope_model("longrope"))
    batch = batch_of(PAIRS)
    expected = model(packed=batch).logps
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(packed=batch).logps, expected)
    assert not detach_logprob_head(model).model.rotary_emb._forward_hooks


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_of_a_run_does_not_depend_on_max_tokens(kind, tmp_path):
    rows = [{name: list(ids) for name, ids in example.items()} for example in PAIRS]
    truth = []
    for row in rows:
        batch = batch_of([row])
        truth.append(float(alone(rope_model(kind), batch)[: int(batch.cu_targets[1])].sum()))
    for max_tokens in (64, 2048):
        args = DPOConfig(output_dir=str(tmp_path / str(max_tokens)), report_to="none", disable_tqdm=True, use_cpu=True,
                         per_device_train_batch_size=3, num_train_epochs=1, logging_steps=1, save_strategy="no",
                         learning_rate=0.0, max_tokens=max_tokens)  # fmt: skip
        trainer = DPOTrainer(model=rope_model(kind), args=args, train_dataset=Dataset.from_list(rows))
        reference = trainer.train_dataset.with_format(None)["ref_chosen_logps"]
        assert list(reference) == pytest.approx(truth, abs=1e-4)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert losses == pytest.approx([math.log(2)] * len(losses), abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_trls_rows_have_the_log_probs_of_each_row_alone(kind):
    model = rope_model(kind)
    batch = batch_of(PAIRS)
    rows, attended, in_response = batch.padded()
    truth = alone(model, batch)
    assert fuse(model, FusedOptions("forward", "raise")) is None
    labels = torch.where(in_response.bool(), rows, -100)
    output = model(fused_lm_head=True, input_ids=rows, attention_mask=attended, labels=labels)
    ours = output.log_probs[in_response[:, 1:].bool()]
    torch.testing.assert_close(ours.double(), truth, atol=2e-5, rtol=0)


def test_a_backbone_that_hides_the_positions_from_its_rotary_module_is_refused_by_name():
    model = rope_model("longrope")
    rotary = type(model.model.rotary_emb)

    class Renumbered(type(model.model)):
        def forward(self, *args, position_ids=None, **kwargs):
            copied = None if position_ids is None else position_ids.clone()
            return super().forward(*args, position_ids=copied, **kwargs)

    model.model.__class__ = Renumbered
    assert type(model.model.rotary_emb) is rotary
    attach_logprob_head(model)
    with pytest.raises(
        ValueError, match="a sequence of 90 tokens is longer than the 32.*cut the data to max_length=32"
    ):
        model(packed=batch_of(PAIRS))


def test_a_table_whose_scale_depends_on_the_length_too():
    """PhiMoE multiplies cos and sin by short_mscale or long_mscale."""
    config = PhimoeConfig(hidden_size=32, num_attention_heads=4, max_position_embeddings=512, rope_parameters={
        **LONGROPE["rope_parameters"], "short_mscale": 1.5, "long_mscale": 2.5,
    })  # fmt: skip
    rotary, x = PhimoeRotaryEmbedding(config), torch.zeros(1, 1, 32)
    positions = torch.arange(10)[None]
    for length in (10, BORDER, BORDER + 1, 200):
        expected = PhimoeRotaryEmbedding(config)(x, torch.arange(length)[None])
        for ours, theirs in zip(table_of_length(rotary, x, positions, length, {}), expected, strict=True):
            torch.testing.assert_close(ours[..., :10, :], theirs[..., :10, :])


@torch.no_grad()
def balance_alone(model, batch, drop):
    """transformers' balancing loss over the routers of each sequence alone, without its last `drop` tokens."""
    rows, attended, _ = batch.padded()
    routed = []
    for row, length in zip(rows, attended.sum(1).tolist(), strict=True):
        logits = model(input_ids=row[None, :length], output_router_logits=True).router_logits
        routed.append([layer[: length - drop] for layer in logits])
    return load_balancing_loss_func(tuple(map(torch.cat, zip(*routed, strict=True))), 4, 2)


def test_experts_are_balanced_over_the_rows_as_each_sequence_routes_them():
    torch.manual_seed(0)
    model = MixtralForCausalLM(
        MixtralConfig(**SHAPE, **LONGROPE, head_dim=8, num_local_experts=4, num_experts_per_tok=2)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    batch = batch_of(PAIRS)
    rows, attended, in_response = batch.padded()
    ours, every = balance_alone(model, batch, 1), balance_alone(model, batch, 0)
    truth = alone(model, batch)
    attach_logprob_head(model)
    torch.testing.assert_close(model(packed=batch, balance=True).aux_loss, ours, atol=1e-5, rtol=0)
    fuse(model, FusedOptions("forward", "raise"))
    labels = torch.where(in_response.bool(), rows, -100)
    output = model(fused_lm_head=True, input_ids=rows, attention_mask=attended, labels=labels,
                   output_router_logits=True)  # fmt: skip
    torch.testing.assert_close(output.log_probs[in_response[:, 1:].bool()].double(), truth, atol=2e-5, rtol=0)
    torch.testing.assert_close(output.aux_loss, every, atol=1e-5, rtol=0)
