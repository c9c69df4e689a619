"""trl under DistributedDataParallel and patch_trl(): two gloo ranks against one process on the joined batch."""

import pytest
import torch
from peft import LoraConfig

from tests.support.rank_processes import become_rank, free_port, run_ranks
from tests.support.trl_cases import train

pytestmark = pytest.mark.slow(30)

WORLD = 2
CASES = {
    "all weights": {},
    "adapter": {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)},
}


def run(folder, pairs, case, **options):
    """Three steps; the gradients of the first one, the weights at the end, and how the forwards went."""
    trainer, gradients = train(
        folder,
        patched=True,
        per_device_train_batch_size=pairs,
        max_steps=3,
        train_sampling_strategy="sequential",
        **CASES[case],
        **options,
    )
    inner = trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    wrapped = type(trainer.model_wrapped).__name__
    return {"gradients": gradients, "weights": weights, "calls": inner._dpofast_fused.calls, "wrapped": wrapped}


def rank_main(rank, port, folder, case):
    become_rank(rank, WORLD, port)
    torch.save(run(f"{folder}/{rank}", 2, case, ddp_backend="gloo"), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one_process(case, tmp_path):
    run_ranks(rank_main, (free_port(), str(tmp_path), case), WORLD)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]
    alone = run(tmp_path / "alone", 2 * WORLD, case)
    assert all(rank["wrapped"] == "DistributedDataParallel" and rank["calls"]["packed"] == 6 for rank in ranks)
    for what, tolerance in (("gradients", 1e-6), ("weights", 1e-5)):
        first, second = (rank[what] for rank in ranks)
        assert first.keys() == second.keys() == alone[what].keys() and first
        for name, value in first.items():
            assert torch.equal(value, second[name]), name
            torch.testing.assert_close(value, alone[what][name], atol=tolerance, rtol=1e-4, msg=name)
