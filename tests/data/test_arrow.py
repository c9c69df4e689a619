"""Mapped pages are released, and their contents stay readable."""

import mmap

import numpy as np
import pytest
from datasets import Dataset

from dpofast.data import arrow as mapped
from dpofast.data.arrow import chunk_bounds, mapped_files, read_chunks, release_pages
from dpofast.data.formats import DataError
from tests.support.resident import resident

ROWS = 10_000


@pytest.fixture
def dataset(tmp_path):
    """40 MB of token ids in an Arrow file."""
    tokens = np.arange(ROWS * 1000, dtype=np.int32).reshape(ROWS, 1000)
    Dataset.from_dict({"ids": list(tokens), "other": list(range(ROWS))}).save_to_disk(tmp_path / "saved")
    (tmp_path / "link").symlink_to("saved")  # the kernel knows the file by its real name
    return Dataset.load_from_disk(tmp_path / "link")


def test_chunk_bounds():
    assert chunk_bounds(7, 3) == [(0, 3), (3, 6), (6, 7)]
    assert chunk_bounds(0, 3) == []


def test_released_pages_do_not_count_and_come_back(dataset):
    (path,) = mapped_files(dataset)
    table = dataset.with_format("arrow")[:]
    first = table.column("ids").combine_chunks().values.to_numpy()
    expected = np.arange(ROWS * 1000, dtype=np.int32)
    assert np.array_equal(first, expected)
    assert resident(path) > 35_000_000
    release_pages([path])
    assert resident(path) < 5_000_000
    assert np.array_equal(first, expected)


@pytest.mark.slow(5)
def test_windows_read_everything_and_leave_little_mapped(dataset):
    (path,) = mapped_files(dataset)
    parts, most = [], 0
    for table in read_chunks(dataset, ["ids"], chunk_bounds(ROWS, 64)):
        assert table.column_names == ["ids"]
        parts.append(table.column("ids").combine_chunks().flatten().to_numpy().copy())
        most = max(most, resident(path))
    assert np.array_equal(np.concatenate(parts), np.arange(ROWS * 1000))
    assert most < 10_000_000
    assert [len(table) for table in read_chunks(dataset, ["other"], [(3, 5), (990, 1000)])] == [2, 10]


@pytest.mark.parametrize("size", [1, 100, 5000])
def test_rows_that_are_scattered_over_the_file_are_copied_and_leave_little_mapped(dataset, size):
    (path,) = mapped_files(dataset)
    order, most = np.random.default_rng(0).permutation(ROWS), []
    tables = []
    for table in read_chunks(dataset.select(order), ["ids", "other"], [(0, 2000), *chunk_bounds(1000, size)]):
        most.append(resident(path))
        tables.append(table)
    assert max(most) < 20_000_000
    whole, *parts = tables
    assert whole.column("other").to_pylist() == order[:2000].tolist()
    assert [row for part in parts for row in part.column("other").to_pylist()] == order[:1000].tolist()
    starts = [part.column("ids")[0][0].as_py() for part in parts]
    assert starts == [1000 * order[start] for start, _ in chunk_bounds(1000, size)]


def test_what_was_written_is_never_dropped(tmp_path):
    """A private mapping that holds the only copy of its changes stays as it is."""
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 16))
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as private:
        private[:4] = b"mine"
        release_pages([str(path)])
        assert private[:4] == b"mine"


def test_nothing_to_release(dataset, monkeypatch):
    assert mapped_files(Dataset.from_dict({"a": [1]})) == ()
    release_pages([])
    release_pages(["/no/such/file"])
    monkeypatch.setattr(mapped, "_LIBC", None)
    release_pages(mapped_files(dataset))


def test_a_transform_is_not_passed_by(dataset):
    with pytest.raises(DataError, match="expected a dataset of stored rows, got one with a transform"):
        next(read_chunks(dataset.with_transform(lambda batch: batch), ["ids"], [(0, 1)]))
