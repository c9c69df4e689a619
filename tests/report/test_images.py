"""Thumbnails in report.html: small, few, escaped, and of the images of the pairs that are shown."""

import base64
import io
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset, Features, List, Value
from PIL import Image

from dpofast.data.images.columns import FEATURES, STORED
from dpofast.evaluation.pair_records import PairTable
from dpofast.report.page import _pairs_html
from dpofast.report.thumbnails import MOST_BYTES, MOST_PICTURES, small_jpeg, thumbnails_html

IMAGE = 9  # the token id of a placeholder


def picture(height, width, seed=0):
    return Image.fromarray(np.random.RandomState(seed).randint(0, 255, (height, width, 3), dtype=np.uint8))


def encoded(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


class Elements(HTMLParser):
    """The start tags with their attributes, and the text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.words += data

    @property
    def pictures(self):
        return [attributes for tag, attributes in self.tags if tag == "img"]


@pytest.mark.parametrize("size", [(1, 1), (3, 10_000), (10_000, 3), (100, 100), (480, 640), (2000, 1500)])
def test_a_thumbnail_is_small_whatever_it_shows(size):
    data, shape = small_jpeg(picture(*size))
    opened = Image.open(io.BytesIO(data))
    assert len(data) <= MOST_BYTES and opened.size == shape and opened.format == "JPEG"
    assert max(shape) == min(160, max(size)) or max(size) > 48  # noise takes fewer pixels
    assert min(shape) >= 1


def test_a_smooth_picture_keeps_160_pixels_its_shape_and_its_colours():
    ramp = np.stack([np.tile(np.linspace(0, 255, 640), (320, 1))] * 3, axis=-1)
    ramp[:, :, 2] = 40
    data, shape = small_jpeg(Image.fromarray(ramp.astype(np.uint8)))
    small = np.asarray(Image.open(io.BytesIO(data)), float)
    assert shape == (160, 80)
    expected = ramp.reshape(80, 4, 160, 4, 3).mean((1, 3))
    assert np.abs(small - expected).mean() < 2


def test_the_smallest_size_is_below_the_limit_in_the_worst_case():
    checkered = (np.indices((48, 48)).sum(0) % 2 * 255).astype(np.uint8)
    for worst in (picture(48, 48), Image.fromarray(np.stack([checkered, 255 - checkered, checkered], axis=-1))):
        file = io.BytesIO()
        worst.save(file, "JPEG", quality=40)
        assert len(file.getvalue()) < MOST_BYTES / 2


def test_few_pictures_are_shown_and_the_others_are_counted():
    images = [{"bytes": encoded(picture(20, 30 + i)), "path": None} for i in range(5)]
    page = Elements(thumbnails_html(images))
    assert [each["alt"] for each in page.pictures] == [f"image {i} of 5, {29 + i} x 20 pixels" for i in (1, 2, 3)]
    assert page.words == "and 2 more"
    assert (page.pictures[0]["width"], page.pictures[0]["height"]) == ("30", "20")
    assert thumbnails_html([]) == thumbnails_html(None) == ""


def test_names_of_files_are_escaped_and_cut(tmp_path):
    path = tmp_path / ('"><script>alert(1)<' + "x" * 100 + ".png")
    path.write_bytes(encoded(picture(8, 8)))
    page = Elements(thumbnails_html([{"bytes": None, "path": str(path)}]))
    assert [tag for tag, _ in page.tags] == ["div", "img"]
    (shown,) = page.pictures
    assert shown["alt"] == f"image 1 of 1: {path.name[:60]}…, 8 x 8 pixels" and str(tmp_path) not in shown["alt"]
    path.unlink()
    page = Elements(thumbnails_html([{"bytes": None, "path": str(path)}]))
    assert page.pictures == [] and page.words.endswith("… (cannot be read any more)")


class Letters:
    """A tokenizer of letters; DPOTrainer only saves with it."""

    def decode(self, ids):
        return "".join("<image>" if token == IMAGE else chr(97 + token) for token in ids)


@pytest.fixture
def held_out():
    """Pairs 0 and 1 with two images, 2 with none; their images are large noise, which compresses badly."""
    images = [{"bytes": encoded(picture(300, 400, seed)), "path": None} for seed in range(4)]
    rows = [
        {"prompt_ids": [0, IMAGE, IMAGE, 8, IMAGE, 1, IMAGE, IMAGE, 2], "images": images[:2], "tokens": [3, 2]},
        {"prompt_ids": [1, IMAGE, 2, IMAGE], "images": images[2:], "tokens": [1, 1]},
        {"prompt_ids": [3, 4], "images": None, "tokens": []},
    ]
    ids = {name: List(Value("int32")) for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
    return Dataset.from_list(
        [
            {
                **{"prompt_ids": row["prompt_ids"], "chosen_ids": [5, i], "rejected_ids": [6], "images": row["images"]},
                **{"image_keys": [bytes([i, k] * 8) for k in range(len(row["tokens"]))]},
                **{"image_tokens": row["tokens"], "image_token_id": IMAGE if row["tokens"] else None},
            }
            for i, row in enumerate(rows)
        ],
        features=Features({**ids, "images": STORED, **FEATURES}),
    )


def pairs_of(dataset, **changed):
    """What _pairs_html reads of a trainer, and the records of an evaluation of all rows, worst and best."""
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    kept = [
        SimpleNamespace(place=i, margin=1.0, example={**{name: np.array(row[name]) for name in names}, "index": i})
        for i, row in enumerate(dataset)
    ]
    table = PairTable(np.arange(10, 13), np.zeros((3, 2)), np.zeros((3, 2)), np.ones((3, 2), int), np.zeros(3))
    records = SimpleNamespace(table=lambda: table, worst=lambda: kept, best=lambda: kept[::-1])
    trainer = SimpleNamespace(
        processing_class=Letters(),
        data_reports={},
        eval_dataset=dataset,
        callback_handler=SimpleNamespace(eval_dataloader=None),
    )
    vars(trainer).update(changed)
    return trainer, records


def test_a_pair_shows_its_own_images_and_its_prompt_names_each_once(held_out):
    html = _pairs_html(*pairs_of(held_out))
    articles = re.findall(r"<article.*?</article>", html)
    assert len(articles) == 6
    for article, row in zip(articles, [0, 1, 2, 2, 1, 0], strict=True):
        page = Elements(article)
        expected = [small_jpeg(picture(300, 400, seed))[0] for seed in [(0, 1), (2, 3), ()][row]]
        assert [base64.b64decode(each["src"].partition("base64,")[2]) for each in page.pictures] == expected
        assert ["a[image]b[image]c", "b[image]c[image]", "de"][row] in page.words
    assert "<image>" not in html and "&lt;image&gt;" not in html


def test_the_page_grows_by_a_bounded_amount(held_out):
    trainer, records = pairs_of(held_out)
    with_images = _pairs_html(trainer, records)
    trainer.eval_dataset = held_out.remove_columns(["images", *FEATURES])
    without = _pairs_html(trainer, records)
    most = MOST_PICTURES * (MOST_BYTES * 4 / 3 + 1000)
    assert most < 36_000 and 0 < len(with_images) - len(without) < 6 * most
    assert "<img" not in without and with_images.count("<img") == 8


def test_images_are_looked_for_in_every_held_out_set_and_taken_of_an_equal_row_alone(held_out):
    other = held_out.select([1, 0, 2])
    trainer, records = pairs_of(held_out, eval_dataset={"other": other, "own": held_out})
    expected = _pairs_html(*pairs_of(held_out))
    assert _pairs_html(trainer, records) == expected
    loader = SimpleNamespace(dataset=SimpleNamespace(dataset=held_out))
    trainer, records = pairs_of(held_out, eval_dataset=None)
    trainer.callback_handler.eval_dataloader = loader  # of further data
    assert _pairs_html(trainer, records) == expected
    trainer, records = pairs_of(held_out, eval_dataset=other)
    html = _pairs_html(trainer, records)
    assert "<img" not in html and html.count("&lt;image&gt;") == 2 * 7, "other data: no images are made up"


def test_pairs_of_equal_text_show_their_own_images(held_out):
    """A held-out set beside the same one with other images."""
    rows = held_out.to_list()
    for row in rows[:2]:
        row["images"], row["image_keys"] = row["images"][::-1], row["image_keys"][::-1]
    exchanged = Dataset.from_list(rows, features=held_out.features)
    trainer, records = pairs_of(exchanged, eval_dataset={"own": held_out, "exchanged": exchanged})
    for pair in records.worst():
        pair.example["image_keys"] = rows[pair.place]["image_keys"]
    assert _pairs_html(trainer, records) == _pairs_html(*pairs_of(exchanged)) != _pairs_html(*pairs_of(held_out))
