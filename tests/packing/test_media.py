"""Images of prompts through pack(): which rows they share, what a batch keeps of them, and what is refused."""

import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from dpofast import PackingCollator, pack
from dpofast.packing.media import ImageInput, PromptMedia
from dpofast.packing.split import split_by_kind

_PLACE = 7


def image(value, tokens, *, width=2):
    """An image of one value."""
    tensors = {"pixel_values": torch.full((1, width), float(value)), "grid": torch.tensor([[value, tokens]])}
    return ImageInput(tensors, tokens)


def example(images, *, before=(1,), after=(2,), chosen=(3, 4), rejected=(5, 6, 8), gap=()):
    """An example with these images; gap stands after each."""
    places = [token for one in images for token in [*[_PLACE] * one.num_tokens, *gap]]
    media = PromptMedia(tuple(images), _PLACE) if images else None
    ids = {"prompt_ids": [*before, *places, *after], "chosen_ids": list(chosen), "rejected_ids": list(rejected)}
    return {**ids, "media": media}


def test_equal_images_share_rows_and_different_ones_do_not():
    red, green = image(1, 3), image(2, 2)
    examples = [
        example([red]),
        example([image(1, 3)], chosen=(9,)),  # equal to the first
        example([green]),
        example([red, red]),
        example([]),
    ]
    (batch,) = pack(examples)
    # 1 RRR(2: 3 | 5 6 ; RRR 2: 3 | 5 6) ; GG 2: 3 | 5 6 ; 2: 3 | 5 6
    assert batch.num_tokens == 1 + 3 + (1 + 1 + 2) + (3 + 1 + 1 + 2) + (2 + 1 + 1 + 2) + (1 + 1 + 2)
    assert int((batch.input_ids == _PLACE).sum()) == 3 + 3 + 2
    assert int(batch.input_ids.max()) == _PLACE or int(batch.input_ids.max()) == 8
    media = batch.media
    assert sorted(media.num_tokens) == [2, 3]
    order = media.images_in(torch.arange(batch.num_tokens))
    assert sorted(media.inputs_of(order)["pixel_values"][:, 0].tolist()) == [1.0, 1.0, 2.0]
    assert torch.equal(media.image_of_row >= 0, batch.input_ids == _PLACE)
    assert pack([example([])])[0].media is None


@pytest.mark.parametrize("share", ["prefix", "prompt", "none"])
def test_each_sequence_has_the_images_of_its_prompt_in_order(share):
    a, b, c = image(1, 2), image(2, 1), image(3, 2)
    examples = [example([a, b]), example([a, c], chosen=(9, 9)), example([c, a, a]), example([b], after=(2, 2))]
    (batch,) = pack(examples, share=share)
    found = set()
    for rows in batch.paths():
        images = batch.media.images_in(rows[rows >= 0])
        found.add(tuple(batch.media.inputs_of(images)["pixel_values"][:, 0].tolist()))
    assert found == {(1.0, 2.0), (1.0, 3.0), (3.0, 1.0, 1.0), (2.0,)}


def test_placeholders_of_an_image_may_stand_apart():
    """As Pixtral's rows, which end with a break."""
    a = image(1, 4)
    ids = [1, _PLACE, _PLACE, 60, _PLACE, _PLACE, 61, 2]
    media = PromptMedia((a,), _PLACE)
    (batch,) = pack([{"prompt_ids": ids, "chosen_ids": [3], "rejected_ids": [4], "media": media}])
    assert batch.media.images_in(torch.arange(batch.num_tokens)) == [0]
    assert batch.input_ids.tolist() == ids


def test_tensors_of_different_sizes_are_padded_with_zeros():
    (batch,) = pack([example([image(1, 2, width=3), image(2, 1, width=1)])])
    assert batch.media.inputs["pixel_values"].tolist() == [[1.0, 1.0, 1.0], [2.0, 0.0, 0.0]]


def test_a_split_batch_has_the_images_of_its_rows():
    a, b = image(1, 2), image(2, 3)
    (batch,) = pack([example([a, b]), example([a])])
    split = split_by_kind(batch, torch.arange(batch.num_sequences))
    assert split.num_tokens > batch.num_tokens
    order = split.media.images_in(torch.arange(split.num_tokens))
    assert split.media.inputs_of(order)["pixel_values"][:, 0].tolist() == [1.0, 2.0, 1.0, 2.0, 1.0, 1.0]
    assert torch.equal(split.media.image_of_row >= 0, split.input_ids == _PLACE)


def test_columns_take_media_too():
    a, b = image(1, 2), image(2, 2)
    rows = [example([a]), example([]), example([b])]
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    table = {
        name: (
            np.concatenate([row[name] for row in rows]),
            np.cumsum([0, *(len(row[name]) for row in rows)]),
        )
        for name in names
    }
    (columns,) = pack({**table, "media": [row["media"] for row in rows]})
    (batch,) = pack(rows)
    assert torch.equal(columns.input_ids, batch.input_ids)
    assert torch.equal(columns.media.image_of_row, batch.media.image_of_row)
    with pytest.raises(ValueError, match="media: expected one value an example beside prompt_ids"):
        pack({**table, "media": [rows[0]["media"]]})


def test_media_move_with_the_batch_and_through_a_loaders_processes():
    rows = [example([image(1, 2)]), example([image(2, 3)])]
    (batch,) = pack(iter(rows))
    moved = batch.to("meta")
    assert moved.media.inputs["pixel_values"].is_meta
    assert moved.media.shapes["grid"].is_cpu
    assert list(moved.media.shapes) == ["grid"]
    again = pickle.loads(pickle.dumps(batch))
    assert torch.equal(again.media.inputs["pixel_values"], batch.media.inputs["pixel_values"])
    (loaded,) = DataLoader(rows, batch_size=2, collate_fn=PackingCollator(), num_workers=1)
    assert torch.equal(loaded.media.inputs["pixel_values"], batch.media.inputs["pixel_values"])
    assert torch.equal(loaded.input_ids, batch.input_ids)


def test_wrong_media_are_refused_by_the_example():
    def refused(examples, message, **options):
        with pytest.raises(ValueError, match=message):
            pack(examples, **options)

    a = image(1, 3)
    right = example([a])
    refused([right, {**right, "prompt_ids": [1, _PLACE, _PLACE, 2]}], r"examples\[1\]: expected 3 image placeholders "
            r"\(token id 7\) in prompt_ids, as its 1 images have \[3\], got 2")  # fmt: skip
    refused([right, {**right, "media": {"pixel_values": 1}}], r"examples\[1\].media: expected a PromptMedia .*got dict")
    refused([right, {**right, "media": PromptMedia((a,), 8)}], r"examples\[1\].media: expected 7 as the id of a")
    elsewhere = "expected image placeholders in prompts with media alone, got token id 7 in its text or in a response"
    refused([right, example([], before=(1, _PLACE))], rf"examples\[1\]: {elsewhere}")
    refused([right, example([a], chosen=(3, _PLACE, 4))], rf"examples\[1\]: {elsewhere}")
    refused([right, example([], rejected=(5, _PLACE))], rf"examples\[1\]: {elsewhere}")  # a target alone
    refused([right, example([], after=(50,))], r"examples\[1\]: expected token ids below vocab_size 20, got token id "
            "50", vocab_size=20)  # fmt: skip
    refused([right, example([], after=(2**30 + 5,))], r"examples\[1\]: expected token ids below 2\*\*30")
    other = ImageInput({"pixels": torch.ones(1, 2)}, 1)
    refused([right, example([other])], "media: expected pixel_values, grid of every image")
    parted = [[1, _PLACE, 50, _PLACE, _PLACE, 2], [1, _PLACE, 51, _PLACE, _PLACE, 2]]
    refused([{**right, "prompt_ids": ids} for ids in parted], r"examples\[\d\]: .*prompts that part inside it")
    assert len(pack([right, example([])], vocab_size=20)) == 1


def test_examples_are_not_changed():
    row = example([image(1, 3)])
    ids = row["prompt_ids"] = np.array(row["prompt_ids"])
    before = ids.copy()
    pack([row])
    assert (ids == before).all()


def test_lists_of_responses_take_media_too():
    a = image(1, 3)
    row = {"prompt_ids": [1, _PLACE, _PLACE, _PLACE, 2], "media": PromptMedia((a,), _PLACE)}
    responses = {
        "responses_ids": [[3, 4], [5, 6], [8]],
        "ranks": [0, 1, 2],
        "responses_weights": [[1.0, 0.5], [1.0, 1.0], [2.0]],
    }
    (batch,) = pack([{**row, **responses}, {**row, **responses, "media": PromptMedia((image(2, 3),), _PLACE)}])
    assert batch.columns.lists.shape == (2, 3)
    assert batch.num_sequences == 6
    order = batch.media.images_in(torch.arange(batch.num_tokens))
    assert sorted(batch.media.inputs_of(order)["pixel_values"][:, 0].tolist()) == [1.0, 2.0]
    with pytest.raises(ValueError, match=r"examples\[0\]: expected image placeholders in prompts with media alone"):
        pack([{**row, **responses, "responses_ids": [[3, 4], [5, 6], [_PLACE]]}])
