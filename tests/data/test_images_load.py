"""load_preferences with columns of images: from every source, undecoded, with paths that hold wherever it is run."""

import json
import os
import shutil

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image

from dpofast.data import formats, load
from dpofast.data.columns import row_kinds
from dpofast.data.formats import BadRow, DataError
from dpofast.data.images.decode import opened
from dpofast.data.images.stored import stored_images, undecoded
from dpofast.data.load import load_preferences

ROW = {"prompt": "a", "chosen": "b", "rejected": "c"}
TURNS = {
    "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}],
    "chosen": [{"role": "assistant", "content": "A cat."}],
    "rejected": [{"role": "assistant", "content": "A dog."}],
}
IDS = {"prompt_ids": [1, 7, 7], "chosen_ids": [2, 3], "rejected_ids": [4]}
RANKED = {"prompt": "a", "responses": ["b", "c"], "ranks": [0, 1]}
COLOURS = {"red": (255, 0, 0), "green": (0, 128, 0), "blue": (0, 0, 255)}


@pytest.fixture
def folder(tmp_path):
    """A folder of data with red.png, green.png and in/blue.png."""
    (tmp_path / "data" / "in").mkdir(parents=True)
    for name in ("red.png", "green.png", "in/blue.png"):
        Image.new("RGB", (4, 4), os.path.basename(name)[:-4]).save(tmp_path / "data" / name)
    return tmp_path / "data"


@pytest.fixture
def read(tmp_path):
    return lambda source, **options: load_preferences(source, cache_dir=str(tmp_path / "cache"), **options)


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def colours(dataset):
    """The colours of each row's images, as training reads them."""
    names = {value: name for name, value in COLOURS.items()}
    return [
        [names[opened(image).getpixel((1, 1))] for image in row or []] for row in stored_images(dataset)[:]["images"]
    ]


@pytest.mark.parametrize("row", [ROW, TURNS, IDS, RANKED], ids=["text", "turns", "ids", "list"])
def test_json_lines(folder, read, monkeypatch, row):
    path = write(
        folder / "rows.jsonl",
        row | {"images": ["red.png", "in/blue.png"]},
        row,
        row | {"images": None},
        row | {"images": []},
        row | {"images": [{"path": str(folder / "green.png")}, {"bytes": None, "path": "./red.png"}]},
        row | {"images": "green.png"},
    )
    dataset = read(path)
    monkeypatch.chdir("/")
    assert colours(dataset) == [["red", "blue"], [], [], [], ["green", "red"], ["green"]]
    assert dataset.features["images"] == List(ImageFeature()) and dataset[0]["images"][1].size == (4, 4)
    assert "images" in formats.used_columns(dataset.column_names)
    shown = undecoded(dataset)
    assert [{name: shown[at][name] for name in row} for at in range(6)] == [row] * 6
    assert shown["images"][:3] == [
        [{"bytes": None, "path": str(folder / name)} for name in ("red.png", "in/blue.png")],
        None,
        None,
    ]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_one_image_a_row(folder, read, suffix):
    rows = [
        ROW,
        ROW | {"image": "red.png"},
        ROW | {"image": ["in/blue.png"]},
        ROW | {"image": []},
        ROW | {"image": None},
    ]
    path = folder / f"rows{suffix}"
    path.write_text(json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows)))
    dataset = read(path)
    assert dataset.features["image"] == ImageFeature() and colours(dataset) == [[], ["red"], ["blue"], [], []]


def test_a_column_without_an_image_in_any_row_is_left_out(folder, read):
    assert {*read(write(folder / "a.jsonl", ROW | {"images": None}, ROW)).column_names} == {*ROW, "_line"}
    assert {*read(write(folder / "b.jsonl", ROW | {"note": "no images"})).column_names} == {*ROW, "_line"}


def test_csv(folder, read):
    path = folder / "rows.csv"
    path.write_text("prompt,chosen,rejected,image\na,b,c,red.png\na,b,c,\na,b,c,in/blue.png\n")
    assert colours(read(path)) == [["red"], [], ["blue"]]
    path.write_text('prompt,chosen,rejected,images\na,b,c,\na,b,c,"[""red.png"", ""in/blue.png""]"\na,b,c,[]\n')
    assert colours(read(path)) == [[], ["red", "blue"], []]
    path.write_text("prompt,chosen,rejected,images\na,b,c,red.png\n")
    with pytest.raises(DataError, match=r"rows\.csv, line 2: column 'images' is not valid JSON"):
        read(path)


def test_nothing_is_opened_while_it_is_read(folder, read, monkeypatch):
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("an image was opened"))
    dataset = read(write(folder / "rows.jsonl", ROW | {"images": ["red.png", "missing.png"]}))
    assert undecoded(dataset)[0]["images"][1]["path"] == str(folder / "missing.png")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"images": [3]}, "not an image: expected a PIL image, .* got int 3"),
        ({"images": ["red.png", None]}, "not an image: .* got NoneType"),
        ({"images": [["red.png"]]}, "not an image: .* got list"),
        ({"images": {"url": "red.png"}}, "not an image: .* got dict"),
        ({"images": [{"bytes": "aGVsbG8="}]}, r"not an image: .* \(not base64\)"),
        ({"images": [""]}, "an image's path is empty"),
        (
            {"image": ["red.png", "green.png"]},
            "column 'image' holds several images: got 2: it is for one, name it 'images'",
        ),
        ({"image": "https://x.y/z.png"}, "an image is a URL: download it first"),
        ({"image": "red.png", "images": ["red.png"]}, "both 'images' and 'image' are there: only one"),
        ({"videos": ["x.mp4"]}, "videos are not supported: remove column 'videos', or take frames of it as images"),
        ({"video": "x.mp4"}, "videos are not supported: remove column 'video'"),
    ],
)
def test_bad_rows(folder, read, wrong, message):
    path = write(folder / "rows.jsonl", ROW | {"images": ["red.png"]}, ROW | wrong, ROW)
    with pytest.raises(DataError, match=rf"rows\.jsonl, line 2: {message}"):
        read(path)
    dataset = read(path, on_bad_row="skip")
    assert colours(dataset) == [["red"], [], []]
    assert [bool(error) for error in dataset["_error"]] == [False, True, False]
    with pytest.raises(DataError, match=rf"first\.jsonl, line 1: {message}"):
        read(write(folder / "first.jsonl", ROW | wrong))


def test_image_and_images_in_different_rows(folder, read):
    path = write(folder / "rows.jsonl", ROW | {"images": ["red.png"]}, ROW | {"image": "red.png"})
    with pytest.raises(DataError, match=r"rows\.jsonl: both 'images' and 'image' are there: only one can hold"):
        read(path)


def test_equal_files_in_two_folders_have_paths_of_their_own(folder, read, tmp_path):
    write(folder / "rows.jsonl", ROW | {"images": ["red.png"]})
    (folder / "escaped.jsonl").write_text(json.dumps(ROW)[:-1] + ', "im\\u0061ges": ["red.png"]}\n')
    shutil.copytree(folder, tmp_path / "other")
    Image.new("RGB", (4, 4), "blue").save(tmp_path / "other" / "red.png")
    for name in ("rows.jsonl", "escaped.jsonl"):
        assert colours(read(folder / name)) == [["red"]]
        assert colours(read(tmp_path / "other" / name)) == [["blue"]]
    write(folder / "text.jsonl", ROW)
    shutil.copy(folder / "text.jsonl", tmp_path / "other")
    assert read(folder / "text.jsonl").cache_files == read(tmp_path / "other" / "text.jsonl").cache_files


def test_the_name_is_found_across_blocks_and_in_gzip(tmp_path):
    for length in range((1 << 20) - 8, (1 << 20) + 2):
        (tmp_path / "a.jsonl").write_bytes(b" " * length + b"images")
        assert load._may_hold_images(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_bytes(b"imag" * 10)
    assert not load._may_hold_images(tmp_path / "b.jsonl")


# ---- Parquet and saved datasets -------------------------------------------------------------------------------------


def pictures(*names):
    return [Image.new("RGB", (4, 4), name) for name in names]


def test_parquet_of_datasets_keeps_its_feature(folder, read):
    path = folder / "rows.parquet"
    Dataset.from_list([ROW | {"images": pictures("red", "blue")}, ROW | {"images": []}]).to_parquet(path)
    dataset = read(path)
    assert dataset.features["images"] == List(ImageFeature())
    assert colours(dataset) == [["red", "blue"], []] and dataset[0]["images"][0].size == (4, 4)
    Dataset.from_list([ROW | {"image": picture} for picture in pictures("green", "red")]).to_parquet(path)
    assert read(path).features["image"] == ImageFeature() and colours(read(path)) == [["green"], ["red"]]


def test_parquet_of_others_has_paths_relative_to_its_folder(folder, read, tmp_path, monkeypatch):
    path = folder / "rows.parquet"
    red = (folder / "red.png").read_bytes()
    struct = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    columns = {
        "structs": pa.array(
            [[{"bytes": red, "path": "green.png"}, {"bytes": None, "path": "in/blue.png"}]], pa.list_(struct)
        ),
        "paths": pa.array([["red.png", str(folder / "in" / "blue.png")]]),
        "large": pa.array([["red.png", "in/blue.png"]], pa.large_list(pa.large_string())),
    }
    for column in columns.values():
        pq.write_table(pa.table({name: [text] for name, text in ROW.items()} | {"images": column}), path)
        shutil.copytree(folder, tmp_path / "other", dirs_exist_ok=True)
        Image.new("RGB", (4, 4), "green").save(tmp_path / "other" / "in" / "blue.png")
        monkeypatch.chdir("/")
        assert colours(read(path)) == [["red", "blue"]]
        other = "blue" if column is columns["paths"] else "green"
        assert colours(read(tmp_path / "other" / "rows.parquet")) == [["red", other]]
    pandas.DataFrame([ROW | {"image": "green.png"}, ROW | {"image": None}]).to_parquet(path)
    assert colours(read(path)) == [["green"], []]


def test_parquet_is_copied_in_batches_of_few_bytes(folder, read, monkeypatch):
    path = folder / "rows.parquet"
    noise = np.random.default_rng(0)
    images = [[Image.fromarray(noise.integers(0, 256, (64, 64, 3), dtype=np.uint8))] for _ in range(40)]
    Dataset.from_dict({name: [text] * 40 for name, text in ROW.items()} | {"images": images}).to_parquet(path)
    monkeypatch.setattr(load, "_BATCH_BYTES", 1 << 16)
    dataset = read(path)
    chunks = dataset.data.column("images").chunks
    assert len(chunks) >= 8 and max(chunk.nbytes for chunk in chunks) < 1 << 17
    for row, (image,) in zip(stored_images(dataset)[:]["images"], images, strict=True):
        np.testing.assert_array_equal(np.array(opened(row[0])), np.array(image))


def test_parquet_with_videos_or_both_columns(folder, read):
    path = folder / "rows.parquet"
    for more, message in (
        ({"videos": ["x"]}, "videos are not supported"),
        ({"image": "red.png", "images": ["red.png"]}, "both 'images' and 'image' are there"),
    ):
        Dataset.from_list([ROW | more]).to_parquet(path)
        with pytest.raises(DataError, match=rf"rows\.parquet: {message}"):
            read(path)


def test_shards_of_which_some_have_images(folder, read):
    (folder / "shards").mkdir()
    write(folder / "shards" / "a.jsonl", ROW)
    write(folder / "shards" / "b.jsonl", ROW | {"images": ["../red.png"]})
    assert colours(read(folder / "shards")) == [[], ["red"]]


def test_saved_dataset_keeps_its_feature_and_is_not_decoded(folder, read, monkeypatch):
    features = Features({**dict.fromkeys(ROW, Value("string")), "images": List(ImageFeature())})
    rows = [ROW | {"images": pictures("red", "blue")}, ROW | {"images": None}]
    Dataset.from_list(rows, features=features).save_to_disk(folder / "saved")
    with monkeypatch.context() as patched:
        patched.setattr(Image, "open", lambda *_, **__: pytest.fail("an image was opened"))
        dataset = read(folder / "saved")
    assert dataset.features == features and colours(dataset) == [["red", "blue"], []]


# ---- columns --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [ROW, TURNS, IDS, RANKED], ids=["text", "turns", "ids", "list"])
@pytest.mark.parametrize("name", ["images", "image"])
def test_used_columns_have_images_last(row, name):
    without = formats.used_columns({*row})
    assert formats.used_columns({*row, name, "pixel_values", "image_grid_thw"}) == (*without, name)
    assert formats.is_optional(name) and formats.holds_list((*without, name)) == ("responses" in row)


def test_kinds_of_values_in_memory():
    picture = Image.new("RGB", (2, 2))
    for value in ([picture], [], (picture, b"x"), picture, "a.png", {"bytes": b"x", "path": None}):
        assert row_kinds(ROW | {"images": value}, (*ROW, "images"))["images"] == "images"
    assert row_kinds(ROW | {"image": [picture]}, (*ROW, "image"))["image"] == "image"
    assert "images" not in row_kinds(ROW | {"images": None}, (*ROW, "images"))
    with pytest.raises(BadRow, match="column 'image' holds several images: got 2"):
        row_kinds(ROW | {"image": [picture, picture]}, (*ROW, "image"))
    with pytest.raises(BadRow, match="not an image"):
        row_kinds(ROW | {"images": [1]}, (*ROW, "images"))
