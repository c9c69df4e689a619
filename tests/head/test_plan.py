"""The head's byte plans: the buffers that they name, and the error that prints them."""

import pytest
import torch

from dpofast.head.options import LogitOptions
from dpofast.head.planning.plan import Buffer, HeadPlan, TilePlan, total_bytes

BUDGET = 1 << 20


def test_a_buffer_knows_its_bytes_and_how_to_print_itself():
    buffer = Buffer("logits", 3, 50, torch.float32)
    assert buffer.bytes == 600 and str(buffer) == "logits (3, 50) float32"
    assert total_bytes([buffer, Buffer("E", 3, 50, torch.bfloat16)]) == 900


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_named_buffers_are_the_plan(dtype, keep):
    weight = torch.empty(500, 16, dtype=dtype)
    head = HeadPlan.make(2000, weight, BUDGET, keep=keep)
    tile = TilePlan.make(2000, weight, BUDGET, LogitOptions(softcap=3.0), keep=keep)
    for plan in (head, tile):
        assert total_bytes(plan.buffers) <= BUDGET
        rows = {buffer.name: buffer.rows for buffer in plan.buffers}
        assert rows.get("kept rows of E", 0) == plan.kept_rows
        assert ("db before it is rounded" in rows) == keep
    assert {buffer.name: buffer.rows for buffer in tile.buffers}["logits"] == tile.rows


def test_a_budget_too_small_names_what_one_row_needs():
    weight = torch.empty(50, 4, dtype=torch.bfloat16)
    for make in (
        lambda budget: HeadPlan.make(9, weight, budget, keep=True),
        lambda budget: TilePlan.make(9, weight, budget, LogitOptions(), keep=True),
    ):
        with pytest.raises(ValueError, match=r"at least one row of 50 logits .* For one row: logits \(1, "):
            make(1)


def test_temporaries_of_a_tiny_budget_leave_room_for_a_row():
    """They were sized by an eighth of the budget, whatever was left of it beside a tile of the weight."""
    weight = torch.empty(21, 67, dtype=torch.float16)
    plan = TilePlan.make(3, weight, 2147, LogitOptions(softcap=3.0), keep=True)
    assert plan.block_rows == 1 and plan.kept_rows >= 0 and total_bytes(plan.buffers) <= 2147
