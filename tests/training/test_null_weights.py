"""Token weights that are null in some rows, which counts as 1: in whatever order rows of both kinds are read."""

import itertools

import numpy as np
import pytest
import torch
from datasets import Dataset

from dpofast import tokenize_preferences
from dpofast.data.token_rows import as_numpy
from tests.support.tiny_training import losses_of, make_trainer, weights_of

PLAIN = {"prompt_ids": [10, 11], "chosen_ids": [20, 21, 6], "rejected_ids": [30, 6]}
NULL, SOME = ({**PLAIN, "chosen_weights": weights, "rejected_weights": None} for weights in (None, [1.0, 0.0, 1.0]))
ONES = {**PLAIN, "chosen_weights": [1.0] * 3, "rejected_weights": [1.0] * 2}
LIST = {"prompt_ids": [10, 11], "responses_ids": [[20, 21, 6], [30, 6], [31, 6]], "ranks": [1, 2, 3]}
LISTS = [{**LIST, "responses_weights": weights} for weights in (None, [[1.0, 0.0, 1.0], [1.0, 1.0], [0.5, 1.0]])]


def trained(folder, rows, **options):
    folder.mkdir(exist_ok=True)
    order = {"train_sampling_strategy": "sequential", "optim": "sgd", "learning_rate": 0.1}
    data = Dataset.from_list(rows)
    trainer = make_trainer(folder, train=data, evaluation=data, **{**order, **options})
    trainer.train()
    return trainer, trainer.evaluate()


@pytest.mark.parametrize("pairs_per_step", [1, 2])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_null_weights_are_ones(tmp_path, order, pairs_per_step):
    found = []
    for name, rows in (("null", [NULL, SOME]), ("ones", [ONES, SOME])):
        rows = [rows[place] for place in order]
        trainer, metrics = trained(tmp_path / name, rows, per_device_train_batch_size=pairs_per_step)
        found.append((losses_of(trainer), weights_of(trainer), metrics["eval_loss"]))
    assert found[0][0] == found[1][0] and found[0][2] == found[1][2]
    torch.testing.assert_close(found[0][1], found[1][1], atol=0, rtol=0)


@pytest.mark.parametrize("options", [{"loss_type": "plackett_luce"}, {"list_pairs": "all"}], ids=["lists", "pairs"])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_null_weights_of_lists(tmp_path, order, options):
    trainer, _ = trained(tmp_path, [LISTS[place] for place in order], **options)
    assert all(np.isfinite(losses_of(trainer)))


@pytest.mark.parametrize("first", [NULL, SOME])
def test_rows_are_read_together_whichever_comes_first(first):
    rows = [first, NULL, SOME, ONES]
    tokens, _ = tokenize_preferences(Dataset.from_list(rows), None)
    for many in itertools.product(range(4), repeat=2):
        read = as_numpy(tokens)[list(many)]
        assert [row if row is None else list(row) for row in read["chosen_weights"]] == [
            rows[place]["chosen_weights"] for place in many
        ]
        assert all(isinstance(row, np.ndarray) for row in read["chosen_ids"])
