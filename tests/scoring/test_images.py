"""Log-probs without gradient of prompts with images: those of each sequence alone, pixels a few rows at a time."""

import io
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from PIL import Image

from dpofast import attach_logprob_head
from dpofast.data.formats import LIST_REF_COLUMN, REF_COLUMNS
from dpofast.data.images.columns import IMAGE_KEYS, IMAGE_TOKENS, IMAGES, OF_IMAGES
from dpofast.scoring import pixels, ref_cache
from dpofast.scoring.fingerprints import ResponseFingerprints
from dpofast.scoring.ref_cache import add_reference_columns
from dpofast.scoring.score import Forward, response_logps, score_rows
from tests.support.image_rows import arrow_pool, image_dataset, mixed_rows, png, prompt_images
from tests.support.thread_ranks import in_threads
from tests.support.vision_models import vision_model
from tests.support.vision_prompts import Prompt, alone

OPTIONS = {"beta": 0.5, "max_tokens": 120, "share": "prefix", "max_logits_bytes": None, "device": torch.device("cpu")}
TENSORS = ("pixel_values", "image_grid_thw", "image_sizes", "batch_num_images")


class Counting:
    """PromptImages that count the rows whose pixels they make."""

    def __init__(self, images):
        self.images, self.made = images, []

    def media(self, row):
        self.made.append(row["row"])
        return self.images.media(row)


def truth(family, dataset):
    """For each row the summed log-probs of its responses, by the model's own forward over each sequence alone."""
    model, images = vision_model(family), prompt_images(family)
    rows = []
    for row in dataset:
        processed = {}
        if row[IMAGES]:
            pictures = [Image.open(io.BytesIO(image["bytes"])).convert("RGB") for image in row[IMAGES]]
            text = images.token * len(pictures)
            made = images.processor(text=[text], images=[pictures], return_tensors="pt")
            processed = {name: made[name] for name in TENSORS if name in made}
        prompt = Prompt(row["prompt_ids"], processed)
        responses = row.get("responses_ids") or [row["chosen_ids"], row["rejected_ids"]]
        with torch.no_grad():
            rows.append([float(alone(model, family, [(prompt, response)]).sum()) for response in responses])
    return rows


def head(family, padded=False):
    return attach_logprob_head(vision_model(family), padded=padded)


def forward(images, **options):
    return Forward(max_tokens=120, device=OPTIONS["device"], images=images, **options)


@pytest.fixture(scope="module")
def qwen():
    """Images, a dataset, and the log-probs of its rows."""
    images = prompt_images("qwen2_vl")
    dataset = image_dataset(images, mixed_rows())
    return SimpleNamespace(images=images, dataset=dataset, truth=np.array(truth("qwen2_vl", dataset)))


def pairs_of(rows):
    return np.array([(row["chosen_logps"], row["rejected_logps"]) for row in rows])


@pytest.mark.parametrize("family, padded", [("qwen2_vl", False), ("llava_next", False), ("gemma3", True)])
@pytest.mark.parametrize("bytes_together", [1, 1 << 28])
def test_scores_are_those_of_each_sequence_alone(family, padded, bytes_together, monkeypatch):
    monkeypatch.setattr(pixels, "PIXEL_BYTES", bytes_together)
    images = prompt_images(family)
    dataset = image_dataset(images, mixed_rows())
    options = OPTIONS | {"share": "none" if padded else "prefix", "images": images}
    rows = list(score_rows(dataset, head(family, padded), window=5, **options))
    np.testing.assert_allclose(pairs_of(rows), truth(family, dataset), atol=1e-5)
    assert [row["row"] for row in rows] == list(range(8))
    assert len({round(row["chosen_logps"], 3) for row in rows}) == 8


def with_media(dataset, images):
    """The rows as an own loop has them."""
    for row in dataset:
        yield {name: row[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")} | {"media": images.media(row)}


def test_mappings_with_stored_images_or_with_media(qwen, monkeypatch):
    model = head("qwen2_vl")
    for rows in (list(qwen.dataset), iter(qwen.dataset)):
        found = list(score_rows(rows, model, images=qwen.images, **OPTIONS))
        np.testing.assert_allclose(pairs_of(found), qwen.truth, atol=1e-5)
    for bytes_together in (1 << 28, 20_000):  # of two images, or three
        monkeypatch.setattr("dpofast.scoring.windows.PIXEL_BYTES", bytes_together)
        found = list(score_rows(with_media(qwen.dataset, qwen.images), model, **OPTIONS))
        np.testing.assert_allclose(pairs_of(found), qwen.truth, atol=1e-5)
    mixed = [*with_media(qwen.dataset.select(range(4)), qwen.images), *qwen.dataset.select(range(4, 8))]
    mixed = [{**row, "row": number} for number, row in enumerate(mixed)]
    found = list(score_rows(mixed, model, images=qwen.images, **OPTIONS))
    np.testing.assert_allclose(pairs_of(found), qwen.truth, atol=1e-5)


def test_media_of_mappings_are_read_a_few_at_a_time(qwen, monkeypatch):
    taken = []
    rows = (taken.append(row) or row for row in with_media(qwen.dataset, qwen.images))
    size = pixels.pixel_bytes(qwen.images.media(qwen.dataset[0]))
    monkeypatch.setattr("dpofast.scoring.windows.PIXEL_BYTES", 2 * size)
    scored = score_rows(rows, head("qwen2_vl"), **OPTIONS)
    next(scored)
    assert len(taken) == 3  # the second has no images


def test_pixels_are_made_once_for_equal_images_and_a_few_rows_at_a_time(qwen, monkeypatch):
    counting = Counting(qwen.images)
    response_logps(qwen.dataset, head("qwen2_vl"), forward(counting))
    assert sorted(counting.made) == [0, 2, 3, 6, 7]  # rows 4 and 5 have the image of row 0, row 1 none
    sizes = {row: pixels.pixel_bytes(qwen.images.media(qwen.dataset[row])) for row in (0, 2, 3, 6, 7)}
    monkeypatch.setattr(pixels, "PIXEL_BYTES", sizes[0] + sizes[2])
    table = qwen.dataset.with_format("arrow")[:]
    groups = list(pixels.pixel_groups(table, qwen.images))
    assert [group.rows.tolist() for group in groups] == [[0, 4, 5, 1, 2], [3], [6], [7]]
    for group in groups:
        media = {id(one): one for one in group.examples["media"] if one is not None}
        assert len(media) == 1 or sum(map(pixels.pixel_bytes, media.values())) <= pixels.PIXEL_BYTES
    counting.made.clear()
    response_logps(table, head("qwen2_vl"), forward(counting))
    assert counting.made == [0, 2, 3, 6, 7]


def test_encoded_images_are_read_one_row_at_a_time(qwen):
    """Rows in another order than they are stored in: Arrow would copy those of a whole window."""
    text, (file,), responses = mixed_rows()[0]
    large = file + bytes(1 << 20)  # what follows a PNG is not read
    rows = [(f"{text}{19 - k}", [large], responses) for k in range(10)]
    dataset, model = image_dataset(qwen.images, rows), head("qwen2_vl")
    plain = [(text, [file], responses) for text, _, responses in rows]
    expected = np.array(truth("qwen2_vl", image_dataset(qwen.images, plain)))
    order = [3, 9, 0, 5, 1, 2, 4, 8, 6, 7]
    with arrow_pool() as pool:
        scored = list(score_rows(dataset.select(order), model, images=qwen.images, **OPTIONS))
        sums = columns_of(dataset, model, qwen.images, None, window=10)  # in the order of prompts
    assert pool.max_memory() < 4 << 20
    np.testing.assert_allclose(pairs_of(scored), expected[order], atol=1e-5)
    np.testing.assert_allclose(sums, expected, atol=2e-5)


def test_the_thread_that_makes_pixels_ends(qwen):
    def running():
        return [thread for thread in threading.enumerate() if thread.name.startswith("dpofast")]

    response_logps(qwen.dataset, head("qwen2_vl"), forward(qwen.images))
    assert running() == []

    class Broken(torch.nn.Module):
        def forward(self, **inputs):
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        response_logps(qwen.dataset, Broken(), forward(qwen.images))
    assert running() == []


def test_under_peft_the_base_model_is_the_reference(qwen):
    policy = get_peft_model(vision_model("qwen2_vl"), LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.5)
    attach_logprob_head(policy)
    counting = Counting(qwen.images)
    rows = list(score_rows(qwen.dataset, policy, images=counting, **OPTIONS))
    assert sorted(counting.made) == [0, 2, 3, 6, 7]  # once for both models
    found = np.array([(row["ref_chosen_logps"], row["ref_rejected_logps"]) for row in rows])
    np.testing.assert_allclose(found, qwen.truth, atol=1e-5)
    assert (abs(pairs_of(rows) - qwen.truth) > 1e-4).all()


def test_images_without_what_makes_pixels_are_refused(qwen):
    model = head("qwen2_vl")
    message = r"images: expected what makes the pixels of rows with image_keys, got None: give images=PromptImages\("
    for rows in (qwen.dataset, list(qwen.dataset)):
        with pytest.raises(ValueError, match=message):
            next(score_rows(rows, model, **OPTIONS))
    for rows in (qwen.dataset, qwen.dataset.with_format("arrow")[:]):
        with pytest.raises(ValueError, match=message):
            response_logps(rows, model, forward(None))
    with pytest.raises(ValueError, match=message):
        add_reference_columns(qwen.dataset, model, forward(None), cache_dir=None)


def changed(dataset, row, **columns):
    rows = dataset.to_list()
    rows[row] |= columns
    return Dataset.from_list(rows, features=dataset.features)


def test_an_image_that_is_another_one_or_missing_or_broken(qwen):
    model = head("qwen2_vl")
    other = [{"bytes": png(9, 12, 8), "path": None}]
    broken = [{"bytes": png(2)[:40], "path": None}]
    for images, message in (
        (other, "row 2 of the data: its images.* are others than when it was tokenized"),
        (broken, "row 2 of the data: "),
        ([], r"examples\[2\]: images: expected the images of image_keys beside them, got none"),
    ):
        rows = changed(qwen.dataset, 2, images=images)
        for form in (rows, list(rows)):
            with pytest.raises(ValueError, match=message):
                list(score_rows(form, model, images=qwen.images, **OPTIONS))


def test_a_row_that_pack_refuses_is_named_by_its_place(qwen, monkeypatch):
    monkeypatch.setattr(pixels, "PIXEL_BYTES", 1)
    for number in (6, 5):
        rows = changed(qwen.dataset, number, chosen_ids=[3, 90])
        with pytest.raises(ValueError, match=rf"examples\[{number}\]: .*image placeholders in prompts"):
            response_logps(rows, head("qwen2_vl"), forward(qwen.images))


# ---- the cache of reference log-probs -------------------------------------------------------------------------------


@pytest.fixture
def computed(monkeypatch):
    """The rows of every window that the model computes."""
    rows, plain = [], ref_cache.response_logps

    def counting(examples, *args):
        rows.append(list(examples["row"]))
        return plain(examples, *args)

    monkeypatch.setattr(ref_cache, "response_logps", counting)
    return rows


def columns_of(dataset, model, images, folder, **options):
    result = add_reference_columns(dataset, model, forward(images), cache_dir=folder, **{"window": 3, **options})
    assert result.remove_columns(REF_COLUMNS).to_list() == dataset.to_list()
    return np.stack([result[name] for name in REF_COLUMNS], 1)


def test_reference_columns_are_computed_once(qwen, tmp_path, computed):
    model = head("qwen2_vl")
    first = columns_of(qwen.dataset, model, qwen.images, tmp_path)
    np.testing.assert_allclose(first, qwen.truth, atol=2e-5)
    assert sorted(map(len, computed)) == [2, 3, 3]
    assert any({0, 4} <= {*rows} for rows in computed)  # rows of one image meet
    again = columns_of(qwen.dataset, model, None, tmp_path)  # a full cache needs no pixels
    assert np.array_equal(first, again) and len(computed) == 3
    shuffled = qwen.dataset.select([5, 2, 7])
    np.testing.assert_allclose(columns_of(shuffled, model, qwen.images, None), qwen.truth[[5, 2, 7]], atol=2e-5)


def test_another_image_is_computed_again(qwen, tmp_path, computed):
    model = head("qwen2_vl")
    first = columns_of(qwen.dataset, model, qwen.images, tmp_path)
    rows = mixed_rows()
    text, _, responses = rows[2]
    rows[2] = (text, [png(9, 12, 8)], responses)
    other = image_dataset(qwen.images, rows)
    assert other["prompt_ids"] == qwen.dataset["prompt_ids"] and other[IMAGE_TOKENS] == qwen.dataset[IMAGE_TOKENS]
    computed.clear()
    second = columns_of(other, model, qwen.images, tmp_path)
    assert len(computed) == 3 and len(list(tmp_path.iterdir())) == 2
    np.testing.assert_allclose(second, truth("qwen2_vl", other), atol=2e-5)
    assert (abs(second - first) > 1e-3).any(1).tolist() == [row == 2 for row in range(8)]
    # the same image in other files is the same prompt
    computed.clear()
    stored = [[{**image, "path": "a.png"} for image in images or ()] or None for images in qwen.dataset[IMAGES]]
    moved = qwen.dataset.remove_columns(IMAGES).add_column(IMAGES, stored, feature=qwen.dataset.features[IMAGES])
    again = add_reference_columns(moved, model, forward(None), cache_dir=tmp_path, window=3)
    assert np.array_equal(np.stack([again[name] for name in REF_COLUMNS], 1), first) and not computed


def test_equal_text_with_different_images_keeps_its_own_numbers(qwen):
    """Equal responses to equal prompts get one number; rows 0 and 2 have equal prompt_ids but for their images."""
    images = qwen.images
    same = ["a cat", "a dog."]
    rows = [("what is it?", [png(seed)], same) for seed in (1, 2, 1)]
    dataset = image_dataset(images, rows)
    assert dataset["prompt_ids"][0] == dataset["prompt_ids"][1]
    sums = columns_of(dataset, head("qwen2_vl"), images, None, window=1)
    np.testing.assert_allclose(sums, truth("qwen2_vl", dataset), atol=2e-5)
    assert np.array_equal(sums[0], sums[2]) and (abs(sums[0] - sums[1]) > 1e-3).all()


def test_equal_prompts_with_different_images_are_different_responses():
    """By whole keys: the first four bytes, of which virtual ids are made, may be equal."""
    keys = [b"a" * 16, b"b" * 16, b"a" * 16, b"a" * 4 + b"c" * 12, None]
    row = {"prompt_ids": [5, 90, 6], "chosen_ids": [1], "rejected_ids": [2]}
    rows = [
        {**row, "image_keys": key and [key], "image_tokens": key and [1], "image_token_id": 90 if key else None}
        for key in keys
    ]
    fingerprints = ResponseFingerprints.of(Dataset.from_list(rows))
    assert fingerprints.first_equal().tolist() == [0, 1, 2, 3, 0, 1, 6, 7, 8, 9]
    text = ResponseFingerprints.of(Dataset.from_list([row]))
    assert np.array_equal(fingerprints.tokens[8:], text.tokens)  # as before there were images


def test_ranks_share_the_windows(qwen, tmp_path, computed):
    model = head("qwen2_vl")
    alone_ = columns_of(qwen.dataset, model, qwen.images, None)
    computed.clear()

    for found in in_threads(lambda ranks: columns_of(qwen.dataset, model, qwen.images, tmp_path, ranks=ranks)):
        np.testing.assert_allclose(found, alone_, atol=1e-6)
    assert sorted(row for rows in computed for row in rows) == list(range(8))  # each once


def test_lists(qwen, tmp_path):
    images, model = qwen.images, head("qwen2_vl")
    dataset = image_dataset(images, mixed_rows(lists=True))
    expected = truth("qwen2_vl", dataset)
    for _ in range(2):
        result = add_reference_columns(dataset, model, forward(images), cache_dir=tmp_path, window=3)
        np.testing.assert_allclose(result[LIST_REF_COLUMN], expected, atol=2e-5)
    for rows in (dataset, list(dataset)):
        scored = list(score_rows(rows, model, images=images, window=3, **OPTIONS))
        np.testing.assert_allclose([row["responses_logps"] for row in scored], expected, atol=1e-5)


def test_rows_without_images_are_computed_as_before(qwen):
    """A dataset with the columns of images, of which no row has one."""
    model = head("qwen2_vl")
    rows = [(text, [], responses) for text, _, responses in mixed_rows()]
    dataset = image_dataset(qwen.images, rows)
    plain = dataset.remove_columns([IMAGES, *OF_IMAGES])
    assert dataset[IMAGE_KEYS] == [None] * 8
    with_columns = columns_of(dataset, model, qwen.images, None)
    assert np.array_equal(with_columns, columns_of(plain, model, None, None))
