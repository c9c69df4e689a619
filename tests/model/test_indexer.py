"""Layers of indexed attention: packed up to index_topk positions, refused beyond; plain calls keep their selection."""

import copy

import pytest
import torch

from dpofast import attach_logprob_head, detach_logprob_head, pack
from dpofast.model.parts import backbone_of
from tests.support.families import family_model
from tests.support.padded_truth import assert_equal_to_the_truth
from tests.support.tiny import VOCAB

pytestmark = pytest.mark.slow(15)

TOPK = 32
INDEXED = ["deepseek-v3.2", "glm-moe-dsa"]


def pair(prompt, chosen, rejected):
    return {"prompt_ids": [5] * prompt, "chosen_ids": [6] * chosen, "rejected_ids": [7] * rejected}


def rows_scored(model, call):
    """How many rows each indexer of the model reads in a call."""
    scored = []
    indexers = [module for module in backbone_of(model).modules() if hasattr(module, "index_topk")]
    hooks = [
        module.wk.register_forward_hook(lambda module, args, output: scored.append(output.shape[1]))
        for module in indexers
    ]
    with torch.no_grad():
        call()
    for hook in hooks:
        hook.remove()
    assert len(scored) == len(indexers) > 0
    return set(scored)


@pytest.mark.parametrize("family", INDEXED)
def test_sequences_of_index_topk_positions_run_and_longer_ones_are_refused(family):
    model = attach_logprob_head(family_model(family))
    (batch,) = pack([pair(TOPK - 8, 9, 3), {**pair(TOPK - 8, 9, 3), "prompt_ids": [8] * (TOPK - 8)}])
    assert batch.position_ids.max() == TOPK - 1 and len(batch.position_ids) > TOPK  # of two prompts, in one row
    assert_equal_to_the_truth(model, batch)
    (batch,) = pack([pair(TOPK - 8, 10, 3)])
    with pytest.raises(
        ValueError, match=r"has 33 positions, of which .* select 32 \(index_topk\).*max_length=32.*padded"
    ):
        model(packed=batch)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", INDEXED)
def test_plain_calls_of_an_attached_model_select_keys_as_before(family, attention):
    plain = family_model(family)
    plain.set_attn_implementation(attention)
    model = attach_logprob_head(copy.deepcopy(plain))
    ids, attended = torch.randint(3, VOCAB, (2, TOPK + 12)), torch.ones(2, TOPK + 12, dtype=torch.int64)
    attended[1, -5:] = 0
    with torch.no_grad():
        ours, theirs = (each(input_ids=ids, attention_mask=attended).logits for each in (model, plain))
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1, :-5], theirs[1, :-5])
        plain.config.index_topk = 2 * TOPK
        for module in plain.modules():
            if hasattr(module, "index_topk"):
                module.index_topk = 2 * TOPK
        assert not torch.equal(plain(input_ids=ids, attention_mask=attended).logits[0], theirs[0])


@pytest.mark.parametrize("family", INDEXED)
def test_an_indexer_reads_one_row_of_a_packed_call_and_all_of_a_plain_one(family):
    model = attach_logprob_head(family_model(family))
    (batch,) = pack([pair(6, 5, 3)])
    ids = torch.randint(3, VOCAB, (2, 9))
    assert rows_scored(model, lambda: model(packed=batch)) == {1}
    assert rows_scored(model, lambda: model(input_ids=ids)) == {9}
    detach_logprob_head(model)
    assert not any(module._forward_pre_hooks for module in model.modules())
