"""A batch whose rows are split over ranks: log-probs, losses and summed gradients are those of one process."""

import functools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dpofast import attach_logprob_head, pack
from dpofast.model.attention.interface import _counted as counted_attention
from dpofast.model.attention.layout import AttentionOptions, PackedLayout
from dpofast.model.neftune import noisy_embeddings
from tests.support import activation_cases
from tests.support.activation_cases import measured
from tests.support.families import family_model
from tests.support.rank_processes import free_port, run_ranks
from tests.support.sequence_parallel_cases import AUTOCAST, CASES, FEW, rank_main, run
from tests.support.tiny import tiny_model, tiny_pairs


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory):
    """(world, names) -> what every rank has computed, by case; one start of ranks for all cases."""

    @functools.cache
    def values(world, names):
        folder = tmp_path_factory.mktemp(f"ranks{world}")
        run_ranks(rank_main, (free_port(), str(folder), world, names), world)
        return [torch.load(folder / f"{rank}.pt") for rank in range(world)]

    return values


def check(name, ranks):
    """Values of every rank equal those of one process, and the sum of gradients does."""
    one = run(**CASES[name])
    assert all(set(rank[name]) == set(one) for rank in ranks)
    for key, value in one.items():
        theirs = [rank[name][key] for rank in ranks]
        if key.startswith("grad "):
            theirs = [torch.stack(theirs).sum(0)]
        for their in theirs:
            torch.testing.assert_close(their, value, atol=1e-5, rtol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.slow(30)
@pytest.mark.parametrize("name", FEW)
def test_two_ranks_compute_what_one_process_does(name, on_ranks):
    check(name, on_ranks(2, FEW))


@pytest.mark.slow(30)
def test_autocast_rounds_as_on_one_process(on_ranks):
    exact, own = run()["logps"], run(**AUTOCAST)["logps"]
    for rank in on_ranks(2, FEW):
        error, allowed = ((values - exact).abs().max() for values in (rank["autocast"]["logps"], own))
        assert error <= 2 * allowed + 1e-6


@pytest.mark.slow(30)
def test_a_layer_exchanges_twice_and_twice_in_the_backward(on_ranks):
    forward, backward, layers = on_ranks(2, FEW)[0]["exchanges"]
    assert forward == backward == 2 * layers


@pytest.mark.ranks
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_ranks_compute_what_one_process_does(name, world, on_ranks):
    check(name, on_ranks(world, tuple(CASES)))


@pytest.mark.slow(30)
@pytest.mark.parametrize(("prompt", "responses"), [(2016, 16), pytest.param(12288, 2048, marks=pytest.mark.ranks)])
def test_four_ranks_keep_a_quarter_of_the_bytes(prompt, responses, tmp_path):
    run_ranks(activation_cases.rank_main, (free_port(), str(tmp_path), 4, prompt, responses), 4)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(4)]
    for checkpointing in (False, True):
        one, theirs = measured(prompt, responses, checkpointing=checkpointing), [rank[checkpointing] for rank in ranks]
        assert one["rows"] == prompt + 2 * responses
        for rank in theirs:
            assert rank["kept"] <= 0.3 * one["kept"]
            assert rank["peak"] <= 0.3 * one["peak"]
            torch.testing.assert_close(rank["loss"], one["loss"])
        for name, gradient in one["gradients"].items():
            summed = sum(rank["gradients"][name] for rank in theirs)
            torch.testing.assert_close(summed, gradient, atol=1e-5, rtol=1e-5, msg=name)


def group_of(size):
    """What a refusal reads of a process group."""
    return SimpleNamespace(size=lambda: size, rank=lambda: 0)


def split_batch(size=2, **options):
    (batch,) = pack(tiny_pairs(2), **options)
    return batch.split_over(group_of(size))


@pytest.mark.parametrize(("size", "heads", "keys"), [(3, 4, 2), (8, 4, 2), (6, 12, 4)])
def test_heads_that_the_group_cannot_divide_are_refused(size, heads, keys):
    model = attach_logprob_head(
        tiny_model(num_attention_heads=heads, num_key_value_heads=keys, hidden_size=heads * 8, num_hidden_layers=1)
    )
    with pytest.raises(ValueError, match=rf"split_over: {heads} query and {keys} key/value heads .* the {size} proc"):
        model(packed=split_batch(size))


def hybrid():
    return attach_logprob_head(family_model("lfm2"))


def with_dropout():
    return attach_logprob_head(family_model("gpt2", resid_pdrop=0.1)).train()


def of_length():
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    return attach_logprob_head(tiny_model(num_hidden_layers=1, max_position_embeddings=6, rope_parameters=rope))


@pytest.mark.parametrize(
    ("make", "options", "match"),
    [
        (hybrid, {}, "Lfm2ForCausalLM: recurrent layers need all rows one after the other"),
        (lambda: attach_logprob_head(tiny_model(), padded=True), {}, "split_over: expected packed rows"),
        (lambda: attach_logprob_head(tiny_model("mixtral")), {"balance": True}, "balance: .* the tokens of whole rows"),
        (lambda: attach_logprob_head(tiny_model("mixtral")), {"count_routing": True}, "balance: .* whole rows"),
        (
            with_dropout,
            {},
            "GPT2LMHeadModel: .* without dropout where .* got 7 rates, transformer.drop.p=0.1",
        ),
        (of_length, {}, "LlamaForCausalLM: a sequence of .* so long that the rotary table depends on its length"),
    ],
    ids=["hybrid", "padded", "balance", "count_routing", "dropout", "rope"],
)
def test_what_a_split_batch_cannot_have_is_refused(make, options, match):
    with pytest.raises(ValueError, match=match):
        make()(packed=split_batch(), **options)


def test_images_and_noise_beside_a_split_are_refused():
    model = attach_logprob_head(tiny_model(num_hidden_layers=1)).train()
    with pytest.raises(ValueError, match="split_over: expected text alone, .* got a batch with images"):
        model(packed=replace(split_batch(), media=SimpleNamespace()))
    with noisy_embeddings(model, 5.0), pytest.raises(ValueError, match="NEFTune's noise is drawn for whole rows"):
        model(packed=split_batch(share="none"))


def test_attention_with_dropout_is_refused():
    row = torch.zeros(1, 2, 3, 8)
    layout = PackedLayout(split_batch().segments, split_batch().split)
    with pytest.raises(ValueError, match="split_over: expected attention without dropout"):
        counted_attention(row, row, row, layout, AttentionOptions(dropout=0.1))


def test_a_split_batch_is_not_on_a_device():
    (batch,) = pack(tiny_pairs(2))
    with pytest.raises(ValueError, match="split_over: expected a batch on the CPU, got one on meta: split first"):
        batch.to("meta").split_over(group_of(2))
