"""Images on some processes of a step and none on others: the same run on one process and on two gloo ranks."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dpofast.training.checks.launch import find_unused_vision_weights
from dpofast.training.parallel.fsdp import shard_layers_that_are_there
from dpofast.training.sampler import PairLengths, rank_shares
from tests.support.images_ranks_cases import (
    BF16_CASES,
    CASES,
    FSDP_CASES,
    RESUMED_CASES,
    pairs_of,
    train,
    two_image_ranks,
)
from tests.support.vision_models import vision_model
from tests.support.vision_training import image_trainer

pytestmark = pytest.mark.slow(300)


replicated, sharded, resumed, rounded = map(two_image_ranks, ("ddp", "fsdp", "resumed", "bf16"))


def check_equal(ranks, case, folder):
    first, second = (results[case] for results in ranks)
    assert first["logs"][1:] == second["logs"][1:] and first["eval"] == second["eval"]
    expected = train(folder, 1, **{**{**CASES, **FSDP_CASES, **RESUMED_CASES}[case], "resumed": False})
    assert len(first["logs"]) == len(expected["logs"]) >= 5
    for begin in (first["logs"][0], expected["logs"][0]):
        del begin["rewards/accuracies"]  # margins are rounding
    for log, other in zip([*first["logs"], first["eval"]], [*expected["logs"], expected["eval"]], strict=True):
        assert log == pytest.approx(other, rel=1e-4, abs=1e-5)
    assert first["weights"].keys() == expected["weights"].keys()
    for name, value in expected["weights"].items():
        torch.testing.assert_close(first["weights"][name], value, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one_process(replicated, case, tmp_path):
    assert {results[case]["wrapped"] for results in replicated} == {"DistributedDataParallel"}
    check_equal(replicated, case, tmp_path)


@pytest.mark.parametrize("case", FSDP_CASES)
def test_fsdp2_equals_one_process(sharded, case, tmp_path):
    assert all(results[case]["wrapped"].startswith("FSDP") for results in sharded)
    check_equal(sharded, case, tmp_path)


@pytest.mark.parametrize("case", RESUMED_CASES)
def test_fsdp2_resumes_weights_that_had_no_gradient(resumed, case, tmp_path):
    for run in (results[case] for results in resumed):
        expected = run["uninterrupted"]
        assert run["wrapped"].startswith("FSDP") and len(run["logs"]) == 5
        assert run["logs"] == expected["logs"] and run["eval"] == expected["eval"]
        assert run["weights"].keys() == expected["weights"].keys()
        assert all(torch.equal(value, expected["weights"][name]) for name, value in run["weights"].items())
    check_equal(resumed, case, tmp_path)


@pytest.mark.parametrize("case", BF16_CASES)
def test_fsdp2_in_bfloat16(rounded, case, tmp_path):
    first, second = (results[case] for results in rounded)
    begin = first["logs"][0]
    assert first["logs"] == second["logs"] and len(first["logs"]) == 5
    assert begin["rewards/margins"] == 0 and begin["loss"] == pytest.approx(math.log(2), abs=1e-6)
    for name, value in train(tmp_path, 1, **BF16_CASES[case])["weights"].items():
        assert first["weights"][name].dtype == torch.float32
        torch.testing.assert_close(first["weights"][name], value, atol=1e-3, rtol=1e-3, msg=name)


def test_ddp_has_to_look_for_vision_weights_without_a_gradient():
    model = vision_model("qwen2_vl")
    for processes, chosen, frozen in ((2, False, True), (1, False, False), (2, True, False), (2, None, False)):
        model.model.visual.requires_grad_(not frozen)
        handler = SimpleNamespace(find_unused_parameters=chosen)
        accelerator = SimpleNamespace(num_processes=processes, ddp_handler=handler)
        find_unused_vision_weights(model, SimpleNamespace(ddp_find_unused_parameters=chosen), accelerator)
        assert handler.find_unused_parameters is (chosen if frozen else True)
    with pytest.raises(ValueError, match="ddp_find_unused_parameters: expected True or nothing, as vision weights"):
        find_unused_vision_weights(model, SimpleNamespace(ddp_find_unused_parameters=False), accelerator)


def test_fsdp_shards_the_layers_of_a_tower_that_are_there():
    model = vision_model("llava")
    for chosen, expected in ((None, ["CLIPEncoderLayer", "CLIPVisionEmbeddings", "LlamaDecoderLayer"]), (["A"], ["A"])):
        plugin = SimpleNamespace(transformer_cls_names_to_wrap=chosen)
        shard_layers_that_are_there(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)), model)
        assert plugin.transformer_cls_names_to_wrap == expected


def test_pairs_of_one_prompt_with_images_stay_on_one_rank(tmp_path):
    trainer = image_trainer(tmp_path, "qwen2_vl", train=pairs_of("qwen2_vl", (0, 1, 0, None, 1, 0, 2, None)))
    lengths = PairLengths.of(trainer.train_dataset)
    shares = rank_shares(lengths, np.arange(8), 2)
    owner = {index: rank for rank, share in enumerate(shares) for index in share.tolist()}
    assert owner[0] == owner[2] == owner[5] and owner[1] == owner[4] and owner[3] == owner[7]
    assert sorted(owner) == list(range(8)) and set(owner.values()) == {0, 1}
