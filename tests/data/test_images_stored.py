"""Images of rows and of whole datasets in their stored form: the same pixels, and no copy where bytes are stored."""

import io
import os
import pickle

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, Features, LargeList, List, Value, concatenate_datasets, load_from_disk
from datasets import Image as ImageFeature
from PIL import Image

from dpofast.data.formats import BadRow, DataError
from dpofast.data.images.columns import STORED
from dpofast.data.images.decode import opened
from dpofast.data.images.stored import dataset_of, stored, stored_images, undecoded, with_folder

PICTURES = [
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 7 + seed, 3), dtype=np.uint8)) for seed in range(6)
]
# Which pictures each row has.
LISTS = [[0], [1, 2], None, [], [3, 4, 5]]
ONES = [[3], None, [1], [0]]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The pictures as files in the working folder: their names."""
    monkeypatch.chdir(tmp_path)
    names = [f"{number}.png" for number in range(len(PICTURES))]
    for name, picture in zip(names, PICTURES, strict=True):
        picture.save(name)
    return names


def same(images, numbers):
    """Whether stored images are the pictures with these numbers."""
    found = [np.array(opened(image)) for image in images or []]
    wanted = [np.array(PICTURES[number]) for number in numbers or []]
    return len(found) == len(wanted) and all(map(np.array_equal, found, wanted))


def column(layout, form, *, one):
    """A column of images as `form` makes them of their numbers."""
    rows = [None if numbers is None else [form(number) for number in numbers] for numbers in layout]
    return {"image": [row and row[0] for row in rows]} if one else {"images": rows}


FORMS = {
    "PIL": lambda number: PICTURES[number],
    "bytes": lambda number: stored(PICTURES[number])[0]["bytes"],
    "paths": lambda number: f"{number}.png",
    "structs of bytes": lambda number: {"bytes": stored(PICTURES[number])[0]["bytes"], "path": "name.png"},
    "structs of a path": lambda number: {"bytes": None, "path": f"{number}.png"},
    "paths alone in a struct": lambda number: {"path": f"{number}.png"},
}
IMAGE, STRUCT, BINARY, LARGE = ImageFeature(), ImageFeature(decode=False), Value("binary"), Value("large_string")
# Form, feature of an image, the feature of a list of them.
TYPES = [
    ("PIL", None, None),
    ("PIL", IMAGE, List(IMAGE)),
    ("bytes", IMAGE, List(IMAGE)),
    ("bytes", STRUCT, List(STRUCT)),
    ("bytes", BINARY, List(BINARY)),
    ("bytes", Value("large_binary"), LargeList(Value("large_binary"))),
    ("paths", None, None),
    ("paths", IMAGE, List(IMAGE)),
    ("paths", LARGE, LargeList(LARGE)),
    ("structs of bytes", None, None),
    ("structs of bytes", STRUCT, List(STRUCT)),
    ("structs of a path", STRUCT, LargeList(STRUCT)),
    ("paths alone in a struct", None, None),
]


@pytest.mark.parametrize("one", [False, True], ids=["images", "image"])
@pytest.mark.parametrize(("form", "of_one", "of_list"), TYPES, ids=range(len(TYPES)))
def test_every_feature_becomes_one_column(files, form, of_one, of_list, one):
    layout, feature = (ONES, of_one) if one else (LISTS, of_list)
    name = "image" if one else "images"
    dataset = Dataset.from_dict(column(layout, FORMS[form], one=one), features=feature and Features({name: feature}))
    images = stored_images(dataset)
    assert images.features == Features({"images": STORED}) and len(images) == len(layout)
    assert all(map(same, images[:]["images"], layout))
    assert not any(image["path"] == "0.png" for row in images[:]["images"] for image in row or [])
    # Attached to tokens, and read by row and by slice of rows.
    tokens = Dataset.from_dict({"prompt_ids": [[row] for row in range(len(layout))]})
    both = concatenate_datasets([tokens, images], axis=1)
    assert same(both[len(layout) - 1]["images"], layout[-1]) and same(both.select([1, 0])[1]["images"], layout[0])


@pytest.mark.parametrize("length", [1, 2])
def test_lists_of_a_fixed_length(files, length):
    rows = [files[row : row + length] for row in range(3)]
    dataset = Dataset.from_dict({"images": rows}, features=Features({"images": List(Value("string"), length=length)}))
    assert all(map(same, stored_images(dataset)[:]["images"], [[*range(row, row + length)] for row in range(3)]))


@pytest.mark.parametrize("values", [[None, None], [[], []], [None, []]])
def test_no_row_has_an_image(values):
    assert [row or [] for row in stored_images(Dataset.from_dict({"images": values}))[:]["images"]] == [[], []]


def pixels_of(dataset):
    """The addresses of the buffers in which a dataset's bytes of images lie."""
    found = set()
    for chunk in dataset.data.column(dataset.column_names[0]).chunks:
        values = chunk.values if pa.types.is_list(chunk.type) else chunk
        found.add(values.field("bytes").buffers()[2].address)
    return found


@pytest.mark.parametrize("one", [False, True], ids=["images", "image"])
def test_stored_bytes_are_not_copied(tmp_path, one):
    layout = ONES if one else LISTS
    dataset = Dataset.from_dict(column(layout, FORMS["PIL"], one=one))
    assert pixels_of(stored_images(dataset)) == pixels_of(dataset)
    dataset.save_to_disk(tmp_path / "saved")
    saved = load_from_disk(str(tmp_path / "saved"))
    images = stored_images(saved)
    assert pixels_of(images) == pixels_of(saved) and all(map(same, images[:]["images"], layout))
    again = stored_images(images)
    assert pixels_of(again) == pixels_of(saved)


def test_a_mapped_column_is_sent_to_processes_as_its_file(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8))
    Dataset.from_dict({"images": [[noise]] * 4}).save_to_disk(tmp_path / "saved")
    images = stored_images(load_from_disk(str(tmp_path / "saved")))
    assert len(pickle.dumps(images)) < 10_000 < len(images[0]["images"][0]["bytes"])


@pytest.mark.parametrize("one", [False, True], ids=["images", "image"])
def test_rows_of_select_shuffle_and_slices(tmp_path, one):
    layout = ONES if one else LISTS
    Dataset.from_dict(column(layout, FORMS["PIL"], one=one)).save_to_disk(tmp_path / "saved")
    saved = load_from_disk(str(tmp_path / "saved"))
    before = sorted(os.listdir(tmp_path / "saved"))
    for rows in ([3, 0, 2], [1, 2, 3], [3]):
        images = stored_images(saved.select(rows))
        assert images._indices is None and images.features == Features({"images": STORED})
        assert all(map(same, images[:]["images"], [layout[row] for row in rows]))
    assert sorted(os.listdir(tmp_path / "saved")) == before, "nothing may be written into folders of data"
    twice = concatenate_datasets([saved, saved.select(range(1, 3))])
    assert all(map(same, stored_images(twice)[:]["images"], layout + layout[1:3]))


def test_fingerprints_differ_where_rows_do(tmp_path):
    dataset = Dataset.from_dict(column(LISTS, FORMS["PIL"], one=False))
    prints = {view._fingerprint for view in (dataset, stored_images(dataset), stored_images(dataset.select([0])))}
    assert len(prints) == 3
    assert stored_images(dataset)._fingerprint == stored_images(dataset)._fingerprint


def test_columns_that_hold_no_images():
    with pytest.raises(
        DataError, match=r"column 'images' holds no images: expected datasets' Image .* got Arrow's type"
    ):
        stored_images(Dataset.from_dict({"images": [[3]]}))
    with pytest.raises(DataError, match=r"column 'image' holds no images: .*double"):
        stored_images(Dataset.from_dict({"image": [0.5]}))
    with pytest.raises(DataError, match="expected a column 'images' or 'image', got prompt"):
        stored_images(Dataset.from_dict({"prompt": ["a"]}))
    with pytest.raises(BadRow, match="both 'images' and 'image' are there"):
        stored_images(Dataset.from_dict({"image": ["a"], "images": [["a"]]}))


# ---- of one row -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I;16"])
def test_a_picture_without_a_file_is_stored_without_loss(mode):
    colours = np.random.default_rng(0).integers(0, 256, (12, 20, 4), dtype=np.uint8)
    picture = Image.fromarray(colours)
    picture = picture.convert(mode) if mode in ("LA", "PA", "RGBA") else picture.convert("RGB").convert(mode)
    (image,) = stored(picture)
    assert image["path"] is None and image["bytes"].startswith(b"\x89PNG")
    np.testing.assert_array_equal(np.array(opened(image)), np.array(opened(picture)))


def test_turned_and_see_through_pictures_are_stored_as_they_are_seen(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    PICTURES[0].save(tmp_path / "turned.png", exif=exif, transparency=PICTURES[0].getpixel((0, 0)))
    with Image.open(tmp_path / "turned.png") as picture:
        picture.load()
        (image,) = stored(picture)
        assert image["bytes"]
        np.testing.assert_array_equal(np.array(opened(image)), np.array(opened(tmp_path / "turned.png")))
    assert opened(image).size == (9, 7)


def test_a_picture_is_stored_as_its_file_only_while_it_is_unread(files):
    picture = Image.open(files[0])
    assert stored(picture) == [{"bytes": None, "path": os.path.abspath(files[0])}]
    picture.thumbnail((3, 3))  # in place: no longer the file's pixels
    (image,) = stored(picture)
    assert image["path"] is None and opened(image).size == picture.size
    PICTURES[0].resize((64, 64)).save("big.jpg")
    with Image.open("big.jpg") as draft:
        draft.draft("L", (16, 16))
        (image,) = stored(draft)
        assert image["path"] is None and opened(image).size == (16, 16)


def test_values_of_a_row(files, tmp_path):
    data = (tmp_path / files[0]).read_bytes()
    here = {"bytes": None, "path": str(tmp_path / "0.png")}
    assert stored(None) == stored([]) == []
    assert stored("0.png") == stored(["0.png"]) == stored(("0.png",)) == stored({"path": "0.png"}) == [here]
    assert stored(tmp_path / "0.png") == [here]
    assert stored("0.png", "elsewhere") == [{"bytes": None, "path": str(tmp_path / "elsewhere" / "0.png")}]
    assert stored([data, bytearray(data)]) == [{"bytes": data, "path": None}] * 2
    assert stored({"bytes": data, "path": "n.png"}, "elsewhere") == [{"bytes": data, "path": "n.png"}]
    for bad, message in ((["0.png", None], "got NoneType"), (3, "got int"), ([[data]], "got list"), ("a://b", "a URL")):
        with pytest.raises(BadRow, match=message):
            stored(bad)


def test_with_folder_touches_relative_paths_without_bytes_only():
    struct = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    rows = [
        [{"bytes": None, "path": "a.png"}, {"bytes": b"x", "path": "b.png"}, {"bytes": None, "path": "/c.png"}],
        None,
        [None, {"bytes": None, "path": None}, {"bytes": None, "path": "https://d/e.png"}],
        [],
        [{"bytes": None, "path": "f/../g.png"}],
    ]
    want = [row and [image and dict(image) for image in row] for row in rows]
    want[0][0]["path"], want[4][0]["path"] = "/here/a.png", "/here/f/../g.png"
    for kind in (pa.list_(struct), pa.large_list(struct), pa.list_(pa.field("element", struct))):
        array = pa.array(rows, kind)
        for start in range(5):
            new = with_folder(array.slice(start), "/here")
            new.validate(full=True)
            assert new.type == kind and new.to_pylist() == want[start:]
        absolute = with_folder(array, "/here")
        assert with_folder(absolute, "/there") is absolute
    fixed = pa.array([["a", "/b"], None, ["c", None]], pa.list_(pa.string(), 2))
    for start in range(3):
        new = with_folder(fixed.slice(start), "/x")
        assert new.type == fixed.type and new.to_pylist() == [["/x/a", "/b"], None, ["/x/c", None]][start:]
    numbers = pa.array([[1], [2]])
    assert with_folder(numbers) is numbers


# ---- streams --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("one", [False, True], ids=["images", "image"])
@pytest.mark.parametrize("mapped", [False, True])
def test_images_of_a_stream_are_stored_without_loss(one, mapped):
    """datasets decodes those of a mapped stream, and would encode a JPEG anew."""
    name, files = ("image" if one else "images"), []
    for picture in PICTURES:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=60)
        files.append({"bytes": file.getvalue(), "path": None})
    layout = [[0], [1], None, [2]] if one else LISTS
    rows = column(layout, files.__getitem__, one=one)
    features = Features({name: ImageFeature() if one else List(ImageFeature())})
    stream = Dataset.from_dict(rows, features=features).to_iterable_dataset()
    stream = undecoded(stream.map(lambda row: row) if mapped else stream)
    assert (stream.features is None) == mapped
    found = stored_images(dataset_of(stream, stream.features))[:]["images"]
    for images, numbers in zip(found, layout, strict=True):
        wanted = [Image.open(io.BytesIO(files[number]["bytes"])) for number in numbers or []]
        seen = [opened(image) for image in images or []]
        assert len(seen) == len(wanted) and all(map(np.array_equal, map(np.array, seen), map(np.array, wanted)))
        if not mapped:
            assert [image["bytes"] for image in images or []] == [files[number]["bytes"] for number in numbers or []]


def test_a_picture_of_a_stream_that_cannot_be_read_is_named():
    file = io.BytesIO()
    PICTURES[0].resize((200, 200)).save(file, "JPEG")
    rows = [{"image": PICTURES[0]}, {"image": Image.open(io.BytesIO(file.getvalue()[:2000]))}]
    with pytest.raises(DataError, match=r"row 8 \(counted from 0\): an image is damaged"):
        dataset_of(rows, None, 7)
