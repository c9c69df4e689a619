"""bench.sharing and its profiles: what sequences share is what the profiles say, and counts are right."""

import json

import numpy as np
import pytest

from bench import packing, sharing
from bench.cases import RANDOM_PROFILES, SHARED_PROFILES
from bench.random_pairs import build_random_pairs, random_rows
from dpofast.packing.examples import read_examples


def same(a, b):
    """Tokens that two sequences begin with alike."""
    length = min(len(a), len(b))
    return int((np.append(a[:length] == b[:length], False)).argmin())


def test_prompts_of_tools_begin_with_one_system_prompt_of_2000_tokens():
    rows = random_rows(SHARED_PROFILES["tools"], 64)
    assert all(same(row["prompt"], rows[0]["prompt"]) == 2000 for row in rows[1:])
    assert np.mean([len(row["prompt"]) for row in rows]) == pytest.approx(2100, abs=20)
    assert np.mean([len(row[side]) for row in rows for side in ("chosen", "rejected")]) == pytest.approx(150, abs=20)


def test_a_later_turn_begins_with_the_prompt_and_the_chosen_response_of_the_turn_before():
    rows = random_rows(SHARED_PROFILES["turns"], 64)
    turns, counts = 1, []
    for before, row in zip(rows, rows[1:], strict=False):
        history = np.concatenate((before["prompt"], before["chosen"]))
        if same(row["prompt"], history) == len(history):
            turns += 1
        else:
            counts.append(turns)
            turns = 1
    assert set(counts) == {2, 3, 4, 5, 6}


def test_responses_of_steps_share_half_of_the_shorter_one():
    for row in random_rows(SHARED_PROFILES["steps"], 20):
        assert same(row["chosen"], row["rejected"]) == min(len(row["chosen"]), len(row["rejected"])) // 2


def test_the_text_of_a_pair_has_one_word_for_each_token():
    profile = RANDOM_PROFILES["steps"]
    for row, text in zip(random_rows(profile, 5), build_random_pairs(profile, 5), strict=True):
        for name, ids in row.items():
            assert text[name] == "".join(f"w{token} " for token in ids)


def test_beginnings_stand_before_every_prompt_and_change_nothing_else():
    rng = np.random.default_rng(3)
    columns = packing.make_columns(rng, 50, np.int32)
    longer = sharing.with_beginnings(columns, rng, 4, 6, 1000)
    values, offsets = columns["prompt_ids"]
    new_values, new_offsets = longer["prompt_ids"]
    begins = set()
    for i in range(50):
        prompt = new_values[new_offsets[i] : new_offsets[i + 1]]
        begins.add(tuple(prompt[:6].tolist()))
        assert np.array_equal(prompt[6:], values[offsets[i] : offsets[i + 1]])
    assert len(begins) == 4
    assert longer["chosen_ids"] is columns["chosen_ids"]


def test_unique_tokens_counts_the_nodes_of_a_trie():
    sequences = [np.array(ids) for ids in ([1, 2, 3], [1, 2, 4, 5], [6], [1, 2, 3])]
    assert sharing.unique_tokens(sequences) == (6, 3, 2)


def test_planning_again_is_planning_anew_with_the_new_limits():
    flat = read_examples(sharing.columns_of(random_rows(SHARED_PROFILES["turns"], 40)))
    again = sharing.packer(flat, 16_384, "prefix")
    again.plan(3000, 900, 2)
    anew = flat.packer(max_tokens=3000, max_targets=900, share="prefix", vocab_size=1 << 31)
    assert np.array_equal(again.shapes, anew.shapes)
    with pytest.raises(ValueError, match="max_targets: expected 1 or more, got 0"):
        again.plan(10, 0, 1)


def test_a_small_run_says_what_sharing_is_worth(tmp_path, capsys):
    small = ["--sharing", "--planned", "2000", "--pairs", "128", "--rounds", "1", "--clock", "cpu"]
    assert packing.main([*small, "--results", str(tmp_path / "packing.jsonl")]) == 0
    figures = json.loads((tmp_path / "packing.jsonl").read_text())["figures"]["sharing"]
    tools = {share: row["positions"] for share, row in figures["positions"]["tools"].items()}
    assert tools["prompt"] >= 5 * tools["prefix"]
    assert tools["none"] > tools["prompt"]
    assert all(row["larger_steps"] == 0 for row in figures["packing"].values())
    assert all(row["prefix"]["positions"] <= row["prompt"]["positions"] for row in figures["planned"].values())
    for row in figures["tree_row"].values():  # against_tree_row compared both with a trie in Python
        assert row["rows"]["dpofast"] < row["unique_tokens"] < row["rows"]["trl"]
    assert "tools: positions with prefix" in capsys.readouterr().out
