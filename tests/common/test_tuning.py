"""dpofast.common.tuning.table: what `dpofast tune` measured, on disk, and the choice of backend="auto" from it."""

import json

import pytest
import torch

from dpofast.common.tuning import table
from dpofast.common.tuning.table import HeadCall, Measured, fused_is_faster, nearest, read_table, write_entries

GPU = torch.device("cpu")  # its key is "cpu, ...": nothing here needs a device


def entry(mode="trained", rows=8192, width=4096, vocab=128_256, dtype="bfloat16", triton_ms=2.0, fused_ms=1.0):
    return Measured(mode, rows, width, vocab, dtype, triton_ms, fused_ms)


def call(**changes):
    return HeadCall(
        **{"mode": "trained", "rows": 8192, "width": 4096, "vocab": 128_256, "dtype": "bfloat16", **changes}
    )


@pytest.fixture
def path(tmp_path, monkeypatch):
    file = tmp_path / "cache" / "tuned.json"
    monkeypatch.setenv("DPOFAST_TUNED", str(file))
    table._read_once.cache_clear()
    yield file
    table._read_once.cache_clear()


def test_what_is_written_is_read_and_nothing_else_is_left(path):
    write_entries(path, "one", [entry(), entry("frozen")], overwrite=False)
    write_entries(path, "two", [entry(fused_ms=3.0)], overwrite=False)
    write_entries(path, "one", [entry(fused_ms=1.5)], overwrite=False)
    assert read_table(path) == {"one": (entry(fused_ms=1.5), entry("frozen")), "two": (entry(fused_ms=3.0),)}
    write_entries(path, "two", [entry()], overwrite=True)
    assert read_table(path) == {"two": (entry(),)}
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"format": 2, "devices": {}}', '{"format": 1, "devices": {"gpu": [{"mode": "trained"}]}}'],
)
def test_a_damaged_file_is_refused(path, text):
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(ValueError, match=r"tuned.json: expected a table of format 1 .*dpofast tune --overwrite"):
        read_table(path)


@pytest.mark.parametrize(
    "change", [{"mode": "x"}, {"rows": 0}, {"width": 1.5}, {"dtype": 3}, {"triton_ms": -1.0}, {"fused_ms": "1"}]
)
def test_a_wrong_entry_is_refused(path, change):
    path.parent.mkdir()
    values = {**entry().__dict__, **change}
    path.write_text(json.dumps({"format": 1, "devices": {"gpu": [values]}}))
    with pytest.raises(ValueError, match="expected a table of format 1"):
        read_table(path)


def test_only_a_near_shape_of_the_same_mode_and_dtype_counts():
    entries = [entry(), entry(rows=1024, fused_ms=3.0), entry("frozen", width=896)]
    assert nearest(call(), entries) == entries[0]
    assert nearest(call(rows=1500), entries) == entries[1]
    assert nearest(call(vocab=151_936, width=5120), entries) == entries[0]
    for far in ({"rows": 100}, {"width": 8192}, {"vocab": 32_000}, {"mode": "forward"}, {"dtype": "float16"}):
        assert nearest(call(**far), entries) is None


def test_auto_follows_the_users_table_then_what_ships(path, monkeypatch):
    assert not fused_is_faster(call(), GPU)
    monkeypatch.setitem(table.FUSED, table.architecture(GPU), (entry(),))
    assert fused_is_faster(call(), GPU) and not fused_is_faster(call(rows=0), GPU)
    write_entries(path, table.device_key(GPU), [entry(fused_ms=2.5)], overwrite=False)
    table._read_once.cache_clear()
    assert not fused_is_faster(call(), GPU)
    assert fused_is_faster(call(rows=20_000), GPU) is False
    # Another GPU or another torch measured nothing here.
    path.unlink()
    write_entries(path, "another GPU", [entry(fused_ms=2.5)], overwrite=False)
    table._read_once.cache_clear()
    assert fused_is_faster(call(), GPU)
