"""The measurements print what they promise, at a small size."""

import json

from icseg_jax import bench


def test_credit_is_a_small_part_of_an_update(capsys, monkeypatch):
    monkeypatch.setattr(bench, "LARGE", (4, 4, 64))
    small = ["rollout.prompts=4"]
    assert bench.main(["advantages", "experiments/embedded.yaml", *small]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["update"]["shape"] == [2, 8, 384] and told["large"]["shape"] == [4, 4, 64]
    for kind in ("scalar", "local"):
        assert 0 < told[kind]["share_of_update"] < 0.01


def test_the_shipped_base_sees(capsys):
    """Held-out scenes; the floors are well below what the base does (experiments/README.md)."""
    assert bench.main(["perception", "policy.path=asset:embedded_base"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["boxes"] > 0.85 and min(told["words"].values()) > 0.9
    assert told["counted"]["boxes"] > 100 and max(told["corner_errors"].values()) < 30


def test_the_shipped_base_reads_its_lists(capsys):
    """As above."""
    assert bench.main(["reading", "policy.path=asset:embedded_base", "warmstart.scenes=4"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert set(told) == {"first", "later"}
    for kinds in told.values():
        assert set(kinds) <= {"more", "place", "ruled_out", "differ"} and "more" in kinds
        assert all(kind["right"] > 0.8 and kind["of"] > 0 for name, kind in kinds.items() if name != "place")
    assert told["later"]["place"]["of"] == told["later"]["ruled_out"]["of"] > 20
    assert told["later"]["place"]["right"] > 0.95


def test_bad_input_is_one_line(capsys):
    assert bench.main(["advantages", "update.loss=sdpo"]) == 2
    assert capsys.readouterr().err.startswith("error: update.loss=sdpo: ")
    assert bench.main(["speed"]) == 2
    assert capsys.readouterr().err == "error: unknown measurement 'speed'; known: advantages, perception, reading\n"
