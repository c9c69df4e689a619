"""Prompts with images in token-level datasets: equal where text and images are, whatever reads them."""

import numpy as np
import pytest
from datasets import Dataset, Features, Value

from dpofast.data.arrow import read_chunks
from dpofast.data.images.columns import FEATURES, IMAGE_KEYS, IMAGE_TOKENS, IMAGES, OF_IMAGES, STORED
from dpofast.data.lists import lists_to_pairs
from dpofast.data.report import DataReport
from dpofast.data.token_rows import RowTokens, as_numpy, image_columns, token_columns
from dpofast.training.sampler import PairLengths
from tests.support.image_rows import IDS, LIST, PAIR

TOKEN = 90
KEYS = {name: bytes([place]) * 16 for place, name in enumerate("abc", 1)}
KEYS["d"] = KEYS["a"][:4] + bytes(12)  # its virtual id is that of a


def virtual(name):
    return 2**30 + int.from_bytes(KEYS[name][:4], "little") % 2**30


def row(prompt, names="", tokens=(), **more):
    """A row whose prompt has images of these names."""
    images = {IMAGES: [{"bytes": name.encode(), "path": None} for name in names]}
    images |= {IMAGE_KEYS: [KEYS[name] for name in names], IMAGE_TOKENS: list(tokens), "image_token_id": TOKEN}
    images = images if names else dict.fromkeys(images)
    return {"prompt_ids": prompt, "chosen_ids": [7, 8], "rejected_ids": [9], **images, **more}


def dataset_of(rows, columns=PAIR):
    features = {**columns, IMAGES: STORED, **FEATURES}
    return Dataset.from_list([{name: one[name] for name in features} for one in rows], features=Features(features))


ROWS = [
    row([5, TOKEN, TOKEN, 6], "a", [2]),
    row([5, 6, TOKEN]),  # without images nothing is a placeholder
    row([TOKEN, TOKEN, TOKEN, 3, TOKEN], "bca", [1, 2, 1]),
    row([5, TOKEN, TOKEN, 6], "c", [2]),
    row([5, TOKEN, TOKEN, 6], "a", [2]),
    row([5, TOKEN, TOKEN, 6], "d", [2]),
]


def tokens_of(dataset, start=0, stop=None):
    columns = (*token_columns(dataset.column_names), *image_columns(dataset.column_names))
    (table,) = read_chunks(dataset, columns, [(start, len(dataset) if stop is None else stop)])
    return RowTokens.of(table)


@pytest.mark.parametrize("start", [0, 2])
def test_placeholders_become_the_ids_of_their_images(start):
    a, b, c = map(virtual, "abc")
    expected = [[5, a, a, 6], [5, 6, TOKEN], [b, c, c, 3, a], [5, c, c, 6], [5, a, a, 6], [5, virtual("d"), a, 6]]
    rows = tokens_of(dataset_of(ROWS), start)
    values, offsets = rows.prompts
    assert values.dtype == np.int32 and min(a, b, c) >= 2**30
    assert [part.tolist() for part in np.split(values, offsets[1:-1])] == expected[start:]
    names = ["a", "", "bca", "c", "a", "d"][start:]
    assert rows.images.bounds.tolist() == [0, *np.cumsum([len(each) for each in names])]
    assert rows.images.keys.tobytes() == b"".join(KEYS[name] for each in names for name in each)
    assert [part.tolist() for part in rows.responses()] == [[7, 8], [9]] * len(names)


def test_without_the_columns_prompts_are_as_they_are():
    dataset = dataset_of(ROWS).remove_columns([*OF_IMAGES, IMAGES])
    rows = tokens_of(dataset)
    assert rows.images is None
    assert rows.prompts[0].tolist() == [token for one in ROWS for token in one["prompt_ids"]]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prompt_ids": [5, TOKEN, 6]}, r"expected 2 image placeholders \(token id 90\), as .* \(\[2\]\), got 1 in a"),
        ({"prompt_ids": [5, TOKEN, TOKEN, TOKEN]}, r"got 3 in a prompt that begins with \[5, 90, 90, 90\]"),
        ({IMAGE_TOKENS: [1, 1]}, "expected 16 bytes for each image, beside its 1 or more placeholders"),
        ({IMAGE_TOKENS: None}, "expected 16 bytes for each image"),
        ({IMAGE_TOKENS: [0]}, "expected 16 bytes for each image"),
        ({IMAGE_TOKENS: [None]}, "expected 16 bytes for each image"),
        ({IMAGE_KEYS: [b"short"]}, "expected 16 bytes for each image"),
        ({IMAGE_KEYS: [None]}, "expected 16 bytes for each image"),
        ({"image_token_id": None}, "image_token_id: expected a token id in every row with image_keys"),
    ],
)
def test_images_that_contradict_a_prompt(change, message):
    rows = [ROWS[2], ROWS[0] | change, ROWS[1]]
    with pytest.raises(ValueError, match=message):
        tokens_of(dataset_of(rows))
    with pytest.raises(ValueError, match=message):
        PairLengths.of(dataset_of(rows))


def test_prompt_keys_are_equal_where_text_and_images_are():
    keys = PairLengths.of(dataset_of(ROWS)).prompt_keys.tolist()
    assert keys[0] == keys[4] and len(set(keys[:5])) == 4
    lengths = PairLengths.of(dataset_of(ROWS))
    assert lengths.prompts.tolist() == [len(one["prompt_ids"]) for one in ROWS]


def test_numpy_rows_keep_images_as_lists():
    rows = as_numpy(dataset_of(ROWS))[2:4]
    assert isinstance(rows["prompt_ids"][0], np.ndarray)
    assert rows[IMAGE_KEYS] == [[KEYS["b"], KEYS["c"], KEYS["a"]], [KEYS["c"]]]
    assert rows[IMAGE_TOKENS] == [[1, 2, 1], [2]] and rows[IMAGES][1] == [{"bytes": b"c", "path": None}]


def test_pairs_of_a_list_have_its_images():
    lists = [
        {**ROWS[2], "responses_ids": [[1], [2], [3]], "ranks": [0, 1, 2], "order": [0, 1, 2], "row": 0},
        {**ROWS[1], "responses_ids": [[4], [5]], "ranks": [0, 1], "order": [0, 1], "row": 1},
        {**ROWS[3], "responses_ids": [[4], [5]], "ranks": [0, 1], "order": [0, 1], "row": 2},
    ]
    dataset = dataset_of(lists, {**LIST, "row": Value("int64")})
    report = DataReport.from_bad_rows("lists", "row", 3, {}, holds="lists")
    pairs, _ = lists_to_pairs(dataset, "all", None, report)
    assert pairs["row"] == [0, 0, 0, 1, 2]
    for name in (IMAGES, *OF_IMAGES, "prompt_ids"):
        assert pairs[name] == [lists[number][name] for number in pairs["row"]]
    assert pairs.features[IMAGE_KEYS] == FEATURES[IMAGE_KEYS] and pairs.features["prompt_ids"] == IDS
