"""Loading: every source, every documented error with its file and line, and a cache that is never stale."""

import codecs
import json
import os

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from dpofast.data.load import DataError, load_preferences, tokenize_preferences

ROW = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
LINE = json.dumps(ROW).encode() + b"\n"
IDS = {"prompt_ids": [1], "chosen_ids": [2, 3], "rejected_ids": [4]}
TURNS = {
    "prompt": [{"role": "user", "content": "Sky?"}],
    "chosen": [{"role": "assistant", "content": "Blue.", "reasoning": "I looked."}],
    "rejected": [{"role": "assistant", "content": "Green."}],
}


@pytest.fixture
def load(tmp_path):
    return lambda source, **options: load_preferences(source, cache_dir=str(tmp_path / "cache"), **options)


@pytest.fixture
def write(tmp_path):
    def write(content, name="pairs.jsonl"):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    return write


def lines(*rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.json"])
def test_jsonl(load, write, name):
    rows = [ROW, {"prompt": "Größe 😀\u2028", "chosen": "日本\n", "rejected": "\u0000", "other": 3}]
    dataset = load(write(lines(*rows), name))
    assert dataset.to_list() == [ROW | {"_line": 1}, {k: rows[1][k] for k in ROW} | {"_line": 2}]
    assert dataset.cache_files, "the rows must be mapped from disk"


@pytest.mark.parametrize(
    "content",
    [
        codecs.BOM_UTF8 + LINE + LINE,
        LINE.replace(b"\n", b"\r\n") * 2,
        LINE + LINE.rstrip(),
        LINE + LINE + b"\n \n\r\n",
    ],
    ids=["bom", "crlf", "no final newline", "blank trailing lines"],
)
def test_jsonl_spellings(load, write, content):
    assert load(write(content)).to_list() == [ROW | {"_line": 1}, ROW | {"_line": 2}]


def test_blank_lines_count_as_lines(load, write):
    assert load(write(b"\n" + LINE + b"\n\n" + LINE))["_line"] == [2, 5]


def test_jsonl_conversations_keep_what_stood_in_the_file(load, write):
    tool = {"type": "function", "function": {"name": "look", "minimum": 1.5e-12}}
    rows = [
        TURNS,
        TURNS | {"tools": [tool], "chat_template_kwargs": {"deep": True}},
        TURNS | {"tools": json.dumps([tool])},
    ]
    dataset = load(write(lines(*rows)))
    assert [{k: row[k] for k in TURNS} for row in dataset] == [TURNS] * 3
    assert dataset["tools"] == [None, [tool], [tool]]
    assert dataset["chat_template_kwargs"] == [None, {"deep": True}, None]
    assert "tools" not in load(write(lines(TURNS))).column_names


def test_jsonl_token_ids(load, write):
    row = IDS | {"ref_chosen_logps": -1.25, "ref_rejected_logps": -3}
    assert load(write(lines(row))).to_list() == [row | {"_line": 1}]


BAD_LINES = {
    "not UTF-8: byte 4 of the line is 0xff": b'{"a\xff":1}',
    "not valid JSON: the line ends before its object does": LINE[:-3],
    "not valid JSON: the line ends before": LINE.rstrip()[:-1],
    "not valid JSON: Expecting value at character 12": b'{"prompt": ?}',
    "not valid JSON: .*recursion": b'{"a": ' + b"[" * 200_000,
    "not valid JSON: .*digits": b'{"prompt": ' + b"1" * 5000 + b"}",
    "not a JSON object: expected one object a line, got an array; `jq": b"[" + LINE.strip() + b"]",
    "not a JSON object: expected one object a line, got an array; `jq -c": b"[",
    "not a JSON object: expected one object a line, got int": b"3",
    "column 'chosen_ids' is not a list of token ids": lines(
        {"prompt_ids": [1], "chosen_ids": [True, 2], "rejected_ids": [3]}
    ),
    "half of a surrogate pair": b'{"prompt": "a", "chosen": "\\ud83d", "rejected": "b"}',
    "column 'rejected' is missing: .*found chosen, prompt": b'{"prompt": "a", "chosen": "b"}',
    "column 'chosen' is missing": b'{"prompt": "a", "chosen": null, "rejected": "b"}',
    "column 'prompt' differs from the first row's: expected text, got no": b'{"chosen": "a", "rejected": "b"}',
    "column 'chosen' is neither text nor a conversation: .*got int 3": b'{"prompt": "a", "chosen": 3, "rejected": "b"}',
    "text and conversations are mixed": b'{"prompt": "a", "chosen": "b", "rejected": [{"role": "x", "content": "c"}]}',
    "column 'chosen' differs from the first row's: expected text, got messages": lines(TURNS | {"prompt": "a"}),
    "column 'ref_chosen_logps' differs": lines(ROW | {"ref_chosen_logps": -1, "ref_rejected_logps": -2}),
    "videos are not supported: remove column 'video', or take frames": lines(ROW | {"video": "x.mp4"}),
}


@pytest.mark.parametrize(("message", "line"), BAD_LINES.items(), ids=range(len(BAD_LINES)))
def test_bad_line(load, write, tmp_path, message, line):
    path = write(LINE + b"\n" + line.rstrip(b"\n") + b"\n" + LINE)
    with pytest.raises(DataError, match=rf"pairs\.jsonl, line 3: {message}") as caught:
        load(path)
    assert "\n" not in str(caught.value) and caught.value.__suppress_context__
    left = [name for _, folders, files in os.walk(tmp_path / "cache") for name in (*folders, *files)]
    assert not [name for name in left if name.endswith((".arrow", ".incomplete"))], "nothing half-written may stay"
    skipped = load(path, on_bad_row="skip")
    assert skipped["_line"] == [1, 3, 4]
    assert [bool(error) for error in skipped["_error"]] == [False, True, False]
    assert skipped[1]["chosen"] is None


def test_bad_first_line(load, write):
    with pytest.raises(
        DataError, match=r"line 1: column 'chosen' is missing: expected chosen and rejected .*found text"
    ):
        load(write(b'{"text": "a"}\n' + LINE))
    assert load(write(b'{"text": "a"}\n' + LINE), on_bad_row="skip")["chosen"] == [None, " blue."]


@pytest.mark.parametrize("content", [b"", b"\n\r\n  \n", codecs.BOM_UTF8])
def test_empty_file(load, write, content):
    with pytest.raises(DataError, match=r"pairs\.jsonl: there are no rows"):
        load(write(content))


def test_no_usable_line(load, write):
    reasons = r"pairs\.jsonl: no row can be used\n.*0 of 2 pairs kept\n  skipped 2: not a JSON object"
    with pytest.raises(DataError, match=reasons):
        load(write(b"1\n2\n"), on_bad_row="skip")


def test_changed_file_is_read_again(load, write):
    path = write(LINE)
    assert load(path)["chosen"] == [" blue."]
    replace_unnoticed(path, LINE.replace(b"blue", b"grey"))
    assert load(path)["chosen"] == [" grey."]


def test_same_file_is_read_once(load, write):
    first, second = load(write(LINE)), load(write(LINE, "copy.jsonl"))
    assert first.cache_files == second.cache_files


def test_parquet(load, tmp_path):
    path = tmp_path / "pairs[1].parquet"
    Dataset.from_list([ROW] * 3).to_parquet(path)
    dataset = load(path)
    assert dataset.to_list() == [ROW] * 3 and dataset.cache_files
    Dataset.from_list([ROW | {"chosen": "x"}]).to_parquet(path)
    assert load(path)["chosen"] == ["x"]


def replace_unnoticed(path, content):
    """Not even size and time tell old and new apart."""
    stamp = path.stat()
    assert len(content) == stamp.st_size
    path.write_bytes(content)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))


def test_changed_parquet_is_read_again(load, tmp_path):
    path, other = tmp_path / "pairs.parquet", tmp_path / "other.parquet"
    Dataset.from_list([IDS]).to_parquet(path)
    Dataset.from_list([IDS | {"chosen_ids": [7, 3]}]).to_parquet(other)
    first = load(path)
    assert tokenize_preferences(first, None)[0]["chosen_ids"] == [[2, 3]]
    assert load(path).cache_files == first.cache_files, "read once"
    replace_unnoticed(path, other.read_bytes())
    assert tokenize_preferences(load(path), None)[0]["chosen_ids"] == [[7, 3]]


def test_changed_saved_dataset_is_tokenized_again(load, tmp_path):
    Dataset.from_list([IDS]).save_to_disk(tmp_path / "one")
    Dataset.from_list([IDS | {"chosen_ids": [7, 3]}]).save_to_disk(tmp_path / "two")
    assert tokenize_preferences(load(tmp_path / "one"), None)[0]["chosen_ids"] == [[2, 3]]
    (mine,), (other,) = ((tmp_path / name).glob("data-*.arrow") for name in ("one", "two"))
    replace_unnoticed(mine, other.read_bytes())
    assert tokenize_preferences(load(tmp_path / "one"), None)[0]["chosen_ids"] == [[7, 3]]


def test_bad_parquet(load, write, tmp_path):
    with pytest.raises(DataError, match=r"bad\.parquet: not a readable Parquet file"):
        load(write(b"PAR1, but not really", "bad.parquet"))
    table = pa.table({"prompt": ["a"], "chosen": ["b"]})
    pq.write_table(table, tmp_path / "short.parquet")
    with pytest.raises(DataError, match=r"short\.parquet: column 'rejected' is missing: .*found chosen, prompt"):
        load(tmp_path / "short.parquet")
    pq.write_table(table.slice(0, 0), tmp_path / "empty.parquet")
    with pytest.raises(DataError, match=r"empty\.parquet: there are no rows"):
        load(tmp_path / "empty.parquet")


def test_parquet_with_a_broken_page(load, tmp_path):
    path = tmp_path / "pairs.parquet"
    Dataset.from_list([ROW] * 3).to_parquet(path)
    content = bytearray(path.read_bytes())
    content[4:40] = bytes(36)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"pairs\.parquet: not a readable Parquet file"):
        load(path)
    assert not [file for file in (tmp_path / "cache").rglob("*") if file.is_file()], "nothing half-written may stay"


def test_saved_datasets(load, tmp_path):
    Dataset.from_list([ROW]).save_to_disk(tmp_path / "one")
    assert load(tmp_path / "one").to_list() == [ROW]
    other = Dataset.from_list([ROW] * 2)
    DatasetDict(train=Dataset.from_list([ROW]), test=other).save_to_disk(tmp_path / "two")
    assert len(load(tmp_path / "two")) == 1
    assert len(load(tmp_path / "two", split="test")) == 2
    with pytest.raises(DataError, match="two: no split 'dev'; it has 'train', 'test'"):
        load(tmp_path / "two", split="dev")
    with pytest.raises(DataError, match="one: no split 'dev'"):
        load(tmp_path / "one", split="dev")
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(DataError, match="one: the saved dataset cannot be read"):
        load(tmp_path / "one")


def test_folder_without_a_dataset(load, write, tmp_path):
    write(LINE, "notes.txt")
    with pytest.raises(
        DataError, match=r"no dataset written by save_to_disk, and no file that ends in .* \(the folder holds notes.txt"
    ):
        load(tmp_path)


@pytest.mark.parametrize("source", ["missing.jsonl", "missing.parquet", "./missing", "/missing", "a/b/missing"])
def test_missing_file(load, source):
    with pytest.raises(DataError, match=f"^{source}: no such file or folder$"):
        load(source)


@pytest.mark.parametrize("source", ["someone/some-pairs", "some.pairs-2.1"])
def test_hub_name_without_network(load, source):
    with pytest.raises(
        DataError, match=f"^{source}: no such file or folder, and not loaded .* from the hub .split 'train'"
    ):
        load(source)


def test_hub_name(load, monkeypatch):
    asked = []

    def load_dataset(name, *, split, cache_dir):
        asked.append((name, split))
        return Dataset.from_list([ROW])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load("someone/pairs", split="train[:10%]").to_list() == [ROW]
    assert asked == [("someone/pairs", "train[:10%]")]


def test_options(load, write):
    with pytest.raises(
        DataError, match=r"pairs\.txt: expected a file that ends in .jsonl, .json, .csv, .tsv, .parquet .*, got '.txt'"
    ):
        load(write(LINE, "pairs.txt"))
    with pytest.raises(DataError, match=r"pairs\.jsonl: a file is one split, called 'train'; got split='test'"):
        load(write(LINE), split="test")
    with pytest.raises(ValueError, match="on_bad_row: expected 'raise' or 'skip', got 'ignore'"):
        load(write(LINE), on_bad_row="ignore")
