"""The sweep over model families tells right from wrong and refused from failed; a handful of families, run as all."""

import pytest
import torch

from bench import families
from dpofast import pack


@pytest.mark.parametrize(
    ("name", "packed", "padded"),
    [
        ("llama", "right", "right"),
        ("opt", "right", "right"),
        ("dbrx", "right", "right"),
        ("bloom", "refused", "right"),
        ("bart", "right", "right"),
        ("doge", "refused", "right"),
        ("bert", "refused", "refused"),
        ("musicgen", "refused", "refused"),
        ("phimoe", "refused", "refused"),
    ],
)
def test_verdicts(name, packed, padded):
    found = families.sweep(name)
    assert {way: result["verdict"] for way, result in found.items()} == {"packed": packed, "padded": padded}, found
    advised = "padded=True" in found["packed"].get("message", "")
    assert advised == (packed == "refused" and padded == "right")


def test_other_numbers_and_foreign_errors_are_faults(monkeypatch):
    model = families.family("llama")
    (batch,) = pack(families.examples(90))
    truth = families.alone(model, batch)
    truth[3] += 2 * families.TOLERANCE
    assert families.verdict(model, False, truth, batch)["verdict"] == "WRONG"
    model.model.forward = lambda **inputs: torch.zeros(1).view(2)
    assert families.verdict(model, True, truth, batch)["verdict"] == "error"
