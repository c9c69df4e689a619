"""trl's collator under patch_trl(): trl's batch, whose rows follow it through workers, devices and users' changes."""

import copy
import pickle

import pytest
import torch
import trl.trainer.dpo_trainer as trl_module
from accelerate.utils.operations import get_data_structure, slice_tensors
from torch.utils.data import DataLoader

from dpofast.integrations._trl.rows import ROWS_KEY
from dpofast.integrations.trl import patch_trl, unpatch_trl
from tests.support.tiny import tiny_pairs
from tests.support.trl_cases import assert_same_run, build, train

PLAIN = trl_module.DataCollatorForPreference


@pytest.fixture(autouse=True)
def patched():
    """Every test begins under the patch, and the next one meets trl as it is."""
    patch_trl()
    yield
    unpatch_trl()


def collated(count=3):
    """A batch of the patched collator, and trl's of the same pairs."""
    pairs = tiny_pairs(count)
    return trl_module.DataCollatorForPreference(pad_token_id=0)(pairs), PLAIN(pad_token_id=0)(pairs)


def assert_rows_of(batch):
    """The batch knows its rows, and they are its tensors without the padding."""
    assert batch.rows is not None and batch.rows.shape == batch["input_ids"].shape
    for row, ids in enumerate(batch.rows.ids):
        assert ids.tolist() == batch["input_ids"][row][batch["attention_mask"][row] != 0].tolist()
        assert batch.rows.labels[row].tolist() == batch["completion_mask"][row].nonzero().flatten().tolist()


def test_the_batch_is_trls():
    ours, theirs = collated()
    assert set(ours) == set(theirs) == {"input_ids", "attention_mask", "completion_mask"}
    for name, value in theirs.items():
        assert torch.equal(ours[name], value)
    assert {name: value.to("cpu") for name, value in ours.items()}.keys() == theirs.keys()
    assert_rows_of(ours)
    with pytest.raises(KeyError, match="labels"):
        ours["labels"]


def test_the_rows_follow_the_batch():
    batch, _ = collated()
    for moved in (batch.to("cpu"), batch.to("cpu", non_blocking=True), pickle.loads(pickle.dumps(batch))):
        assert_rows_of(moved)
        assert moved[ROWS_KEY] is moved.rows
    assert batch.to("meta").rows is batch.rows and batch.to("meta")["input_ids"].is_meta


@pytest.mark.parametrize("name", ["input_ids", "attention_mask", "completion_mask"])
def test_rows_of_other_tensors_are_not_used(name):
    written, _ = collated()
    written[name][0, 0] = 1
    replaced, _ = collated()
    replaced[name] = replaced[name].clone()
    for batch in (written, replaced, pickle.loads(pickle.dumps(written))):
        assert batch.rows is None
    with torch.inference_mode():  # whose tensors do not count what is written to them
        assert collated()[0].rows is None


def test_what_accelerate_makes_of_a_batch():
    """One rank that reads for all describes a batch without tensors, and cuts it up: the parts are read again."""
    batch, _ = collated()
    described, part = get_data_structure(batch), slice_tensors(batch, slice(0, 2))
    assert described.keys() == part.keys() == batch.keys()
    assert described.rows is None and part.rows is None
    assert len(part["input_ids"]) == 2


def test_workers_send_what_they_read():
    pairs = tiny_pairs(64)
    loader = DataLoader(pairs, batch_size=4, collate_fn=trl_module.DataCollatorForPreference(0), num_workers=2)
    for batch in loader:
        assert_rows_of(batch)


@pytest.mark.parametrize("options", [{}, {"precompute_ref_log_probs": True}], ids=["live", "precomputed"])
def test_a_run_with_workers(options, tmp_path):
    options = {"dataloader_num_workers": 2, "max_steps": 3, **options}
    plain = train(tmp_path / "plain", patched=False, **options)
    assert_same_run(plain, train(tmp_path / "fast", patched=True, **options))


def test_a_collator_of_the_users_own_that_masks_more(tmp_path):
    """Rows that were read before the user's change would score what it masks."""

    def run(folder):
        class Masked(trl_module.DataCollatorForPreference):
            def torch_call(self, examples):
                batch = super().torch_call(examples)
                last = batch["attention_mask"].sum(1) - 1
                batch["completion_mask"][torch.arange(len(last)), last] = 0
                return batch

        trainer = build(folder, max_steps=2)
        trainer.data_collator = Masked(pad_token_id=trainer.processing_class.pad_token_id)
        trainer.train()
        return trainer.state.log_history[0]["logps/chosen"]

    ours = run(tmp_path / "fast")
    unpatch_trl()
    assert ours == pytest.approx(run(tmp_path / "plain"), abs=1e-4)


def test_a_trainer_gives_the_rows_to_its_model(tmp_path, monkeypatch):
    trainer = build(tmp_path, max_steps=1)
    seen = []
    forward = type(trainer.model).forward

    def watched(self, *args, **kwargs):
        seen.append(kwargs.get(ROWS_KEY))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(trainer.model), "forward", watched)
    copied = copy.copy(next(iter(trainer.get_train_dataloader())))
    assert_rows_of(copied)
    trainer.train()
    assert len(seen) == 2 and all(rows is not None for rows in seen)  # the policy's and the reference's
