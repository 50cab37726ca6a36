"""The measurements print what they promise, at a small size."""

import json

from icseg_jax import bench


def test_credit_is_a_small_part_of_an_update(capsys, monkeypatch):
    monkeypatch.setattr(bench, "LARGE", (4, 4, 64))
    small = ["rollout.prompts=2", "rollout.rollouts=2"]
    assert bench.main(["advantages", "experiments/embedded.yaml", *small]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["update"]["shape"] == [1, 2, 288] and told["large"]["shape"] == [4, 4, 64]
    for kind in ("scalar", "local"):
        assert 0 < told[kind]["share_of_update"] < 0.01


def test_bad_input_is_one_line(capsys):
    assert bench.main(["speed"]) == 2
    assert capsys.readouterr().err == "error: unknown measurement 'speed'; known: advantages\n"
