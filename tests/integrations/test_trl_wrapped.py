"""patch_trl() on a model that another training or accelerate has wrapped: trl's own numbers, at both levels."""

import functools

import pytest

from tests.support.tiny import tiny_model
from tests.support.trl_cases import assert_same_run, train
from tests.support.wrappers import WRAPPERS


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return train(tmp_path_factory.mktemp("plain"), patched=False, max_steps=2)


@pytest.mark.parametrize("level", ["forward", "kernel"])
@pytest.mark.parametrize("wrappers", ["sft", "sft-liger", "hooks"])
def test_a_wrapped_model_trains_as_trl_trains_a_fresh_one(wrappers, level, plain, tmp_path):
    model = functools.reduce(lambda model, wrap: wrap(model), WRAPPERS[wrappers], tiny_model())
    fast = train(tmp_path, patched=True, level=level, model=model, ref_model=tiny_model(), max_steps=2)
    assert_same_run(plain, fast)
