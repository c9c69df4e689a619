"""Score files: rows are joined with their own scores only, and what JSON has no number for is null."""

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from dpofast.data.load import DataError, load_preferences
from dpofast.scoring.score_file import PartialScores, check_output, source_rows, source_snapshot, write_scored

ROWS = [{"id": i, "prompt": f"{i}", "chosen": "y", "rejected": "n", "margins": 9.0} for i in range(4)]
SCORES = {"chosen_logps": -1.0, "rejected_logps": -2.0, "margins": 0.5}


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def write(tmp_path):
    def write(source, numbers, *, before=lambda: None, split="train", output="scored.jsonl", read="utf-8"):
        """Score the rows with these numbers; `before` runs between loading and writing. Returns the lines written."""
        snapshot = source_snapshot(str(source), split)
        dataset = load_preferences(source, split=split, cache_dir=str(tmp_path / "cache"), on_bad_row="skip")
        partial = PartialScores(tmp_path / "scored.partial", {})
        partial.resume(overwrite=True)
        partial.append({"row": number, **SCORES, "chosen_tokens": number} for number in numbers)
        before()
        write_scored(tmp_path / output, source_rows(str(source), dataset, snapshot), partial)
        return [json.loads(line) for line in (tmp_path / output).read_text(read).splitlines()] if read else None

    return write


def joined(rows, numbers):
    return [{**row, **SCORES, "chosen_tokens": number} for row, number in zip(rows, numbers, strict=True)]


def test_lines_and_rows_are_numbered_as_in_the_dataset(write, tmp_path):
    (tmp_path / "pairs.jsonl").write_text("\n" + lines(ROWS[:2]) + "{\n\n" + lines(ROWS[2:]))
    assert write(tmp_path / "pairs.jsonl", [2, 3, 6, 7]) == joined(ROWS, [2, 3, 6, 7])
    (tmp_path / "pairs.json").write_text(json.dumps([ROWS[0], 3, *ROWS[1:]]))
    assert write(tmp_path / "pairs.json", [0, 2, 3, 4]) == joined(ROWS, [0, 2, 3, 4])
    (tmp_path / "pairs.csv").write_text("id,prompt,chosen,rejected\nA,1,y,n\nB,2,y\nC,3,y,n\n")
    assert [row["id"] for row in write(tmp_path / "pairs.csv", [2, 4])] == ["A", "C"]


def test_pairs_that_were_scored_in_another_order_are_written_in_that_of_the_data(write, tmp_path):
    (tmp_path / "pairs.jsonl").write_text(lines(ROWS))
    assert write(tmp_path / "pairs.jsonl", [3, 1, 4, 2]) == joined(ROWS, [1, 2, 3, 4])


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_folders_are_numbered_through(write, tmp_path, kind):
    (tmp_path / "folder").mkdir()
    for part in range(2):
        file, rows = tmp_path / "folder" / f"{part}.{kind}", ROWS[2 * part : 2 * part + 2]
        file.write_text(lines(rows)) if kind == "jsonl" else pq.write_table(pa.Table.from_pylist(rows), file)
    assert write(tmp_path / "folder", [0, 1, 3]) == joined([ROWS[0], ROWS[1], ROWS[3]], [0, 1, 3])


def exchange(path, content):
    path.with_name("new").write_bytes(content)
    os.replace(path.with_name("new"), path)


def rewrite(path, content):
    """In place, with the old time."""
    stamp = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))


@pytest.mark.parametrize("change", [exchange, rewrite])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_data_that_changes_is_never_joined(write, tmp_path, change, kind):
    path = tmp_path / f"pairs.{kind}"
    path.write_text(lines(ROWS)) if kind == "jsonl" else pq.write_table(pa.Table.from_pylist(ROWS), path)
    new = path.read_bytes()
    if kind == "jsonl":
        new = lines([{**row, "chosen": "n", "rejected": "y"} for row in ROWS]).encode()
    elif change is rewrite:
        new = new[:-1] + bytes([new[-1] ^ 1])
    numbers = range(1, 5) if kind == "jsonl" else range(4)
    with pytest.raises(DataError, match=rf"pairs\.{kind}: changed while it was read"):
        write(path, numbers, before=lambda: change(path, new))
    assert not (tmp_path / "scored.jsonl").exists() and (tmp_path / "scored.partial").exists()
    assert not list(tmp_path.glob(".scored*"))


def test_scores_without_a_row_are_an_error(write, tmp_path):
    (tmp_path / "pairs.jsonl").write_text(lines(ROWS))
    with pytest.raises(ValueError, match="has scores of row 9, which the data has not"):
        write(tmp_path / "pairs.jsonl", [1, 2, 9])
    assert not (tmp_path / "scored.jsonl").exists()


def test_numbers_that_json_does_not_have_are_null(write, tmp_path):
    rows = [{**row, "weight": [1.5, float("nan")], "most": float("-inf")} for row in ROWS]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    write(tmp_path / "pairs.parquet", range(4))
    text = (tmp_path / "scored.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert all(json.loads(line)["weight"] == [1.5, None] for line in text.splitlines())


# ---- images ---------------------------------------------------------------------------------------------------------

WITH_PATHS = [{**ROWS[0], "images": ["a.png", "b.png"]}, {**ROWS[1], "images": []}, {**ROWS[2], "images": None}]
ENCODED = [
    {**ROWS[0], "images": [{"bytes": b"\x89PNG\xff", "path": "a.png"}, {"bytes": b"\x00", "path": None}]},
    {**ROWS[1], "images": []},
]


def source_of(path, dataset):
    return source_rows(str(path), dataset, source_snapshot(str(path), "train"))


@pytest.mark.parametrize("output", ["scored.jsonl", "scored.parquet"])
def test_paths_of_images_are_written_as_they_are_given(write, tmp_path, output):
    (tmp_path / "pairs.jsonl").write_text(lines(WITH_PATHS))
    check_output(tmp_path / output, source_of(tmp_path / "pairs.jsonl", None))
    if output.endswith(".jsonl"):
        assert write(tmp_path / "pairs.jsonl", [1, 2, 3]) == joined(WITH_PATHS, [1, 2, 3])
    else:
        write(tmp_path / "pairs.jsonl", [1, 2, 3], output=output, read=None)
        assert pq.read_table(tmp_path / output)["images"].to_pylist() == [row["images"] for row in WITH_PATHS]


@pytest.mark.parametrize("saved", [False, True])
def test_encoded_images_stay_in_parquet_and_are_refused_for_json(write, tmp_path, saved):
    path = tmp_path / ("saved" if saved else "pairs.parquet")
    table = pa.Table.from_pylist(ENCODED)
    Dataset(table).save_to_disk(path) if saved else pq.write_table(table, path)
    source = source_of(path, Dataset(table))
    check_output(tmp_path / "scored.parquet", source)
    message = "output: column 'images' holds bytes, such as encoded images, which JSON has no form for: name a file"
    with pytest.raises(ValueError, match=message):
        check_output(tmp_path / "scored.jsonl", source)
    with pytest.raises(ValueError, match="output: a row holds bytes"):  # whoever did not check
        write(path, [0, 1])
    assert (tmp_path / "scored.partial").exists() and not (tmp_path / "scored.jsonl").exists()
    write(path, [0, 1], output="scored.parquet", read=None)
    written = pq.read_table(tmp_path / "scored.parquet").to_pylist()
    assert [row["images"] for row in written] == [row["images"] for row in ENCODED]
    assert [row["margins"] for row in written] == [0.5, 0.5]


@pytest.mark.parametrize(
    "values, refused",
    [
        ([{"bytes": None, "path": "a.png"}, None], False),
        ([{"bytes": None, "path": "a.png"}, {"bytes": b"x", "path": None}], True),
        ([None, b"x"], True),
        ([b"x", b"y"], True),
    ],
)
def test_bytes_alone_are_refused(write, tmp_path, values, refused):
    """Of a column of the type of bytes that holds none, what is there is written."""
    path, output = tmp_path / "folder", tmp_path / "scored.jsonl"
    path.mkdir()
    kind = pa.binary() if b"x" in values else pa.struct({"bytes": pa.binary(), "path": pa.string()})
    for number, value in enumerate(values):
        table = pa.Table.from_pylist([ROWS[number]]).append_column("image", pa.array([value], kind))
        pq.write_table(table, path / f"{number}.parquet")
    if refused:
        with pytest.raises(ValueError, match="column 'image' holds bytes"):
            check_output(output, source_of(path, None))
    else:
        check_output(output, source_of(path, None))
        assert [row["image"] for row in write(path, [0, 1])] == values
