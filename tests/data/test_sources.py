"""Sources beside JSON lines and Parquet files, and files that would hang, end or mislead their reader."""

import gzip
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

import dpofast.data.load as loading
from dpofast.data.files import Snapshot
from dpofast.data.load import DataError, load_preferences, tokenize_preferences
from tests.support.byte_tokenizer import make_tokenizer

ROW = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
TURNS = {
    "prompt": [{"role": "user", "content": "Sky?"}],
    "chosen": [{"role": "assistant", "content": "Blue."}],
    "rejected": [{"role": "assistant", "content": "Green."}],
}


@pytest.fixture
def load(tmp_path):
    def load(source, **options):
        dataset = load_preferences(source, cache_dir=str(tmp_path / "cache"), **options)
        return dataset

    return load


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def rows_of(dataset):
    return [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in dataset]


# ---- formats of files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pairs.csv", "pairs.tsv", "pairs.csv.gz"])
def test_csv(load, tmp_path, name):
    separator = "\t" if ".tsv" in name else ","
    fields = [["prompt", "chosen", "rejected", "note"], ['"a ""b"""', '" é\ny"', " n", "x"], ["q", " y", " n", ""]]
    content = ("\ufeff" + "\r\n".join(separator.join(row) for row in fields)).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    dataset = load(tmp_path / name)
    assert rows_of(dataset) == [
        {"prompt": 'a "b"', "chosen": " é\ny", "rejected": " n"},
        {"prompt": "q", "chosen": " y", "rejected": " n"},
    ]
    assert dataset["_line"] == [2, 4], "the first line of each row"


def test_csv_holds_lists_and_numbers_as_json(load, tmp_path):
    path = tmp_path / "pairs.csv"
    quoted = [json.dumps(TURNS[name]).replace('"', '""') for name in TURNS]
    path.write_text("prompt,chosen,rejected,ref_chosen_logps,ref_rejected_logps\n" + ",".join(f'"{q}"' for q in quoted))
    with pytest.raises(DataError, match="line 2: another number of fields than the header: expected 5, got 3"):
        load(path)
    path.write_text(path.read_text() + ",-1.5,-2\n")
    assert load(path).to_list() == [TURNS | {"ref_chosen_logps": -1.5, "ref_rejected_logps": -2.0, "_line": 2}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"prompt,chosen,rejected,chosen\na,b,c,d\n", "column 'chosen' stands there twice"),
        (b'prompt,chosen,rejected\na,"b,c\n', "not valid CSV"),
        (b"prompt,chosen,rejected\na,\xff,c\n", "line 2: not UTF-8: column 'chosen'"),
        ("prompt,chosen,rejected\na,b,c\n".encode("utf-16"), "pairs.csv: its header is not UTF-8: save the file"),
        (b"prompt,chosen\na,b\n", "line 2: column 'rejected' is missing"),
        (b"prompt,chosen,rejected\n", "there are no rows"),
        (b"", "there are no rows"),
    ],
)
def test_bad_csv(load, tmp_path, content, message):
    (tmp_path / "pairs.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load(tmp_path / "pairs.csv")


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["pairs.json", "pairs.json.gz"])
def test_json_array(load, tmp_path, indent, name):
    rows = [ROW, ROW | {"chosen": ' "]}, ['}, ROW | {"prompt": "é"}]
    content = json.dumps(rows, indent=indent).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    dataset = load(tmp_path / name)
    assert rows_of(dataset) == rows and "_line" not in dataset.column_names


def test_bad_json_array(load, tmp_path):
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([ROW, 3, ROW | {"chosen": None}, ROW]))
    with pytest.raises(DataError, match=r"2 of 4 rows .*\n  row 1 \(counted from 0\): not a JSON object.*\n  row 2"):
        load(path)
    assert rows_of(load(path, on_bad_row="skip"))[3] == ROW
    path.write_text(json.dumps([ROW, ROW])[:-1])
    with pytest.raises(DataError, match="not valid JSON: the array ends before its ]"):
        load(path)
    path.write_text(json.dumps([ROW]) + " [1]")
    with pytest.raises(DataError, match="text follows the array's ]"):
        load(path)


def test_damaged_gzip(load, tmp_path):
    path = tmp_path / "pairs.jsonl.gz"
    whole = gzip.compress(lines(*[ROW] * 50).encode())
    path.write_bytes(whole)
    assert len(load(path)) == 50
    for content in (whole[:-20], whole[:30] + bytes(20) + whole[50:], b"no gzip at all"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"pairs\.jsonl\.gz: not a whole gzip file"):
            load(path)


def test_folder_of_files(load, tmp_path):
    folder = tmp_path / "pairs"
    folder.mkdir()
    for part in range(2):
        rows = [ROW | {"prompt": f"{part}-{i}"} for i in range(3)]
        (folder / f"part-{part}.jsonl").write_text(lines(*rows))
    (folder / "README.md").write_text("about")
    (folder / "dataset_infos.json").write_text("{}")
    dataset = load(folder)
    assert dataset["prompt"] == ["0-0", "0-1", "0-2", "1-0", "1-1", "1-2"]
    (folder / "part-1.jsonl").write_text(lines(ROW, ROW | {"chosen": ""}))
    with pytest.raises(
        DataError, match=r"row 4 \(counted from 0\), part-1.jsonl, line 2: the chosen response is empty"
    ):
        tokenize_preferences(load(folder), make_tokenizer())
    (folder / "part-2.csv").write_text("prompt,chosen,rejected\n")
    with pytest.raises(DataError, match=r"expected data files of one kind, got .csv, .jsonl"):
        load(folder)


def test_folder_of_splits(load, tmp_path):
    """A folder as the hub has it: held-out pairs are not trained on."""
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        Dataset.from_list([ROW | {"prompt": name}]).to_parquet(tmp_path / "pairs" / f"{name}.parquet")
    assert load(tmp_path / "pairs")["prompt"] == ["train-00000-of-00002", "train-00001-of-00002"]
    assert load(tmp_path / "pairs", split="test")["prompt"] == ["test-00000-of-00001"]
    with pytest.raises(DataError, match="no split 'validation'; its files are 'test', 'train'"):
        load(tmp_path / "pairs", split="validation")


def test_hub_config(load, monkeypatch):
    asked = []

    def load_dataset(path, *, split, cache_dir, **options):
        asked.append((path, split, options))
        return Dataset.from_list([ROW])

    monkeypatch.setattr(loading.datasets, "load_dataset", load_dataset)
    load("someone/pairs:en")
    load("someone/pairs")
    assert asked == [("someone/pairs", "train", {"name": "en"}), ("someone/pairs", "train", {})]


def test_mistyped_path_is_not_looked_for_on_the_hub(load, tmp_path, monkeypatch):
    monkeypatch.setattr(loading.datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "pairs").mkdir(parents=True)
    with pytest.raises(DataError, match="^data/pair: no such file or folder; did you mean data/pairs"):
        load("data/pair")


# ---- what would hang, end or mislead the process --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.parquet", "pairs.csv.gz"])
def test_pipes_and_devices_are_refused(load, tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match="expected a regular file, got a pipe, a device or a socket"):
        load(tmp_path / name)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(DataError, match="expected a regular file"):
        load(tmp_path / name)


def test_arrow_offsets_outside_their_buffer(load, tmp_path):
    rows = [{"prompt": "3 4 ", "chosen": f"5 {i % 90 + 3}", "rejected": "7"} for i in range(200)]
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    content = bytearray(file.read_bytes())
    at = content.index(np.arange(0, 16, 4, dtype=np.int32).tobytes())  # offsets of "prompt"
    content[at + 400 : at + 408] = np.array([2**30, 2**30 + 50], np.int32).tobytes()
    file.write_bytes(content)
    with pytest.raises(DataError, match="saved: damaged Arrow data in rows 0 to 199"):
        load(tmp_path / "saved")
    with pytest.raises(DataError, match="damaged Arrow data"):
        tokenize_preferences(Dataset.load_from_disk(tmp_path / "saved"), make_tokenizer())


@pytest.mark.parametrize("name", ["state.json", "dataset_info.json"])
@pytest.mark.parametrize("content", ["[1]", "3", '{"_data_files": 3}', "null", '{"features": []}'])
def test_saved_dataset_with_json_of_another_shape(load, tmp_path, name, content):
    Dataset.from_list([ROW]).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / name).write_text(content)
    try:
        assert rows_of(load(tmp_path / "saved")) == [ROW]  # where datasets does without it
    except DataError as error:
        assert "saved" in str(error)


def test_text_of_parquet_that_is_not_utf8(load, tmp_path):
    broken = pa.StringArray.from_buffers(2, pa.py_buffer(np.array([0, 1, 2], np.int32)), pa.py_buffer(b"a\xff"))
    table = pa.table({"prompt": ["p", "p"], "chosen": broken, "rejected": ["b", "b"]})
    pq.write_table(table, tmp_path / "pairs.parquet")
    with pytest.raises(DataError, match=r"pairs\.parquet: damaged Arrow data in rows 0 to 1: .*UTF8"):
        load(tmp_path / "pairs.parquet")


def test_two_columns_of_one_name(load, tmp_path):
    columns = [pa.array([text]) for text in ("3", "4", "5", "6")]
    table = pa.Table.from_arrays(columns, names=["prompt", "chosen", "rejected", "chosen"])
    pq.write_table(table, tmp_path / "pairs.parquet")
    with pytest.raises(DataError, match=r"pairs\.parquet: column 'chosen' stands there twice: only one can hold"):
        load(tmp_path / "pairs.parquet")


DEEP = "[" * 70 + "]" * 70
BAD = {
    "not valid JSON: 'chosen' stands twice in one object": '{"chosen": "a", "chosen": "b", "rejected": "c"}',
    "not valid JSON: the number '1e999' is beyond float64": '{"chosen": "a", "rejected": "b", "weight": 1e999}',
    "not valid JSON: nested deeper than 64 levels": '{"chosen": "a", "rejected": "b", "x": ' + DEEP + "}",
    "column 'tools' is not valid JSON: nested deeper": json.dumps(TURNS | {"tools": DEEP}),
    "column 'tools' is not valid JSON: maximum recursion": json.dumps(TURNS | {"tools": "[" * 5000 + "]" * 5000}),
    "column 'tools' holds a number that is not finite": json.dumps(TURNS | {"tools": [{"most": float("inf")}]}),
}


@pytest.mark.parametrize(("message", "line"), BAD.items(), ids=range(len(BAD)))
@pytest.mark.parametrize("first", [True, False])
def test_bad_line(load, tmp_path, message, line, first):
    good = json.dumps(TURNS)
    (tmp_path / "pairs.jsonl").write_text("\n".join([line, good] if first else [good, line]))
    with pytest.raises(DataError, match=f"line {1 if first else 2}: {message}"):
        load(tmp_path / "pairs.jsonl")
    skipped = load(tmp_path / "pairs.jsonl", on_bad_row="skip")
    assert sorted(bool(error) for error in skipped["_error"]) == [False, True]


def test_numbers_beyond_int64_in_conversations(load, tmp_path):
    row = TURNS | {"tools": [{"most": 10**400}]}
    (tmp_path / "pairs.jsonl").write_text(lines(row, TURNS))
    template = "{% if tools %}{{ tools[0].most }}{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
    try:
        tokens, _ = tokenize_preferences(load(tmp_path / "pairs.jsonl"), make_tokenizer(chat_template=template))
    except DataError as error:
        assert "line 1" in str(error) or "cannot be stored" in str(error)
    else:
        assert len(tokens) == 2


def test_all_bad_rows_are_counted_and_five_shown(load, tmp_path):
    (tmp_path / "pairs.jsonl").write_text(lines(ROW) + "{\n" * 7 + lines(ROW))
    with pytest.raises(DataError) as caught:
        load(tmp_path / "pairs.jsonl")
    first, *shown, more = str(caught.value).split("\n")
    assert "7 of 9 rows cannot be used" in first and more == "  and 2 more"
    assert shown == [f"  line {i}: not valid JSON: the line ends before its object does" for i in range(2, 7)]
    rows = [ROW | {"chosen": ""}] * 6 + [ROW]
    with pytest.raises(DataError, match=r"6 of 7 rows cannot be used[\s\S]*row 4 [\s\S]*and 1 more$"):
        tokenize_preferences(Dataset.from_list(rows), make_tokenizer())


def test_control_characters_of_data_are_escaped(load, tmp_path):
    path = tmp_path / "a\x1b]0;name\x07.jsonl"
    path.write_text('{"\\u001b[2J\\u202e": 1}\n')
    with pytest.raises(DataError, match=r"a\\x1b\]0;name\\x07\.jsonl, line 1: .*found \\x1b\[2J\\u202e") as caught:
        load(path)
    assert str(caught.value).isprintable()


# ---- the user's own folders -----------------------------------------------------------------------------------------


def test_tokens_are_not_written_into_a_saved_dataset(tmp_path, monkeypatch):
    monkeypatch.setattr(loading.datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    Dataset.from_list([ROW, ROW | {"chosen": ""}]).save_to_disk(tmp_path / "saved")
    before = sorted(path.name for path in (tmp_path / "saved").iterdir())
    for read in (load_preferences, Dataset.load_from_disk):
        tokens, _ = tokenize_preferences(read(tmp_path / "saved"), make_tokenizer(), on_bad_row="skip")
        again, _ = tokenize_preferences(read(tmp_path / "saved"), make_tokenizer(), on_bad_row="skip")
        assert tokens.cache_files == again.cache_files, "made once"
        assert all(str(tmp_path / "cache") in file["filename"] for file in tokens.cache_files)
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == before


# ---- files that change while they are read --------------------------------------------------------------------------


def test_a_file_that_changes_while_it_is_loaded(load, tmp_path, monkeypatch):
    path, other = tmp_path / "pairs.jsonl", tmp_path / "other"
    path.write_text(lines(*[ROW] * 3))
    read = loading.read_rows.read_rows

    def exchanged(source):
        for number, row in read(source):
            yield number, row
            if number == 2:
                other.write_text(lines(*[ROW | {"chosen": "x"}] * 3))
                os.replace(other, path)

    monkeypatch.setattr(loading.read_rows, "read_rows", exchanged)
    with pytest.raises(DataError, match=r"pairs\.jsonl: changed while it was read"):
        load(path)
    monkeypatch.setattr(loading.read_rows, "read_rows", read)
    assert load(path)["chosen"] == ["x"] * 3, "nothing of the old file was kept"


def test_a_saved_dataset_that_is_exchanged_while_it_is_loaded(load, tmp_path, monkeypatch):
    for name in ("saved", "other"):
        Dataset.from_list([ROW | {"chosen": name}]).save_to_disk(tmp_path / name)
    (mine,), (other,) = ((tmp_path / name).glob("*.arrow") for name in ("saved", "other"))
    read, calls = loading.datasets.load_from_disk, []

    def exchanged(path):
        calls.append(path)
        if len(calls) == 2:
            os.replace(other, mine)
        return read(path)

    monkeypatch.setattr(loading.datasets, "load_from_disk", exchanged)
    with pytest.raises(DataError, match="changed while it was read"):
        load(tmp_path / "saved")
    assert load(tmp_path / "saved")["chosen"] == ["other"]


def test_snapshot(tmp_path):
    path = tmp_path / "file"
    path.write_text("one")
    snapshot = Snapshot.of([path])
    snapshot.check()
    stamp = path.stat()
    path.write_text("two")
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # not even size and time tell
    with pytest.raises(DataError, match="changed while it was read"):
        snapshot.check()
    path.unlink()
    with pytest.raises(DataError, match="changed while it was read"):
        snapshot.check()


def test_links_and_pipes_in_saved_folders(load, tmp_path):
    (tmp_path / "pairs.jsonl").symlink_to(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"pairs\.jsonl: no such file; it is a link to one that is missing"):
        load(tmp_path / "pairs.jsonl")
    Dataset.from_list([ROW]).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "dataset_info.json").unlink()
    os.mkfifo(tmp_path / "saved" / "dataset_info.json")
    with pytest.raises(DataError, match=r"dataset_info\.json: expected a regular file"):
        load(tmp_path / "saved")
