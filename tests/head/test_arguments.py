"""What dpofast.linear_logprobs and dpofast.logprobs refuse, each with a message that names the argument."""

import pytest
import torch

import dpofast


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.zeros(3, 9)}, ValueError, "expected equal D"),
        ({"hidden": torch.zeros(3, 8, dtype=torch.int64)}, ValueError, "hidden: expected a floating-point"),
        ({"hidden": torch.zeros(3, 8).to(torch.float8_e5m2)}, ValueError, "hidden: .* of 16, 32 or 64 bits, .*float8"),
        ({"hidden": torch.zeros(8)}, ValueError, r"expected equal D, got \(8,\)"),
        ({"hidden": torch.zeros(1, 3, 8)}, ValueError, r"expected equal D, got \(1, 3, 8\)"),
        ({"weight": torch.zeros(8)}, ValueError, r"expected equal D, got \(3, 8\) and \(8,\)"),
        ({"weight": torch.zeros(0, 8)}, ValueError, r"weight \(V, D\): expected a vocabulary .* got \(0, 8\)"),
        ({"weight": torch.zeros(10, 8, device="meta")}, ValueError, "weight: expected hidden's .* on cpu, .* on meta"),
        ({"targets": torch.zeros(3, 1, dtype=torch.int64)}, ValueError, r"targets: expected shape \(3,\)"),
        (
            {"targets": torch.zeros(3, dtype=torch.int64, device="meta")},
            ValueError,
            "targets: expected on cpu, got meta",
        ),
        ({"bias": torch.zeros(10, 1)}, ValueError, r"bias: expected shape \(10,\), got \(10, 1\)"),
        ({"bias": torch.zeros(10).half()}, ValueError, "bias: expected hidden's dtype .* got torch.float16"),
        ({"bias": torch.zeros(10, device="meta")}, ValueError, "bias: expected hidden's dtype and device, .* on meta"),
        ({"targets": torch.zeros(4, dtype=torch.int64)}, ValueError, r"targets: expected shape \(3,\)"),
        ({"targets": torch.zeros(3, dtype=torch.int32)}, ValueError, "targets: expected int64"),
        ({"targets": torch.tensor([0, 10, 1])}, ValueError, r"ids in \[0, 10\).*got 10 at position 1"),
        ({"targets": torch.tensor([0, -1, 1])}, ValueError, "got -1 at position 1"),
        ({"weight": torch.zeros(10, 8, dtype=torch.float64)}, ValueError, "weight: expected hidden's dtype"),
        ({"bias": torch.zeros(9)}, ValueError, r"bias: expected shape \(10,\)"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a positive"),
        ({"softcap": -1.0}, ValueError, "softcap: expected None or a positive"),
        ({"logit_scale": float("inf")}, ValueError, "logit_scale: expected a finite"),
        ({"ignore_index": 0}, ValueError, "ignore_index: expected a negative"),
        ({"stats": ("entropi",)}, ValueError, "stats: expected names among"),
        ({"backend": "cuda"}, ValueError, "backend: expected one of"),
        ({"max_logits_bytes": 39}, ValueError, "max_logits_bytes: expected at least one row of 10.* 40 bytes, got 39"),
        ({"weight": torch.zeros(10, 8).to_sparse()}, TypeError, "weight: expected a plain dense tensor"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {"hidden": torch.zeros(3, 8), "weight": torch.zeros(10, 8), "targets": torch.tensor([0, 1, -100])}
    with pytest.raises(error, match=message):
        dpofast.linear_logprobs(**{**arguments, **change})


def test_triton_on_the_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        dpofast.linear_logprobs(torch.zeros(1, 2), torch.zeros(3, 2), torch.tensor([0]), backend="triton")


def test_logits_and_targets_must_fit():
    with pytest.raises(ValueError, match=r"targets: expected shape \(2, 3\)"):
        dpofast.logprobs(torch.zeros(2, 3, 5), torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="logits: expected a floating-point"):
        dpofast.logprobs(torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(
        ValueError, match=r"logits \(..., V\): expected a vocabulary of at least one word, got \(2, 0\)"
    ):
        dpofast.logprobs(torch.zeros(2, 0), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="targets: expected int64, got torch.int32"):
        dpofast.logprobs(torch.zeros(2, 5), torch.zeros(2, dtype=torch.int32))
    with pytest.raises(ValueError, match="targets: expected on cpu, got meta"):
        dpofast.logprobs(torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64, device="meta"))
    with pytest.raises(ValueError, match=r"targets: expected ids in \[0, 5\) .* got 5 at position 1"):
        dpofast.logprobs(torch.zeros(2, 5), torch.tensor([0, 5]))
