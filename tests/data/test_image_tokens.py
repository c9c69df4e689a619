"""tokenize_preferences with images: token ids, keys and counts beside them, and what cannot be used."""

import io
import os
import pickle

import datasets
import pytest
import torch
from datasets import Dataset, Features, List, Value
from PIL import Image
from tokenizers.processors import TemplateProcessing
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from dpofast import DataError, PromptImages, pack, preview_preferences, tokenize_preferences, vision_inputs
from dpofast.data.images.columns import STORED
from dpofast.data.images.tokens import files_digest
from tests.support.image_conversations import (
    LLAVA,
    TURNS,
    assistant,
    conversation,
    dataset_of,
    encoded,
    ids,
    images_of,
    refused,
    tokens_of,
    user,
)
from tests.support.image_rows import arrow_pool
from tests.support.vision_models import IMAGE, vision_model
from tests.support.vision_processors import FAMILIES, IMAGE_TOKEN, picture, processor_of

WIDE, TALL, SQUARE = picture(0, 20, 30), picture(1, 33, 9), picture(2, 16, 16)


# ---- token ids ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_and_pixels_are_those_of_trl(family):
    processor, images = processor_of(family), images_of(family)
    rows = [
        conversation([WIDE]),
        conversation([TALL, SQUARE, WIDE], "which is larger?", "the first", "none"),
        conversation([], "say hi", "hi", "no"),
    ]
    tokens, report = tokens_of(dataset_of(rows), images)
    assert report.kept == 3
    for row, mine in zip(rows, tokens, strict=True):
        theirs = DataCollatorForVisionPreference(processor)([pickle.loads(pickle.dumps(row))])
        for side, response in enumerate(("chosen_ids", "rejected_ids")):
            own = theirs["input_ids"][side][theirs["attention_mask"][side] == 1].tolist()
            assert mine["prompt_ids"] + mine[response] == own
        assert sum(mine["image_tokens"]) == mine["prompt_ids"].count(IMAGE)
        assert mine["image_token_id"] == (IMAGE if row["images"] else None)
        media = images.media(mine)
        if not row["images"]:
            assert media is None
            continue
        joined = torch.cat([image.tensors["pixel_values"].reshape(-1) for image in media.images])
        # of chosen and rejected; both are given the same pixels, and some padded
        pixels = theirs["pixel_values"].reshape(-1)
        assert joined.sum().item() == pytest.approx(pixels[: len(pixels) // 2].sum().item(), abs=1e-2)


def test_an_image_part_says_where_an_image_stands():
    parts = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}, {"type": "image"}]
    rows = [
        conversation([]) | {"images": [encoded(WIDE), encoded(SQUARE)], "prompt": [user(parts)]},
    ]
    tokens, _ = tokens_of(rows)
    four = [IMAGE] * 4
    assert tokens[0]["prompt_ids"] == ids("user: a") + four + ids("b") + four + ids("\nassistant: ")


def test_images_stand_first_in_a_turn_of_text_parts():
    row = conversation([encoded(WIDE)])
    parts = row | {"prompt": [user([{"type": "text", "text": row["prompt"][0]["content"]}])]}
    assert tokens_of([parts])[0][:] == tokens_of([row])[0][:]


def test_images_stand_where_the_text_names_them():
    row = {"images": [encoded(WIDE)], "prompt": "look: <image> and say", "chosen": " yes", "rejected": " no"}
    tokens, _ = tokens_of([row])
    assert tokens[0]["prompt_ids"] == ids("look: ") + [IMAGE] * 4 + ids(" and say")
    assert tokens[0]["chosen_ids"] == ids(" yes") + [2]
    turns = conversation([encoded(WIDE)], "<image>\nwhat?")
    assert tokens_of([turns])[0][0]["prompt_ids"] == ids("user: ") + [IMAGE] * 4 + ids("\nwhat?\nassistant: ")


def test_one_image_may_stand_in_a_column_image():
    row = {"image": encoded(WIDE), "prompt": "<image>?", "chosen": " yes", "rejected": " no"}
    (mine,) = tokens_of([row])[0]
    texts = {name: row[name] for name in ("prompt", "chosen", "rejected")}
    (theirs,) = tokens_of([{"images": [row["image"]], **texts}])[0]
    assert mine == theirs


def test_token_ids_may_have_their_placeholders():
    row = {"images": [encoded(WIDE)], "prompt_ids": [5, *[IMAGE] * 4, 6], "chosen_ids": [7], "rejected_ids": [8, 9]}
    tokens, _ = tokens_of([row])
    assert tokens[0]["prompt_ids"] == row["prompt_ids"] and tokens[0]["image_tokens"] == [4]
    assert "images and placeholders do not fit" in refused([row | {"prompt_ids": [5, *[IMAGE] * 3, 6]}])
    assert "image tokens without images" in refused([row | {"images": []}])
    qwen, video = images_of("qwen3_vl"), vision_model("qwen3_vl").config.video_token_id
    count = sum(tokens_of([conversation([encoded(WIDE)])], qwen)[0][0]["image_tokens"])
    row |= {"prompt_ids": [5, *[IMAGE] * count, video]}
    assert "videos are not supported: the prompt has a video's token" in refused([row], qwen)


def test_a_tokenizer_that_adds_eos_adds_none_to_a_prompt():
    processor = processor_of("llava")
    backend = processor.tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    images = PromptImages(processor, vision_inputs(vision_model("llava")))
    row = {"images": [encoded(WIDE)], "prompt": "look: <image> and say", "chosen": " yes", "rejected": " no"}
    (tokens,) = tokens_of([row], images)[0]
    assert tokens["prompt_ids"] == [1, *ids("look: "), *[IMAGE] * 4, *ids(" and say")]
    assert tokens["chosen_ids"] == [*ids(" yes"), 2]
    (tokens,) = tokens_of([row | {"prompt": "<s>look: <image>"}], images)[0]
    assert tokens["prompt_ids"] == [1, *ids("look: "), *[IMAGE] * 4]


def test_rows_of_a_transform_have_their_images():
    stored = Dataset.from_dict({"number": [0, 1]})
    stored.set_transform(lambda batch: _columns([conversation([(WIDE, TALL)[n]]) for n in batch["number"]]))
    tokens, _ = tokens_of(stored)
    expected, _ = tokens_of(dataset_of([conversation([WIDE]), conversation([TALL])]))
    assert tokens["image_keys"][:] == expected["image_keys"][:] and tokens["prompt_ids"][:] == expected["prompt_ids"][:]
    assert [image.key for image in LLAVA.media(tokens[1]).images] == expected[1]["image_keys"]


def _columns(rows):
    return {name: [row[name] for row in rows] for name in rows[0]}


# ---- which images go with a row -------------------------------------------------------------------------------------


def test_images_follow_their_rows_where_others_are_skipped():
    rows = [conversation([SQUARE], better="same", worse="same"), conversation([WIDE]), conversation([TALL, WIDE])]
    tokens, report = tokens_of(dataset_of(rows), on_bad_row="skip")
    assert report.kept == 2 and tokens["row"][:] == [1, 2]
    alone = [tokens_of(dataset_of([row]))[0][0]["image_keys"] for row in rows[1:]]
    assert tokens["image_keys"][:] == alone
    for row in tokens:
        assert [image.key for image in LLAVA.media(row).images] == row["image_keys"]


def test_images_follow_the_pairs_of_a_list():
    rows = [
        {"images": [encoded(image)], "prompt": "<image>?", "responses": ["a", "b", "c"], "ranks": [2, 0, 1]}
        for image in (WIDE, TALL)
    ]
    lists, _ = tokens_of(rows)
    assert lists["image_tokens"][:] == [[4], [4]] and LLAVA.media(lists[1]) is not None
    pairs, _ = tokens_of(rows, list_pairs="all")
    assert len(pairs) == 6
    assert pairs["image_keys"][:] == [lists[0]["image_keys"]] * 3 + [lists[1]["image_keys"]] * 3
    assert all(LLAVA.media(row) is not None for row in pairs)


def test_the_images_themselves_are_not_copied(tmp_path):
    dataset_of([conversation([picture(k, 200, 200)]) for k in range(20)]).save_to_disk(tmp_path / "saved")
    saved = datasets.load_from_disk(str(tmp_path / "saved"))
    tokens, _ = tokens_of(saved)
    bytes_of = {file["filename"]: (tmp_path / file["filename"]).stat().st_size for file in tokens.cache_files}
    own = [size for name, size in bytes_of.items() if not name.startswith(str(tmp_path))]
    assert max(bytes_of.values()) > 20 * 100_000 and sum(own) < 100_000


def test_an_image_file_that_changes_is_another_image(tmp_path):
    file = tmp_path / "picture.png"
    WIDE.save(file)
    row = {"images": [str(file)], "prompt": "<image>?", "chosen": " yes", "rejected": " no"}
    data = Dataset.from_list([row])
    before, _ = tokens_of(data)
    again, _ = tokens_of(data)
    assert again["image_keys"][:] == before["image_keys"][:]
    TALL.save(file)
    with pytest.raises(ValueError, match="row 0 of the data: its images .*picture.png.* are others"):
        LLAVA.media(before[0])
    after, _ = tokens_of(data)
    assert after["image_keys"][:] != before["image_keys"][:]
    file.unlink()
    with pytest.raises(ValueError, match="row 0 of the data: .*picture.png"):
        LLAVA.media(after[0])


def test_it_pickles_for_loader_processes():
    (row,) = tokens_of(dataset_of([conversation([WIDE])]))[0]
    copy = pickle.loads(pickle.dumps(LLAVA))
    assert [image.key for image in copy.media(row).images] == row["image_keys"]


def test_images_are_not_copied_where_a_row_is_skipped(tmp_path):
    rows = [conversation([picture(k, 200, 200)], better=f"a {k}" if k != 7 else "a dog") for k in range(20)]
    dataset_of(rows).save_to_disk(tmp_path / "saved")
    tokens, report = tokens_of(datasets.load_from_disk(str(tmp_path / "saved")), on_bad_row="skip")
    assert tokens["row"][:] == [*range(7), *range(8, 20)] and report.kept == 19
    own = [file["filename"] for file in tokens.cache_files if not file["filename"].startswith(str(tmp_path))]
    assert sum(os.stat(name).st_size for name in own) < 100_000
    for row in tokens.select([6, 7, 18]):
        assert [image.key for image in LLAVA.media(row).images] == row["image_keys"]


def test_the_stamps_of_files_are_hashed_without_reading_images(tmp_path):
    file = tmp_path / "a.png"
    WIDE.save(file)
    big, named = {"bytes": bytes(1 << 20), "path": "b.png"}, {"bytes": None, "path": str(file)}
    data = Dataset.from_dict({"images": [[big], None, [], [big, named], [big]] * 4}, features=Features(images=STORED))
    with arrow_pool() as pool:
        first = files_digest(data)
    assert pool.max_memory() < 1 << 20
    assert files_digest(data) == first != files_digest(data.select(range(1, 20)).select(range(3)))
    os.utime(file, (1, 1))
    assert files_digest(data) != first
    without = data.select([0, 1, 2])
    assert files_digest(without) == files_digest(without.select([1]))


@pytest.mark.parametrize("stretches", [0, 1000])
def test_relative_paths_are_those_of_the_working_folder(tmp_path, monkeypatch, stretches):
    monkeypatch.setattr("dpofast.data.images.tokens._STRETCHES", stretches)
    rows = [conversation(["a.png"], better=better) for better in ("a dog", "a cat", "one", "a dog", "two")]
    features = {"images": List(Value("string")), **dict.fromkeys(("prompt", "chosen", "rejected"), TURNS)}
    Dataset.from_list(rows, features=Features(features)).save_to_disk(tmp_path / "saved")
    for number, image in enumerate((WIDE, TALL)):
        folder = tmp_path / str(number)
        folder.mkdir()
        image.save(folder / "a.png")
        monkeypatch.chdir(folder)
        tokens, _ = tokens_of(datasets.load_from_disk(str(tmp_path / "saved")), on_bad_row="skip")
        (expected,) = tokens_of([conversation([encoded(image)])])[0]
        assert tokens["row"][:] == [1, 2, 4]
        for row in tokens:
            assert row["images"] == [{"bytes": None, "path": str(folder / "a.png")}]
            assert [each.key for each in LLAVA.media(row).images] == row["image_keys"] == expected["image_keys"]


def test_a_transform_whose_files_change_is_tokenized_anew(tmp_path):
    Dataset.from_dict({"number": [0, 1]}).save_to_disk(tmp_path / "saved")
    file = tmp_path / "a.png"
    for image in (WIDE, TALL):
        image.save(file)
        data = datasets.load_from_disk(str(tmp_path / "saved"))
        data.set_transform(lambda batch: _columns([conversation([str(file)]) for _ in batch["number"]]))
        tokens, _ = tokens_of(data)
        assert [each.key for each in LLAVA.media(tokens[1]).images] == tokens[1]["image_keys"]


def test_a_preview_shows_images_and_text():
    shown = preview_preferences(dataset_of([conversation([WIDE, TALL]), conversation([], "why?")]), None, images=LLAVA)
    assert "prompt    user: <image 1: 30x20, 4 tokens><image 2: 9x33, 4 tokens>what is it?" in shown
    assert "prompt    user: why?" in shown and "chosen    a cat</s>" in shown


def test_rows_and_their_media_can_be_packed():
    tokens, _ = tokens_of(dataset_of([conversation([WIDE]), conversation([WIDE, TALL]), conversation([])]))
    (batch,) = pack([{**row, "media": LLAVA.media(row)} for row in tokens], max_tokens=1000)
    # the first image of the second prompt has another place only if its prompt begins otherwise
    assert batch.media.num_seen() == 2 and batch.num_pairs == 3


# ---- what cannot be used --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row, problem",
    [
        (conversation([encoded(WIDE)], "is <image> or <image>?"), "1 images for 2 tokens such as <image>"),
        (conversation([], "is <image> a token?"), "0 images for 1 tokens such as <image>"),
        (conversation([encoded(WIDE)], better="an <image>"), "the chosen response holds an image token"),
        (
            conversation([encoded(WIDE)]) | {"prompt": [{"role": "system", "content": "be kind"}]},
            "no place for the images",
        ),
        (
            conversation([encoded(WIDE)]) | {"prompt": [user([{"type": "image"}, {"type": "image"}])]},
            "1 images for 2 parts",
        ),
        (
            conversation([encoded(WIDE)]) | {"chosen": [assistant([{"type": "image"}, {"type": "text", "text": "a"}])]},
            "images in responses are not supported: the chosen response",
        ),
        (conversation([b"no image"]), "row 0"),
        (conversation([encoded(picture(0, 50, 50), "JPEG")[:700]]), "row 0"),
        (conversation(["no/such/file.png"]), "no/such/file.png"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(row, problem):
    message = refused([row])
    assert problem in message and "row 0" in message


def test_a_broken_image_is_counted_where_bad_rows_are_skipped():
    rows = [conversation([encoded(WIDE)]), conversation([b"nothing"]), conversation([encoded(TALL)[:100]])]
    tokens, report = tokens_of(rows, on_bad_row="skip")
    assert report.kept == 1 and sum(len(found.rows) for found in report.skipped.values()) == 2
    assert len(tokens) == 1


@pytest.mark.parametrize("size", [(1, 1), (10_000, 3), (3, 10_000)])
@pytest.mark.parametrize("family", ["qwen3_vl", "llava", "llava_next", "idefics3"])
def test_images_of_odd_sizes_are_right_or_refused_by_their_row(family, size):
    """Qwen's processor refuses sides of more than 1 to 200; the others scale."""
    images, model = images_of(family), vision_model(family)
    width, height = size
    row = conversation([encoded(picture(0, height, width))])
    if family == "qwen3_vl" and max(size) > 1:
        assert f"row 0 (counted from 0): the processor refused the images: images of {width} x {height}" in refused(
            [row], images
        )
        return
    (tokens,) = tokens_of([row], images)[0]
    media = images.media(tokens)
    tensors = {name: torch.cat([image.tensors[name] for image in media.images]) for name in media.images[0].tensors}
    arguments = images.inputs.family.arguments(tensors)
    features = model.model.get_image_features(**arguments, return_dict=True).pooler_output
    count = sum(part.shape[0] if part.ndim == 2 else part.shape[0] * part.shape[1] for part in features)
    assert count == sum(tokens["image_tokens"]) == tokens["prompt_ids"].count(IMAGE)


def test_a_prompt_with_images_is_not_cut():
    row = conversation([encoded(WIDE)], better="a cat that is long", worse="a dog")
    (whole,) = tokens_of([row])[0]
    length = len(whole["prompt_ids"])
    (cut,) = tokens_of([row], max_length=length + 3)[0]
    assert cut["prompt_ids"] == whole["prompt_ids"] and cut["chosen_ids"] == whole["chosen_ids"][:3]
    message = refused([row], max_length=length + 3, truncation_mode="keep_end")
    assert f"a prompt with images does not fit max_length={length + 3}" in message
    assert tokens_of([row], max_length=None, truncation_mode="keep_end")[0][0] == whole


@pytest.mark.parametrize("transform", [False, True])
def test_no_row_has_an_image(transform):
    """Without a processor the rows are those of text."""
    rows = [conversation([], better="a cat"), conversation([], better="a bird")]
    data = dataset_of(rows)
    if transform:
        data = Dataset.from_dict({"number": [0, 1]})
        data.set_transform(lambda batch: _columns([rows[number] for number in batch["number"]]))
    found, _ = tokenize_preferences(data, LLAVA.tokenizer)
    expected, _ = tokenize_preferences(dataset_of(rows).remove_columns("images"), LLAVA.tokenizer)
    assert found.to_list() == expected.to_list() and found.features == expected.features


@pytest.mark.parametrize("place", [0, 2])
def test_a_broken_image_that_a_transform_is_given(place):
    """datasets decodes it before the transform sees it; without decoding it is a bad row."""
    rows = [conversation([encoded(WIDE)]) for _ in range(3)]
    rows[place]["images"] = [b"no image"]
    data = dataset_of(rows)
    data.set_transform(dict)
    message = r"rows cannot be read for the dataset's transform: UnidentifiedImageError.*Image\(decode=False\)"
    with pytest.raises(DataError, match=message):
        tokens_of(data)
    data = data.with_format(None).cast_column("images", List(datasets.Image(decode=False)))
    data.set_transform(dict)
    tokens, _ = tokens_of(data, on_bad_row="skip")
    assert tokens["row"][:] == [row for row in range(3) if row != place]


def test_images_without_a_processor_are_refused():
    with pytest.raises(DataError, match="images cannot be used without a processor"):
        tokenize_preferences(Dataset.from_list([conversation([encoded(WIDE)])]), LLAVA.tokenizer)
    with pytest.raises(ValueError, match="processor: expected a transformers processor .*, got TokenizersBackend"):
        PromptImages(LLAVA.tokenizer, LLAVA.inputs)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "LA"])
def test_pictures_of_every_mode_are_those_in_rgb(family, mode):
    images = images_of(family)
    picture_in_mode = SQUARE.convert(mode)
    (row,) = tokens_of(dataset_of([conversation([picture_in_mode])]), images)[0]
    (expected,) = tokens_of(dataset_of([conversation([picture_in_mode.convert("RGB")])]), images)[0]
    assert row["image_keys"] == expected["image_keys"]


def test_an_animated_picture_is_refused():
    buffer = io.BytesIO()
    WIDE.save(buffer, "GIF", save_all=True, append_images=[Image.new("RGB", WIDE.size)])
    assert "frames" in refused([conversation([buffer.getvalue()])])
    (row,) = tokens_of([conversation([encoded(WIDE, "GIF")])])[0]
    assert row["image_tokens"] == [4]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_token_in_words_is_refused_in_every_family(family):
    row = conversation([], f"say {IMAGE_TOKEN[family]}")
    assert "another number of images than of image tokens" in refused([row], images_of(family))


def test_rows_out_of_order_keep_their_images(tmp_path):
    rows = [conversation([picture(k, 20, 20)], better=f"a {k}") for k in range(12)]
    dataset_of(rows).save_to_disk(tmp_path / "saved")
    saved = datasets.load_from_disk(str(tmp_path / "saved"))
    expected = {tuple(row["chosen_ids"]): row["image_keys"] for row in tokens_of(saved)[0]}
    shuffled = saved.shuffle(seed=1)
    files = sorted(path.name for path in (tmp_path / "saved").iterdir())
    tokens, _ = tokens_of(shuffled)
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == files, "the user's folder stays as it is"
    for row in tokens:
        assert row["image_keys"] == expected[tuple(row["chosen_ids"])]
        assert [image.key for image in LLAVA.media(row).images] == row["image_keys"]


def test_a_processor_of_another_model_is_named():
    images = PromptImages(processor_of("idefics3"), LLAVA.inputs)
    message = refused([conversation([encoded(WIDE)])], images)
    assert "the processor is a Idefics3Processor, the model's type llava" in message
