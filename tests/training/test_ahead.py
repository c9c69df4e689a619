"""Steps are fetched and packed in the background: the same numbers to the last bit, and no thread that stays."""

import contextlib
import threading
import time

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig

from dpofast.packing.batch import PackedBatch
from dpofast.scoring import ahead as ahead_module
from dpofast.scoring.ahead import Ahead
from dpofast.training.data.micro_batches import StepPacker
from tests.support.ranks_cases import RunsOutOfMemory
from tests.support.tiny import tiny_dataset, tiny_model, tiny_pairs
from tests.support.tiny_training import fails_in_training, losses_of, make_trainer, weights_of

SHORT = {"max_tokens": 40, "num_train_epochs": 2}
CASES = {
    "plain": {},
    "dropout and checkpointing": {
        "disable_dropout": False,
        "gradient_checkpointing": True,
        "peft_config": LoraConfig(r=4, lora_dropout=0.3, target_modules="all-linear", task_type="CAUSAL_LM"),
    },
    "neftune": {"neftune_noise_alpha": 5.0},
    "weighted by pair": {"ld_alpha": 0.5},
    "live reference": {"precompute_ref_log_probs": False},
    "evaluated": {"evaluation": tiny_dataset(7, seed=1), "eval_strategy": "steps", "eval_steps": 1},
    "workers": {"dataloader_num_workers": 2, "dataloader_persistent_workers": True},
    "a last step that is not full": {"per_device_train_batch_size": 5},
}


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("dpofast")]


def on_the_spot(self, steps, max_tokens):
    """What StepPacker.ahead does, in the thread that asks: nothing is fetched before it is needed."""
    return Synchronous(steps)


class Synchronous:
    def __init__(self, steps):
        self.steps = steps

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.steps)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def close(self):
        pass


def logs_of(trainer):
    timed = ("runtime", "per_second", "_seconds")
    return [{k: v for k, v in log.items() if not k.endswith(timed)} for log in trainer.state.log_history]


# ---- the iterator ---------------------------------------------------------------------------------------------------


def test_items_come_in_order_and_one_is_made_ahead():
    made = []

    def items():
        for item in range(6):
            made.append(item)
            yield item

    with Ahead(items(), lambda item: (item, threading.current_thread())) as ahead:
        for count, (item, thread) in enumerate(ahead, 1):
            assert item == count - 1 and thread is not threading.main_thread()
            time.sleep(0.01)
            assert len(made) <= count + 1
    assert made == [0, 1, 2, 3, 4, 5] and not threads()


@pytest.mark.parametrize("where", ["items", "prepare"])
def test_an_error_comes_in_the_place_of_its_item(where):
    def items():
        yield from (1, 2)
        if where == "items":
            raise ValueError("row 3")
        yield 3

    def prepare(item):
        if item == 3:
            raise ValueError("row 3")
        return item

    with Ahead(items(), prepare) as ahead:
        assert [next(ahead), next(ahead)] == [1, 2]
        with pytest.raises(ValueError, match="row 3"):
            next(ahead)
        assert list(ahead) == []
    assert not threads()


def test_closing_waits_for_the_item_in_progress_and_drops_an_error_in_it():
    begun, ended = threading.Event(), []

    def prepare(item):
        begun.set()
        time.sleep(0.05)
        ended.append(item)
        raise ValueError("nobody asked for this item")

    ahead = Ahead(iter([1, 2]), prepare)
    begun.wait()
    ahead.close()
    assert ended == [1] and list(ahead) == [] and not threads()


# ---- the trainer ----------------------------------------------------------------------------------------------------


@pytest.mark.slow(30)
def test_a_source_that_blocks_keeps_nobody(monkeypatch):
    """Not the caller, whose last step is done, and not one who is interrupted."""
    monkeypatch.setattr(ahead_module, "_PATIENCE_S", 0.05)
    begun, goes_on = threading.Event(), threading.Event()

    def items():
        yield 1
        begun.set()
        goes_on.wait(60)
        yield 2

    with Ahead(items(), str) as ahead:
        assert next(ahead) == "1" and begun.wait(60)
    assert ahead._thread.is_alive() and ahead._thread.daemon
    goes_on.set()
    ahead._thread.join(60)
    assert not ahead._thread.is_alive() and list(ahead) == []


@pytest.mark.parametrize("case", CASES)
def test_a_run_is_the_same_to_the_last_bit(case, tmp_path, monkeypatch):
    def run(name):
        trainer = make_trainer(tmp_path / name, **{**SHORT, **CASES[case]})  # seeds the generators
        trainer.train()
        return trainer

    ahead = run("a")
    monkeypatch.setattr(StepPacker, "ahead", on_the_spot)
    synchronous = run("s")
    assert losses_of(ahead) and logs_of(ahead) == logs_of(synchronous)
    assert torch.equal(weights_of(ahead), weights_of(synchronous)) and not threads()


@pytest.mark.slow(5)
def test_a_streams_run_is_the_same_and_reports_the_rows_that_were_trained_on(tmp_path, monkeypatch):
    monkeypatch.setattr("dpofast.training.data.stream._ROWS", 4)
    rows = tiny_pairs(20)
    for row in rows[9:]:
        row["chosen_ids"] = row["chosen_ids"] + [5] * 20

    def run(name):
        stream = IterableDataset.from_generator(lambda: iter(rows))
        trainer = make_trainer(tmp_path / name, train=stream, max_steps=4, max_length=16)
        trainer.train()
        return trainer

    ahead = run("a")
    monkeypatch.setattr(StepPacker, "ahead", on_the_spot)
    synchronous = run("s")
    truncated = [log["truncated"] for log in logs_of(ahead) if "loss" in log]
    assert truncated == sorted(truncated) and truncated[0] == 0 < truncated[-1]
    assert logs_of(ahead) == logs_of(synchronous)
    assert ahead.data_reports["train"] == synchronous.data_reports["train"]
    assert torch.equal(weights_of(ahead), weights_of(synchronous))


def test_a_step_that_was_packed_for_more_than_fits_is_packed_again(tmp_path, monkeypatch):
    def run(name):
        model = tiny_model()
        trainer = make_trainer(tmp_path / name, model=model, max_tokens=60)

        def wait(module, args):
            assert not module.training or second_is_packed.wait(60)

        model.register_forward_pre_hook(wait)
        RunsOutOfMemory(model, most=25, rank=0)
        trainer.train()
        return trainer

    packed, second_is_packed, pack = [], threading.Event(), StepPacker.pack

    def counted(self, examples, limit):
        packed.append(limit)
        try:
            return pack(self, examples, limit)
        finally:
            if len(packed) == 2:
                second_is_packed.set()

    monkeypatch.setattr(StepPacker, "pack", counted)
    ahead = run("a")
    assert ahead.max_tokens <= 25 and packed[:2] == [60, 60] and set(packed[2:]) == {ahead.max_tokens}
    assert len(packed) == 5  # the first step and the second twice, the third once
    monkeypatch.setattr(StepPacker, "ahead", on_the_spot)
    synchronous = run("s")
    assert losses_of(ahead) == losses_of(synchronous)
    assert torch.equal(weights_of(ahead), weights_of(synchronous))


def test_a_bad_row_further_on_stops_where_it_would_have_been_trained_on(tmp_path, monkeypatch):
    monkeypatch.setattr("dpofast.training.data.stream._ROWS", 4)
    rows = [*tiny_pairs(8), {"prompt_ids": [3], "chosen_ids": [], "rejected_ids": [4]}]
    stream = IterableDataset.from_generator(lambda: iter(rows), features=Dataset.from_list(rows).features)
    trainer = make_trainer(tmp_path, train=stream, max_steps=3)
    with pytest.raises(ValueError, match="row 8"):
        trainer.train()
    assert trainer.state.global_step == 2 and len(losses_of(trainer)) == 2 and not threads()


def test_an_error_in_a_step_ends_the_thread(tmp_path):
    trainer = make_trainer(tmp_path, model=fails_in_training(tiny_model()))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        trainer.train()
    assert not threads()


def test_steps_for_a_gpu_lie_in_page_locked_memory(monkeypatch):
    pinned, moved, entered = [], [], []
    monkeypatch.setattr("torch.cuda.device", lambda device: (entered.append(device), contextlib.nullcontext())[1])
    monkeypatch.setattr(PackedBatch, "pin_memory", lambda self: (pinned.append(self), self)[1])
    monkeypatch.setattr(PackedBatch, "to", lambda self, device: (moved.append((self, device)), self)[1])
    device = torch.device("cuda", 1)
    for packer in (StepPacker(device, share="prefix", ref_logps_by_pair=by_pair) for by_pair in (False, True)):
        batches = packer.on_device(tiny_pairs(6), 40)
        assert [(batch, device) for batch in batches] == moved and batches == pinned
        pinned.clear(), moved.clear()
    assert entered == [device] * 2  # the background thread would take the first GPU
    cpu = StepPacker(torch.device("cpu"), share="prefix", ref_logps_by_pair=False)
    assert cpu.on_device(tiny_pairs(6), 40) and not pinned
