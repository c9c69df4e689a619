"""Families of models against their own padded forward, packed or over padded rows; positions, routing, tables."""

import copy

import pytest
import torch
from transformers import BltConfig, BltForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from dpofast import attach_logprob_head, detach_logprob_head, pack
from dpofast.model.checks.support import CannotPack, check_packed
from dpofast.model.forward import similar_lengths
from tests.support.deep_examples import DEEP, depth
from tests.support.families import PACKED, REFUSED, family_model
from tests.support.padded_truth import assert_equal_to_the_truth, groups
from tests.support.tiny import SHAPE, VOCAB, tiny_pairs

pytestmark = pytest.mark.slow(60)


@pytest.mark.parametrize("family", PACKED)
def test_packed_log_probs_loss_and_gradients_equal_the_padded_reference(family):
    model = attach_logprob_head(family_model(family))
    for batch in pack([*DEEP, *groups()[:3]], max_tokens=90):
        assert_equal_to_the_truth(model, batch)
    # A group of one branch: every branch with a prompt of its own
    (apart,) = pack(DEEP[2:4], share="none")
    assert_equal_to_the_truth(model, apart)


def test_the_examples_of_every_family_make_deep_rows_and_flat_ones():
    assert [depth(batch.segments) for batch in pack([*DEEP, *groups()[:3]], max_tokens=90)] == [5, 2]


@pytest.mark.parametrize("family", REFUSED)
def test_a_model_that_cannot_run_packed_is_refused_and_runs_over_padded_rows(family):
    classes, _, reason = REFUSED[family]
    model = family_model(family)
    original, attention = type(model), model.config._attn_implementation
    with pytest.raises(ValueError, match=f"^{classes}ForCausalLM cannot run packed: {reason}.*padded=True"):
        attach_logprob_head(model)
    assert type(model) is original and model.config._attn_implementation == attention
    attach_logprob_head(model, padded=True)
    for batch in pack([*DEEP, *groups()[:3]], max_tokens=90):
        assert_equal_to_the_truth(model, batch)
    assert type(detach_logprob_head(model)) is original


def test_a_model_that_cuts_its_row_into_patches_is_refused():
    part = {**SHAPE, "num_hidden_layers": 1}
    parts = {f"{name}_config": dict(part) for name in ("encoder", "decoder", "global", "patcher")}
    model = BltForCausalLM(
        BltConfig(vocab_size=VOCAB, encoder_hash_byte_group_vocab=50, hidden_size_global=32, **parts)
    )
    with pytest.raises(
        CannotPack, match="^BltForCausalLM cannot run packed: it cuts the whole of its row into patches"
    ):
        check_packed(model)


@pytest.mark.parametrize("kind", ["indexed_attention", "chunked_attention"])
def test_layers_whose_number_of_keys_the_config_does_not_say_are_refused(kind):
    model = family_model("llama")
    model.config.layer_types = [kind, "full_attention"]
    only = "only layers of full_attention, sliding_attention can"
    with pytest.raises(CannotPack, match=f"^LlamaForCausalLM cannot run packed: it has {kind} layers, and {only}"):
        check_packed(model)


def positions_computed(model, batch):
    """How many token embeddings the backbone looks up, in how many rows."""
    shapes = []
    hook = model.get_input_embeddings().register_forward_hook(lambda module, args, output: shapes.append(args[0].shape))
    with torch.no_grad():
        model(packed=batch)
    hook.remove()
    return sum(rows * columns for rows, columns in shapes), sum(rows for rows, _ in shapes)


def test_the_backbone_computes_each_prompt_once_and_no_last_token():
    model = attach_logprob_head(family_model("llama"))
    examples = groups()
    (batch,) = pack(examples)
    expected = sum(len(g["prompt_ids"]) + sum(len(b) - 1 for b in g["branches"]) for g in examples)
    assert positions_computed(model, batch) == (expected, 1)


def test_six_pairs_from_four_completions_compute_four_branches():
    model = attach_logprob_head(family_model("llama"))
    prompt, responses = [5, 6, 7], [[8, 9], [10], [8, 11, 12], [13, 14]]
    pairs = [
        {"prompt_ids": prompt, "chosen_ids": responses[a], "rejected_ids": responses[b]}
        for a in range(4)
        for b in range(a + 1, 4)
    ]
    (batch,) = pack(pairs)
    assert (batch.num_pairs, batch.num_sequences) == (6, 4)
    assert positions_computed(model, batch) == (3 + 1 + 0 + 1 + 1, 1)  # 8 is one row of two branches
    padded = attach_logprob_head(family_model("bloom"), padded=True)
    assert positions_computed(padded, batch)[1] == 4


def test_padded_rows_of_similar_length_run_together():
    model = attach_logprob_head(family_model("bloom"), padded=True)
    (batch,) = pack([*groups(), *tiny_pairs(30, longest=40)], share="none")
    computed, rows = positions_computed(model, batch)
    assert rows == batch.num_sequences
    assert batch.num_tokens <= computed <= 1.25 * batch.num_tokens < batch.padded()[0].numel()
    assert torch.equal(copy.deepcopy(model)(packed=batch).logps, model(packed=batch).logps)


def test_rows_are_grouped_by_length_in_one_process_only(monkeypatch):
    lengths = torch.tensor([10, 3, 9, 8, 7, 10])
    assert similar_lengths(lengths) == [[0, 5, 2, 3], [4], [1]]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert similar_lengths(lengths) == [[0, 5, 2, 3, 4, 1]]


def experts_chosen(model, call):
    """What every router of the model chooses for every token, in order: one (tokens, experts per token) each."""
    chosen = []
    routers = [module for module in model.modules() if isinstance(module, MixtralTopKRouter)]
    hooks = [router.register_forward_hook(lambda module, args, output: chosen.append(output[-1])) for router in routers]
    with torch.no_grad():
        call()
    for hook in hooks:
        hook.remove()
    assert len(chosen) == len(routers) > 0
    return chosen


def test_experts_are_chosen_token_by_token_as_in_padded_rows():
    model = attach_logprob_head(family_model("mixtral"))
    (batch,) = pack(groups())
    ids, attended, in_response = batch.padded()
    packed = experts_chosen(model, lambda: model(packed=batch))
    padded = experts_chosen(model, lambda: model(input_ids=ids, attention_mask=attended))
    predicts = in_response[:, 1:].bool()
    for ours, theirs in zip(packed, padded, strict=True):
        theirs = theirs.view(*ids.shape, -1)[:, :-1][predicts]
        assert torch.equal(ours[batch.logit_rows].sort().values, theirs.sort().values)


@pytest.mark.parametrize(
    ("family", "padded"), [("gpt2", False), ("gpt2", True), ("opt", False), ("gpt-j", True), ("mpt", True)]
)
def test_a_sequence_longer_than_the_table_of_positions_is_refused(family, padded):
    model = attach_logprob_head(family_model(family), padded=padded)
    example = {"prompt_ids": [5] * 40, "chosen_ids": [6] * 25, "rejected_ids": [7] * 3}
    (fits,) = pack([example, {**example, "prompt_ids": [8] * 40}])  # positions restart: two groups of 64
    assert model(packed=fits).logps.isfinite().all()
    (batch,) = pack([{**example, "chosen_ids": [6] * 26}])
    with pytest.raises(ValueError, match=r"has 65 positions, and the model's table holds 64.*max_length=64"):
        model(packed=batch)


def test_rotary_positions_have_no_table():
    model = family_model("llama")
    model.config.max_position_embeddings = 16
    (batch,) = pack([{"prompt_ids": [5] * 20, "chosen_ids": [6] * 9, "rejected_ids": [7]}])
    assert attach_logprob_head(model)(packed=batch).logps.isfinite().all()


def test_the_head_is_attached_one_way():
    model = attach_logprob_head(family_model("llama"))
    assert attach_logprob_head(model) is model
    with pytest.raises(ValueError, match="padded: expected False.*attached already, got True: detach it first"):
        attach_logprob_head(model, padded=True)


def test_a_model_whose_own_logits_are_twisted_is_refused_over_padded_rows_too():
    plain = type(family_model("bloom"))

    class Twisted(plain):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 3
            return output

    model = family_model("bloom")
    model.__class__ = Twisted
    with pytest.raises(ValueError, match="Twisted: log-probs from its backbone and its head differ by"):
        attach_logprob_head(model, padded=True)
    assert type(model) is Twisted


def test_a_model_without_a_backbone_of_its_own_is_refused():
    class Bare(type(family_model("bloom"))):
        base_model_prefix = "elsewhere"

        def get_output_embeddings(self):
            return self.lm_head

    model = family_model("bloom")
    model.__class__ = Bare
    with pytest.raises(ValueError, match="Bare: expected a model whose backbone is its base_model"):
        attach_logprob_head(model, padded=True)
    assert type(model) is Bare
