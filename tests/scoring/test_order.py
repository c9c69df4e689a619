"""The order of a pass over a dataset: rows whose prompts begin alike meet, results stand where they stood."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from dpofast import attach_logprob_head
from dpofast.data.arrow import mapped_files
from dpofast.data.formats import REF_COLUMNS
from dpofast.data.images.columns import FEATURES
from dpofast.scoring import order, ref_cache, score
from dpofast.scoring.order import prompt_order
from dpofast.scoring.ref_cache import add_reference_columns
from dpofast.scoring.score import Forward, score_rows
from tests.support.resident import resident
from tests.support.tiny import tiny_dataset, tiny_dialogues, tiny_model

FORWARD = Forward(max_tokens=200, device=torch.device("cpu"))
PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), max_size=20)


def of_prompts(prompts):
    columns = {"prompt_ids": prompts, "chosen_ids": [[1]] * len(prompts), "rejected_ids": [[2]] * len(prompts)}
    return Dataset.from_dict(columns)


@pytest.fixture
def positions(monkeypatch):
    """The packed positions of every micro-batch that is computed."""
    counted, plain = [], score.pack

    def counting(*args, **options):
        batches = plain(*args, **options)
        counted.extend(batch.num_tokens for batch in batches)
        return batches

    monkeypatch.setattr(score, "pack", counting)
    return counted


@given(PROMPTS)
def test_rows_are_in_the_order_of_their_prompts(prompts):
    expected = sorted(range(len(prompts)), key=lambda row: prompts[row])
    assert prompt_order(of_prompts(prompts)).tolist() == expected


@given(PROMPTS, st.randoms(use_true_random=False))
def test_a_dataset_that_was_shuffled_is_ordered_as_it_is_now(prompts, random):
    rows = random.sample(range(len(prompts)), len(prompts))
    now = [prompts[row] for row in rows]
    assert prompt_order(of_prompts(prompts).select(rows)).tolist() == prompt_order(of_prompts(now)).tolist()


def test_long_data_are_ordered_in_stretches(monkeypatch):
    monkeypatch.setattr(order, "_ROWS", 4)
    monkeypatch.setattr(order, "_TOKENS", 20)
    draw = np.random.default_rng(0)
    prompts = [draw.integers(0, 3, size=3).tolist() for _ in range(21)]
    found = prompt_order(of_prompts(prompts)).tolist()
    stretches = [range(0, 8), range(8, 16), range(16, 21)]  # as soon as 4, 8, ... rows have 20 tokens
    assert found == [row for part in stretches for row in sorted(part, key=lambda row: prompts[row])]


def test_prompts_with_one_image_stand_together():
    """And with them those that begin with it; an image is compared as its virtual id."""
    keys = {"a": b"\x09" * 16, "b": b"\x02" * 16}
    rows = [("a", [5, 90, 90, 6]), ("b", [5, 90, 90, 6]), ("", [5, 7]), ("a", [5, 90, 90, 6]), ("b", [5, 90, 90])]
    dataset = of_prompts([prompt for _, prompt in rows] + [[5, 90, 90, 1, 90]]).select(range(6))
    names = [*(names for names, _ in rows), "ab"]
    images = {
        "image_keys": [[keys[name] for name in each] for each in names],
        "image_tokens": [[2, 1][: len(each)] for each in names],
        "image_token_id": [90] * 6,
    }
    for name, values in images.items():
        dataset = dataset.add_column(name, values, feature=FEATURES[name])
    assert prompt_order(dataset).tolist() == [2, 4, 1, 5, 0, 3]
    shuffled = dataset.select([3, 1, 5, 0])
    assert prompt_order(shuffled).tolist() == [1, 2, 0, 3]


def test_mapped_rows_are_released_stretch_by_stretch(tmp_path, monkeypatch):
    rows, tokens = 8192, 512  # 16 MB of prompts
    monkeypatch.setattr(order, "_TOKENS", 1 << 19)  # 2 MB
    prompts = np.random.default_rng(0).integers(0, 1000, (rows, tokens), dtype=np.int32)
    of_prompts(list(prompts)).save_to_disk(tmp_path / "saved")
    dataset = Dataset.load_from_disk(tmp_path / "saved")
    (path,) = mapped_files(dataset)
    most, plain = [], order.lexicographic_order

    def watched(*args):
        found = plain(*args)
        most.append(resident(path))
        return found

    monkeypatch.setattr(order, "lexicographic_order", watched)
    found = prompt_order(dataset)
    assert len(most) == 8 and max(most) < 6_000_000
    assert resident(path) < 1_000_000
    assert sorted(found.tolist()) == list(range(rows))


@pytest.mark.parametrize("padded", [False, True])
def test_a_reference_pass_computes_fewer_positions_and_the_same_numbers(monkeypatch, positions, tmp_path, padded):
    dataset = tiny_dataset(120, pairs=tiny_dialogues)
    model = attach_logprob_head(tiny_model(), padded=padded)
    forward = Forward(max_tokens=200, device=FORWARD.device, share="none" if padded else "prefix")

    def columns(window):
        positions.clear()
        result = add_reference_columns(dataset, model, forward, cache_dir=tmp_path / str(window), window=window)
        assert [result[name] for name in dataset.column_names] == [dataset[name] for name in dataset.column_names]
        return np.stack([result[name] for name in REF_COLUMNS]), sum(positions)

    ordered, fewer = columns(12)
    again, none = columns(12)  # from the cache
    assert np.array_equal(ordered, again) and none == 0
    one_window, fewest = columns(120)
    monkeypatch.setattr(ref_cache, "prompt_order", lambda dataset: np.arange(len(dataset)))
    monkeypatch.setattr(ref_cache, "ENGINE_VERSION", 0)
    unordered, more = columns(12)
    for found in (ordered, one_window):
        np.testing.assert_allclose(found, unordered, atol=1e-5)
    if padded:
        assert fewer == fewest == more
    else:
        assert fewer < 0.75 * more and fewer < 1.1 * fewest


def test_scoring_a_dataset_in_that_order_computes_fewer_positions(positions):
    dataset = tiny_dataset(120, pairs=tiny_dialogues)
    dataset = dataset.add_column("row", list(range(len(dataset))))
    model, scored = attach_logprob_head(tiny_model()), []
    for rows in (range(120), prompt_order(dataset)):
        positions.clear()
        options = {"beta": 0.1, "max_tokens": 200, "share": "prefix", "max_logits_bytes": None, "window": 12}
        found = list(score_rows(dataset.select(rows), model, device=FORWARD.device, **options))
        assert [row["row"] for row in found] == list(rows)
        by_row = sorted(found, key=lambda row: row["row"])
        scored.append(([(row["chosen_logps"], row["rejected_logps"]) for row in by_row], sum(positions)))
    (plain, more), (ordered, fewer) = scored
    np.testing.assert_allclose(ordered, plain, atol=1e-5)
    assert fewer < 0.75 * more
