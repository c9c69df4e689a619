"""Sharded checkpoints on two gloo ranks under FSDP2: what is in them, and exact resumes."""

import pytest
import torch
from safetensors.torch import load_file

from dpofast.checkpointing.sharded import whole_weights
from tests.support.resume_cases import CASES, SHARDED, on_ranks

pytestmark = pytest.mark.slow(60)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with a run of ten steps of each case, and its results."""
    folder = tmp_path_factory.mktemp("sharded")
    return folder, on_ranks(folder, 2, CASES, SHARDED)


@pytest.fixture(scope="module")
def resumed(written, tmp_path_factory):
    folder, _ = written
    cases = {name: {**case, "source": f"{folder}/{name}/checkpoint-5"} for name, case in CASES.items()}
    return on_ranks(tmp_path_factory.mktemp("resumed"), 2, cases, SHARDED)


@pytest.mark.parametrize("case", CASES)
def test_resumed_to_the_last_bit(written, resumed, case):
    for before, after in zip(written[1], resumed, strict=True):
        assert after[case]["logs"] == before[case]["logs"]
        assert all(torch.equal(w, before[case]["weights"][name]) for name, w in after[case]["weights"].items())
        assert after[case]["warnings"] == []


@pytest.mark.parametrize("case", CASES)
def test_shards_hold_the_weights_of_save_model(written, case):
    folder = written[0] / case
    print("\n".join(written[1][0][case]["files"]))
    (saved,) = (folder / "end").glob("*.safetensors")
    expected, found = load_file(saved), whole_weights(folder / "checkpoint-10")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
