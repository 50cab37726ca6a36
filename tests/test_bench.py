"""The measurements print what they promise, at a small size."""

import json

from icseg_jax import bench


def test_credit_is_a_small_part_of_an_update(capsys, monkeypatch):
    monkeypatch.setattr(bench, "LARGE", (4, 4, 64))
    small = ["rollout.prompts=4"]
    assert bench.main(["advantages", "experiments/embedded.yaml", *small]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["update"]["shape"] == [2, 8, 288] and told["large"]["shape"] == [4, 4, 64]
    for kind in ("scalar", "local"):
        assert 0 < told[kind]["share_of_update"] < 0.01


def test_the_shipped_base_sees(capsys):
    """Held-out scenes; the floors are well below what the base does (experiments/README.md)."""
    assert bench.main(["perception", "policy.path=asset:embedded_base"]) == 0
    told = json.loads(capsys.readouterr().out)
    # A list's first word is its color, and this base was taught lists without places before it: parts 4 to 7 of the
    # warm start bring one that was not.
    words = {a: share for a, share in told["words"].items() if a != "color"}
    assert told["boxes"] > 0.85 and min(words.values()) > 0.85
    assert told["counted"]["boxes"] > 100 and max(told["corner_errors"].values()) < 30


def test_reading_counts_what_lists_hold(capsys):
    """The shipped base was taught another form of list, so only that every kind is found and counted."""
    assert bench.main(["reading", "policy.path=asset:embedded_base", "warmstart.scenes=4"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert set(told) == {"first", "later"}
    for kinds in told.values():
        assert set(kinds) <= {"more", "place", "ruled_out", "differ"} and "more" in kinds
        assert all(0 <= kind["right"] <= 1 and kind["of"] > 0 for kind in kinds.values())
    assert told["later"]["place"]["of"] == told["later"]["ruled_out"]["of"] > 20


def test_bad_input_is_one_line(capsys):
    assert bench.main(["advantages", "update.loss=sdpo"]) == 2
    assert capsys.readouterr().err.startswith("error: update.loss=sdpo: ")
    assert bench.main(["speed"]) == 2
    assert capsys.readouterr().err == "error: unknown measurement 'speed'; known: advantages, perception, reading\n"
