"""PackedBatch: describe(), layout() and errors."""

from dpofast import pack
from tests.support.examples import DESIGN


def test_describe_and_layout():
    (batch,) = pack([DESIGN])
    assert batch.describe() == (
        "6 tokens, 5 targets, 2 sequences, 1 pairs; sharing saves 33.3% of 9 tokens; "
        "a padded trainer computes 12 (2.00x)"
    )
    assert batch.layout().splitlines() == [
        "input_ids     10 11 12 20 | 30 31",
        "position_ids   0  1  2  3 |  3  4",
        "logit_rows     2  3 |  2  4  5",
        "targets       20 21 | 30 31 32",
        "cu_targets    [0, 2, 5]",
        "pairs         [[0, 1]]",
        "run           q rows [0,4) sees k rows 0..3",
        "run           q rows [4,6) sees k rows 0..2 4..5",
    ]
