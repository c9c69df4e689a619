"""What pack() and the C++ packer behind it refuse, each with a message that names the example and the field."""

import numpy as np
import pytest

from dpofast import _C
from dpofast.packing.pack import pack
from tests.support.examples import DESIGN, example, group


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (example([], [1], [2]), r"examples\[1\]: prompt_ids is empty"),
        (example([1], [], [2]), r"examples\[1\]: chosen_ids is empty"),
        (example([1], [2], []), r"examples\[1\]: rejected_ids is empty"),
        (example([1], [2, 3], [2, 3]), r"examples\[1\]: chosen_ids and rejected_ids form a pair but are equal"),
        (example([1, -5], [2], [3]), r"examples\[1\]: prompt_ids\[1\] is -5; expected a token id of 0 or"),
        (example([1], [2], [3, 100]), r"examples\[1\]: rejected_ids\[1\] is 100; .* below vocab_size 100"),
        (example([1], np.array([2**64 - 1], np.uint64), [3]), r"chosen_ids: .*below 2\*\*63, got 18446744073709551615"),
        (example([1], [2**63], [3]), r"chosen_ids: .*below 2\*\*63, got 9223372036854775808"),
        (example([1], [2**70], [3]), r"chosen_ids: expected integers, .* of object"),
        (example([1], [[2]], [3]), r"examples\[1\]: chosen_ids: expected integers, .*got shape \(1, 1\) of int64"),
        (example([1], [[2], [3, 4]], [3]), r"examples\[1\]: chosen_ids: expected integers, a 1-D array or list; "),
        (example([1], [2.0], [3]), r"examples\[1\]: chosen_ids: expected integers, .* of float64"),
        (example([1], [True], [3]), r"examples\[1\]: chosen_ids: expected integers, .* of bool"),
        (example([1], "abc", [3]), r"examples\[1\]: chosen_ids: expected integers, .*got shape \(\) of <U3"),
        (example([1], [2, None], [3]), r"examples\[1\]: chosen_ids: expected integers, .* of object"),
        (example([1], 2, [3]), r"examples\[1\]: chosen_ids: expected integers, .*got shape \(\)"),
        (example([1], None, [3]), r"examples\[1\]: chosen_ids missing; expected prompt_ids, chosen_ids, rejected_ids"),
        ({"prompt_ids": [1]}, r"examples\[1\]: chosen_ids, rejected_ids missing; .*; got prompt_ids"),
        ({"branches": [[1]]}, r"examples\[1\]: prompt_ids, pairs missing"),
        (DESIGN | {"branches": [[1], [2]], "pairs": [(0, 1)]}, r"examples\[1\]: has both branches and chosen_ids"),
        ([1, 2, 3], r"examples\[1\]: expected a mapping, got list"),
        (group([1], [], [(0, 1)]), r"examples\[1\]: branches is empty"),
        (group([1], 7, [(0, 1)]), r"examples\[1\]: branches: expected a list, got int"),
        (group([1], [[2], []], [(0, 1)]), r"examples\[1\]: branches\[1\] is empty"),
        (group([1], [[2], [0.5]], [(0, 1)]), r"examples\[1\]: branches\[1\]: expected integers"),
        (group([1], [[2], [3]], []), r"examples\[1\]: pairs is empty; expected at least one pair"),
        (group([1], [[2], [3]], [(0, 2)]), r"examples\[1\]: pairs\[0\] names branch 2; expected 0 to 1"),
        (group([1], [[2], [3]], [(0, 1), (-1, 0)]), r"examples\[1\]: pairs\[1\] names branch -1; expected 0 to 1"),
        (group([1], [[2], [3]], [(0, 1), (1, 1)]), r"examples\[1\]: branches\[1\] and branches\[1\] form a pair but"),
        (group([1], [[2], [3], [2]], [(0, 1), (2, 0)]), r"examples\[1\]: branches\[2\] and branches\[0\] form a pair"),
        (group([1], [[2], [3], [4]], [(0, 1)]), r"examples\[1\]: no pair uses branches\[2\]"),
        (group([1], [[2], [3]], [0, 1]), r"examples\[1\]: pairs of \(chosen, rejected\) branch indices: expected"),
        (group([1], [[2], [3]], [(0, 1, 1)]), r"pairs of .*: expected integers, .* of 2 each, got shape \(1, 3\)"),
        (group([1], [[2], [3]], [(0.0, 1.0)]), r"pairs of .*: expected integers, .* of float64"),
    ],
)
def test_a_bad_example_is_named(bad, message):
    with pytest.raises(ValueError, match=message):
        pack([DESIGN, bad], vocab_size=100)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({}, {"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0}, r"examples\[1\]: has reference log-probs, unlike"),
        ({"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0}, {}, r"examples\[1\]: no reference log-probs, unlike"),
        ({"ref_chosen_logps": -1.0}, {}, r"examples\[0\]: ref_rejected_logps: expected a finite float, got None"),
        ({"ref_chosen_logps": np.nan, "ref_rejected_logps": -2.0}, {}, r"expected a finite float, got nan"),
        ({"ref_chosen_logps": [1.0, 2.0], "ref_rejected_logps": -2.0}, {}, r"expected a finite float, got \["),
    ],
)
def test_bad_reference_logps_of_pairs(first, second, message):
    with pytest.raises(ValueError, match=message):
        pack([DESIGN | first, DESIGN | second])


@pytest.mark.parametrize(
    ("refs", "message"),
    [
        ([-1.0], r"examples\[0\]: ref_logps: expected 2 floats, one a branch, got 1"),
        (-1.0, r"examples\[0\]: ref_logps: expected a list, got float"),
        ([-1.0, -np.inf], r"examples\[0\]: ref_logps\[1\]: expected a finite float, got -inf"),
    ],
)
def test_bad_reference_logps_of_groups(refs, message):
    with pytest.raises(ValueError, match=message):
        pack([group([1], [[2], [3]], [(0, 1)], ref_logps=refs)])


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "8", 2**63])
def test_bad_limits(value):
    with pytest.raises(ValueError, match="max_tokens: expected None or an integer in"):
        pack([DESIGN], value)
    with pytest.raises(ValueError, match="max_targets: expected None or an integer in"):
        pack([DESIGN], max_targets=value)
    with pytest.raises(ValueError, match="num_threads: expected an integer in"):
        pack([DESIGN], num_threads=value)
    with pytest.raises(ValueError, match="vocab_size: expected None or an integer in"):
        pack([DESIGN], vocab_size=value)


def packer(**changes):
    arrays = {
        "sequences": [[1], [2], [3]],
        "branch_counts": [2],
        "comparison_counts": [1],
        "members": [0, 1],
        "member_counts": [],
        "ranks": [],
        "variants": [],
    } | changes
    sequences = _C.Sequences.from_objects(arrays.pop("sequences"), lambda index: None)
    return _C.Packer(
        sequences=sequences,
        **{name: np.array(value, np.int64) for name, value in arrays.items()},
        forms=np.zeros(1, np.uint8),
        max_tokens=8,
        max_targets=8,
        share="prompt",
        vocab_size=_C.UNLIMITED,
        threads=1,
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"sequences": [[1], [2]]},
        {"sequences": [[1], [2], [3], [4]]},
        {"sequences": []},
        {"branch_counts": [3]},
        {"branch_counts": [-1]},
        {"branch_counts": [2**62]},
        {"branch_counts": [1, 1]},
        {"comparison_counts": [2]},
        {"comparison_counts": [0]},
        {"comparison_counts": [-1]},
        {"members": [0, 1, 0]},
        {"member_counts": [2]},
        {"ranks": [0, 1]},
        {"member_counts": [1, 1], "ranks": [0, 1]},
        {"member_counts": [3], "ranks": [0, 1]},
        {"member_counts": [2**62], "ranks": [0, 1]},
        {"member_counts": [2], "ranks": [0, 0]},
        {"member_counts": [2], "ranks": [0, 2]},
        {"member_counts": [2], "ranks": [1, 2]},
        {"variants": [0, 0]},
    ],
)
def test_the_extension_refuses_arrays_that_do_not_fit_together(changes):
    assert packer().shapes.tolist() == [[1, 2, 1, 2, 1, 0, 4]]
    assert packer(member_counts=[2], ranks=[0, 1]).shapes.tolist() == [[1, 2, 1, 2, 1, 2, 4]]
    with pytest.raises(ValueError):
        packer(**changes)


def test_the_extension_refuses_buffers_that_are_too_small():
    longs, ints = np.empty(7, np.int64), np.empty(8, np.int32)
    packer().fill(longs, ints, threads=1)
    for small in ((longs[1:], ints), (longs, ints[1:])):
        with pytest.raises(ValueError, match="longs and ints need 7 and 8 elements"):
            packer().fill(*small, threads=1)


@pytest.mark.parametrize("ref", [10**400, 10**5000, -(10**400), "nan", [1.0], None], ids=range(6))
def test_reference_logprobs_that_are_no_floats(ref):
    row = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3], "ref_rejected_logps": -1.0}
    with pytest.raises(ValueError, match=r"examples\[0\]: ref_chosen_logps: expected a finite float, got"):
        pack([row | {"ref_chosen_logps": ref}])
    columns = {name: (np.array(row[name]), np.array([0, 1])) for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
    with pytest.raises(ValueError, match="ref_chosen_logps"):
        pack(columns | {"ref_chosen_logps": [ref], "ref_rejected_logps": [-1.0]})


A = np.array


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((A([3, 4]), A([1]), 9, 9, 1), "targets: expected 2, one a length, got 1"),
        ((A([3, 4]), A([1, 1, 1]), 9, 9, 1), "targets: expected 2, one a length, got 3"),
        ((A([3, 4]), A([], np.int64), 9, 9, 1), "targets: expected one a length, got none"),
        ((A([3, 4]), None, 9, 9, 1), "targets: expected one a length with max_targets, got none"),
        ((A([3, 4]), A([1, 0]), 9, 9, 1), r"targets\[1\] is 0; expected 1 to 2147483647"),
        ((A([[3, 4]]), None, 9, _C.UNLIMITED, 1), "lengths: expected an array of 1 dimensions, got 2"),
        ((A([3]), None, 0, _C.UNLIMITED, 1), "max_tokens: expected 1 or more, got 0"),
        ((A([3]), A([1]), 9, -5, 1), "max_targets: expected 1 or more, got -5"),
        ((A([3]), None, 9, _C.UNLIMITED, 0), "ranks: expected 1 or more, got 0"),
        ((A([3]), None, 9, _C.UNLIMITED, -1), "ranks: expected 1 or more, got -1"),
        ((A([3]), None, 9, _C.UNLIMITED, 2**62), "ranks: expected at most 1048576, got 4611686018427387904"),
    ],
)
@pytest.mark.parametrize("equal_counts", [False, True])
def test_the_extensions_plan_checks_its_own_arguments(arguments, message, equal_counts):
    with pytest.raises(ValueError, match=message):
        _C.plan(*arguments, equal_counts)


@pytest.mark.parametrize("other", [A([3.0]), A([3], np.int32), [3]], ids=["float", "int32", "list"])
def test_the_extensions_plan_takes_int64_arrays_only(other):
    for arguments in ((other, None), (A([3]), other), (None, None)):
        with pytest.raises(TypeError, match="incompatible function arguments"):
            _C.plan(*arguments, 9, _C.UNLIMITED, 1, False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_tokens": 0}, "max_tokens: expected 1 or more, got 0"),
        ({"max_targets": -1}, "max_targets: expected 1 or more, got -1"),
        ({"vocab_size": 0}, "vocab_size: expected 1 or more, got 0"),
        ({"threads": 0}, "threads: expected 1 or more, got 0"),
        ({"members": A([[0, 1]])}, "members: expected an array of 1 dimensions, got 2"),
        ({"ranks": A([[0, 1]])}, "ranks: expected an array of 1 dimensions, got 2"),
        ({"branch_counts": A([[2]])}, "branch_counts: expected an array of 1 dimensions, got 2"),
    ],
)
def test_the_extensions_packer_checks_its_own_arguments(change, message):
    sequences = _C.Sequences.from_objects([[1], [2], [3]], lambda index: None)
    none = {name: A([], np.int64) for name in ("member_counts", "ranks", "variants")}
    arrays = {"branch_counts": A([2]), "comparison_counts": A([1]), "members": A([0, 1]), "forms": A([0], np.uint8)}
    arrays |= none
    limits = {"max_tokens": 9, "max_targets": 9, "share": "prompt", "vocab_size": 9, "threads": 1}
    assert _C.Packer(sequences, **arrays, **limits).shapes.shape == (1, 7)
    with pytest.raises(ValueError, match=message):
        _C.Packer(sequences, **{**arrays, **limits, **change})
    with pytest.raises(TypeError, match="incompatible"):
        _C.Packer(None, **arrays, **limits)
