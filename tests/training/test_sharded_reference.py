"""FSDP2 from the constructor on: the reference pass on shards equals one process's, on two gloo ranks."""

import pytest
import torch

from tests.support.ranks_cases import two_ranks
from tests.support.sharded_cases import CASES, FURTHER, MODES, sharded

pytestmark = pytest.mark.slow(300)
few = two_ranks("sharded", run=sharded, modes=MODES)
many = two_ranks("further", run=sharded, modes=MODES)


def check(results, case, folder):
    first, second = (rank[case] for rank in results)
    options = {name: value for name, value in {**CASES, **FURTHER}[case].items() if name != "torch_compile"}
    alone = sharded(folder, 1, **options)
    assert first["columns"] == second["columns"] and first["logs"] == second["logs"]
    exact = "bf16" not in options
    rounding = {"rel": 1e-5, "abs": 1e-5} if exact else {"rel": 2e-3, "abs": 5e-2}
    for ours, truth in zip(first["columns"], alone["columns"], strict=True):
        assert ours == pytest.approx(truth, **rounding)
    for name in ("begin", "further", "end"):
        assert first[name] == pytest.approx(alone[name], **({"rel": 1e-4, "abs": 1e-5} if exact else rounding))
    if not exact:
        assert first["logs"][0]["rewards/margins"] == 0 or "reference" in options
        return
    assert len(first["logs"]) == len(alone["logs"]) == 10
    for ours, truth in zip(first["logs"], alone["logs"], strict=True):
        assert ours == pytest.approx(truth, rel=1e-4, abs=1e-5)
    assert first["saved"].keys() == alone["saved"].keys()
    for name, truth in alone["saved"].items():
        torch.testing.assert_close(first["saved"][name], truth, atol=1e-5, rtol=1e-5, msg=name)
    assert first["fingerprint"] == second["fingerprint"] == alone["fingerprint"]
    assert first["identity"] == second["identity"] == alone["identity"]
    assert first["optimized"] == second["optimized"] == alone["optimized"]
    assert first["sharded"] and first["keys"] == alone["keys"]


@pytest.mark.parametrize("case", CASES)
def test_equals_one_process(few, case, tmp_path):
    check(few, case, tmp_path)


def test_weights_are_converted_as_shards(few):
    for rank in few:
        assert rank["from bfloat16 files"]["loaded"] == [{"torch.bfloat16"}]
        assert rank["plain"]["loaded"] == [{"torch.float32"}]


def test_the_pass_holds_a_share_a_layer_and_the_head(few):
    for rank in few:
        share, *_, head = rank["plain"]["units"]
        whole, layer = sum(rank["plain"]["units"]), max(rank["plain"]["units"])
        assert 0 < max(rank["plain"]["most"]) <= 1.02 * (whole / 2 + layer + head)


def test_one_process_finds_what_shards_computed(few, tmp_path, tmp_path_factory):
    computed = sharded(tmp_path / "first", 1)
    assert computed["windows"] == [8, 8, 5, 7, 5]
    assert sorted(few[0]["plain"]["windows"] + few[1]["plain"]["windows"]) == sorted(computed["windows"])
    assert len(few[1]["one row more than a window"]["windows"]) == 1  # of nine rows, the second one


@pytest.mark.ranks
@pytest.mark.parametrize("case", FURTHER)
def test_further_cases_equal_one_process(many, case, tmp_path):
    check(many, case, tmp_path)
