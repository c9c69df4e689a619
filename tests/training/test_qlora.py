"""QLoRA with bitsandbytes' own 4-bit weights: two gloo ranks under FSDP2 equal one process."""

import pytest
import torch

from dpofast.scoring.fingerprints import model_fingerprint
from tests.support.qlora_cases import CASES, MODES, REFUSED, quantized_model, refused_qlora, train_qlora
from tests.support.ranks_cases import two_ranks

pytestmark = [pytest.mark.slow(120), pytest.mark.bitsandbytes]
results = two_ranks("qlora", run=train_qlora, modes=MODES)
refused = two_ranks("refused", run=refused_qlora, modes=MODES)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one_process(results, case, tmp_path):
    first, second = (rank[case] for rank in results)
    alone = train_qlora(tmp_path, 1, **CASES[case])
    exact = "bf16" not in CASES[case]
    assert first["logs"] == second["logs"] and len(first["logs"]) == len(alone["logs"]) == 6
    for ours, truth in zip(first["logs"], alone["logs"], strict=True):
        if exact:
            assert ours == pytest.approx(truth, rel=1e-4, abs=1e-5)
        assert ours["loss"] == pytest.approx(truth["loss"], abs=1e-5 if exact else 5e-3)
    assert len(first["weights"]) == len(alone["weights"]) == 28  # A and B of seven layers of both
    for name, truth in alone["weights"].items():
        within = 1e-5 if exact else 2e-3
        torch.testing.assert_close(first["weights"][name].float(), truth, atol=within, rtol=within, msg=name)
    assert any(weight.any() for name, weight in alone["weights"].items() if "lora_B" in name)
    storage = CASES[case].get("storage", torch.float32)
    for rank in (first, second):
        assert rank["count"] == alone["count"] == (14, 14) and rank["dtypes"] == {storage}
        assert rank["numbers"] == alone["here"] == 2 * rank["here"]  # each rank holds its half


@pytest.mark.parametrize("case", CASES)
def test_quantized_weights_and_scales_have_one_identity(results, case):
    for rank in results:
        whole, base = rank[case]["fingerprints"]
        assert whole == base == results[0][case]["fingerprints"][0]


@pytest.mark.parametrize("case", REFUSED)
def test_weights_that_cannot_be_sharded_are_refused_by_name(refused, case):
    for rank in refused:
        assert "bnb_4bit_quant_storage: expected torch.bfloat16" in rank[case]


def test_quantized_numbers_are_what_the_fingerprint_tells_apart(tmp_path):
    model = quantized_model(tmp_path)
    before = model_fingerprint(model)
    assert model_fingerprint(quantized_model(tmp_path)) == before
    state = model.model.layers[1].mlp.down_proj.weight.quant_state
    state.absmax[0] += 1
    other = model_fingerprint(model)
    state.offset += 0.1
    assert len({before, other, model_fingerprint(model)}) == 3
