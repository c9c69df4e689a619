"""The loops of examples/: each trains the same model on the same pairs in the same order, so all must agree.

Each also runs alone, as `python examples/<name>.py`.
"""

import ast
import json
import math
import os
import random
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import trl
from datasets import Dataset
from PIL import Image

from dpofast import DPOConfig, DPOTrainer, reference
from dpofast.integrations.trl import unpatch_trl
from examples import (
    accelerate_loop,
    liger_loss,
    lightning_module,
    pytorch_loop,
    sequence_parallel_loop,
    tensor_parallel_loop,
    transformers_trainer,
    trl_trainer,
    vision_dpo,
)
from examples.tiny import trainer_options
from tests.support.rank_processes import free_port, run_ranks
from tests.support.tiny import tiny_model, tiny_pairs
from tests.support.trl_cases import text_pairs, word_tokenizer

pytestmark = pytest.mark.slow(30)

PAIRS_PER_STEP, EOS = 4, 1
FOLDER = Path(pytorch_loop.__file__).parent
# They start processes, which look for their functions in the main module.
SPAWN = ("sequence_parallel_loop", "tensor_parallel_loop")
ALONE = sorted({path.stem for path in FOLDER.glob("*.py")} - {"tiny", "vision_dpo", *SPAWN})


def examples():
    return [
        {name: ids if name == "prompt_ids" else [*ids, EOS] for name, ids in pair.items()}
        for pair in tiny_pairs(12, seed=2)
    ]


def as_text():
    """The same for trl, which adds the end of the responses itself."""
    return text_pairs(12, seed=2)


def padded():
    for start in range(0, 12, PAIRS_PER_STEP):
        step = examples()[start : start + PAIRS_PER_STEP]
        rows = [(pair["prompt_ids"], pair[name]) for name in ("chosen_ids", "rejected_ids") for pair in step]
        yield reference.padded_rows(rows)


RECIPES = {
    "transformers": lambda model, ref, folder: transformers_trainer.train(
        model,
        ref,
        Dataset.from_list(examples()),
        transformers.TrainingArguments(folder, remove_unused_columns=False, **trainer_options()),
    ),
    "trl": lambda model, ref, folder: trl_trainer.train(
        model, ref, as_text(), word_tokenizer(), trl.DPOConfig(folder, bf16=False, **trainer_options())
    ),
    "liger": lambda model, ref, folder: liger_loss.train(model, ref, padded()),
    "accelerate": lambda model, ref, folder: accelerate_loop.train(model, ref, examples()),
    "lightning": lambda model, ref, folder: lightning_module.train(model, ref, examples()),
}


@pytest.fixture(scope="module")
def loop():
    """The plain loop's losses and trained model, micro-batches of a few tokens."""
    model = tiny_model()
    return pytorch_loop.train(model, tiny_model(), examples(), max_tokens=30), model


def test_the_plain_loop_learns(loop):
    losses, _ = loop
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6) and len(losses) == 3
    model = tiny_model()
    again = [pytorch_loop.train(model, tiny_model(), examples()) for _ in range(4)]
    assert sum(again[-1]) < sum(losses) - 0.1


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_does_the_same(name, loop, tmp_path):
    model = tiny_model()
    try:
        losses = RECIPES[name](model, tiny_model(), str(tmp_path))
    finally:
        unpatch_trl()
    assert losses == pytest.approx(loop[0], abs=1e-5)
    for (key, value), trained in zip(loop[1].state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(trained.cpu(), value, atol=1e-5, rtol=1e-4, msg=key)


def _tensor_parallel(rank, port, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    models = [tensor_parallel_loop.shard(tiny_model(), mesh) for _ in range(2)]
    losses = pytorch_loop.train(*models, examples(), max_tokens=30)
    sharded = sum(hasattr(weight, "device_mesh") for weight in models[0].parameters())
    weights = {key: getattr(w, "full_tensor", w.clone)() for key, w in models[0].state_dict().items()}
    args = DPOConfig(output_dir=folder, use_cpu=True, report_to="none", ddp_backend="gloo")
    with pytest.raises(ValueError, match="model: expected whole weights, got .*q_proj.weight sharded over 2 devices"):
        DPOTrainer(models[0], args=args)
    torch.save((losses, sharded, weights), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_tensor_parallel_ranks_do_the_same(loop, tmp_path):
    run_ranks(_tensor_parallel, (free_port(), str(tmp_path)), 2)
    for rank in range(2):
        losses, sharded, weights = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert sharded == 3 * 7 + 1
        assert losses == pytest.approx(loop[0], abs=1e-5)
        for key, value in loop[1].state_dict().items():
            torch.testing.assert_close(weights[key], value, atol=1e-5, rtol=1e-4, msg=key)


def _sequence_parallel(rank, port, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = tiny_model()
    group = torch.distributed.group.WORLD
    losses = sequence_parallel_loop.train(model, tiny_model(), examples(), group, max_tokens=30)
    torch.save((losses, model.state_dict()), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_sequence_parallel_ranks_do_the_same(loop, tmp_path):
    run_ranks(_sequence_parallel, (free_port(), str(tmp_path)), 2)
    for rank in range(2):
        losses, weights = torch.load(tmp_path / f"{rank}.pt")
        assert losses == pytest.approx(loop[0], abs=1e-5)
        for key, value in loop[1].state_dict().items():
            torch.testing.assert_close(weights[key], value, atol=1e-5, rtol=1e-4, msg=key)


def losses_of(printed):
    """The list in the last line of an example's output, a loss for each of its three steps."""
    losses = ast.literal_eval(printed.splitlines()[-1])
    assert len(losses) == 3 and all(math.isfinite(loss) for loss in losses)
    return losses


@pytest.mark.parametrize("name", ALONE)
def test_an_example_runs_alone(name, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    try:
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    finally:
        unpatch_trl()
    losses = losses_of(capsys.readouterr().out)
    if name not in ("own_loss", "own_kind"):
        assert losses[0] == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize("name", SPAWN)
def test_an_example_of_two_processes_runs_alone(name):
    path = os.pathsep.join([str(FOLDER.parent), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, str(FOLDER / f"{name}.py")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    assert losses_of(run.stdout)[0] == pytest.approx(math.log(2), abs=1e-5)


def test_pairs_of_pictures_come_in_twins_with_exchanged_roles():
    rows = vision_dpo.make_pairs(60, 3)
    for one, other in zip(rows[::2], rows[1::2], strict=True):
        assert (one["chosen"], one["rejected"]) == (other["rejected"], other["chosen"])
        right, wrong = (one[side][0]["content"].split() for side in ("chosen", "rejected"))
        # a plural follows its number
        differ = [a.removesuffix("s") != b.removesuffix("s") for a, b in zip(right, wrong, strict=True)]
        assert sum(differ) == 1


def test_a_drawing_has_as_many_pixels_of_its_colour_as_its_shapes():
    for number, count in (("one", 1), ("three", 3)):
        pixels = np.asarray(vision_dpo.draw_picture(number, "blue", "square", random.Random(1)))
        sizes = (pixels == vision_dpo.COLOURS["blue"]).all(-1).sum()
        assert count * 11**2 <= sizes <= count * 15**2


def test_the_vision_example_learns_from_pictures_alone(tmp_path, capsys):
    results = vision_dpo.main(["--quick", "--output", str(tmp_path)])
    assert results["accuracy_before"] < 0.75 and results["accuracy_after"] > 0.9
    assert results["accuracy_blank"] == 0.5 and results["accuracy_exchanged"] < 0.1
    assert results["losses"][0] > results["losses"][-1]
    assert "with blank pictures 0.50" in capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text()) == results
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    for row, drawn in zip(rows, vision_dpo.make_pairs(64, 1, differ_in=(1,)), strict=True):
        with Image.open(tmp_path / row["images"][0]) as picture:
            assert picture.tobytes() == drawn["images"][0].tobytes()
