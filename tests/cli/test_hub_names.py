"""A mistyped path is told from a name on the hub at once, and the nearest path is named."""

import time

import pytest

from dpofast.common.hub import check_hub_name, nearest_path


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "build" / "smollm2").mkdir(parents=True)
    (tmp_path / "pairs.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("build/smolm2", "build/smollm2"),
        ("bulid/smollm2", "build/smollm2"),
        ("pair.jsonl", "pairs.jsonl"),
        ("x/y", None),
    ],
)
def test_the_nearest_path(folder, name, near):
    assert nearest_path(name) == near
    assert nearest_path(str(folder / name)) == (near and str(folder / near))


@pytest.mark.parametrize("name", ["build/smolm2", "./smollm2", "/no/such", "~/no-such", "a/b/c", "model/"])
def test_what_is_written_as_a_path_or_lies_in_a_folder_here_is_no_hub_name(folder, name):
    with pytest.raises(ValueError, match="no such file or folder"):
        check_hub_name(name, cached=lambda _: pytest.fail("a path is not looked for in the hub's cache"))


def test_a_hub_that_cannot_be_reached_is_asked_once(folder, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port: refused
    begin = time.monotonic()
    with pytest.raises(
        ValueError, match=r"bulid/smollm2: .*did you mean build/smollm2\?, and the hub cannot be reached"
    ):
        check_hub_name("bulid/smollm2")
    assert time.monotonic() - begin < 10
    check_hub_name("bulid/smollm2", cached=lambda _: True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    check_hub_name("bulid/smollm2")
