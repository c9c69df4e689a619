"""The run whose checkpoints the tests of this folder damage, resume and refuse."""

import shutil

import pytest


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """checkpoint-2, -4 and -6 of a run of six steps, and its weights."""
    # Imported here: pytest loads this file before tests/conftest.py has chosen interpreter or GPU for the kernels.
    from tests.support.tiny_training import SAVING, make_trainer, weights_of

    out = tmp_path_factory.mktemp("trained")
    trainer = make_trainer(out, **SAVING)
    trainer.train()
    return out, weights_of(trainer)


@pytest.fixture
def run(trained, tmp_path):
    """A copy of that run's folder, to be damaged."""
    return shutil.copytree(trained[0], tmp_path / "run")


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """By mode: the folder of runs on two ranks, written once, and what each rank ended with."""
    from tests.support.resume_cases import CASES, MODES, on_ranks

    done = {}

    def write(mode):
        if mode not in done:
            folder = tmp_path_factory.mktemp(mode)
            done[mode] = folder, on_ranks(folder, 2, CASES, MODES[mode])
        return done[mode]

    return write
