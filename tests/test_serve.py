"""Users behind a real server: `transformers serve` with a small random Qwen3-VL, on loopback (see serve_small.py)."""

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from serve_small import MODEL
from test_simulator import EMBEDDED, QUESTION, SECRET, SHOWN, Spoken, meet, samples  # noqa: F401 - a fixture
from test_train import ROOT, command, place, run  # noqa: F401 - a fixture

from icseg_jax import simulator, train

WANTED = ("torch", "torchvision", "transformers", "fastapi", "uvicorn", "accelerate")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not all(map(importlib.util.find_spec, WANTED)), reason="no transformers serve here"),
]
PATIENCE = 900  # seconds until the server must be up, on a busy machine


class Served:
    """`transformers serve` in a process of its own, which can be killed and started again on the same port."""

    def __init__(self, folder: Path):
        self.home, self.log = folder / "huggingface", folder / "server.log"
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.start()

    def start(self):
        here = os.environ | {"HF_HOME": str(self.home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        here.pop("OPENAI_API_KEY", None)
        launcher = [sys.executable, str(Path(__file__).parent / "serve_small.py"), str(self.home), str(self.port)]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(launcher, env=here, stdout=log, stderr=log, start_new_session=True)
        end = time.monotonic() + PATIENCE
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(self.url + "/models", timeout=5):
                return
            if self.process.poll() is not None or time.monotonic() > end:
                self.kill()
                pytest.fail(f"transformers serve did not come up: {self.log.read_text()[-2000:]}")
            time.sleep(0.5)

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    there = Served(tmp_path_factory.mktemp("serve"))
    yield there
    there.kill()


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    import openai  # noqa: F401 - seconds, on a busy machine, which are no deadline's

    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setenv("ICSEG_ANSWERS", str(tmp_path / "answers"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def config_of(served, *more):
    return train.load_config(EMBEDDED, [
        "simulator.kind=endpoint", f"simulator.url={served.url}", f"simulator.model={MODEL}", "simulator.timeout=60",
        "simulator.max_in_flight=4", "reward.weights.mask=0", *more])


def test_a_served_model_takes_pictures_several_questions_at_a_time(served, samples, monkeypatch):  # noqa: F811
    user, _, _ = meet(config_of(served))  # lists the model, takes a picture
    now, most, real = 0, 0, simulator.Endpoint._try

    async def watched(self, *arguments):
        nonlocal now, most
        now += 1
        most = max(most, now)
        try:
            return await real(self, *arguments)
        finally:
            now -= 1

    monkeypatch.setattr(simulator.Endpoint, "_try", watched)
    asked = [(samples[i], SHOWN, f"{QUESTION} {word}") for i in (0, 1) for word in "abc"]
    assert simulator.answer_all(user, asked) == ["blue"] * 6
    assert most == 4 and user.host.counts == {"asked": 6, "kept": 0, "unreadable": 0, "failed": 0}
    with pytest.raises(train.ConfigError, match=f"lists no model 'another'; it has '{MODEL}'") as failed:
        meet(config_of(served, "simulator.model=another"))
    assert "\n" not in str(failed.value) and SECRET not in str(failed.value) + served.log.read_text()


def test_a_step_goes_on_when_the_server_is_killed_in_its_middle(served, samples, monkeypatch):  # noqa: F811
    monkeypatch.setattr(simulator, "PAUSE", 0.5)
    config = config_of(served)
    sampler, (user, _, expert) = Spoken(config), meet(config)

    def step(*which):
        prompts = [train.Prompt(samples[i], [0, 3, 7, 11], sampler.speaker) for i in which]
        dialogues = sampler.play(None, prompts, [1.0] * 2, user, seed=0, step=0, clock=train.Clock())
        return dialogues, *train.score(dialogues, config, expert, None)

    dialogues, scores, _, faults = step(0, 1)
    assert scores.valid.all() and faults["user_failed"] == 0
    assert all(d.end == "answered" and d.questions == [(QUESTION, "blue")] for row in dialogues for d in row)

    # In the middle of a step: while its questions are on their way.
    real, killers = simulator.Endpoint._try, []

    async def killed(self, *arguments):
        if not killers:
            killers.append(threading.Thread(target=served.kill))
            killers[0].start()
        return await real(self, *arguments)

    user.host.timeout = 3.0
    with monkeypatch.context() as patch:
        patch.setattr(simulator.Endpoint, "_try", killed)
        dialogues, scores, _, faults = step(0, 2)  # what was asked of sample 0 is known
    killers[0].join()
    assert scores.valid.tolist() == [[True] * 2, [False] * 2] and faults["user_failed"] == 2
    assert dialogues[0][0].end == "answered" and dialogues[1][0].end == "unanswered"

    served.start()
    user.host.timeout = 60.0
    time.sleep(0.6)
    dialogues, scores, _, faults = step(2, 3)
    assert scores.valid.all() and faults["user_failed"] == 0 and faults["diagnosed"] == 4
    batch, _ = train.pack(dialogues, config, sampler.speaker)
    assert batch.rows.trained.any()


def test_a_run_finishes_when_the_server_is_killed_and_comes_back(served, place):  # noqa: F811
    """The trainer itself, which stands still while the server starts again, so that steps are left for it."""
    there = ("kind=endpoint", f"url={served.url}", f"model={MODEL}", "timeout=20", "max_in_flight=4")
    more = ("steps=10", "evaluate.every=0", "checkpoint.every=0", *(f"simulator.{item}" for item in there))
    folder = place / "served"
    trainer = subprocess.Popen(
        command(*run(place, "served", *more)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"OPENAI_API_KEY": SECRET, "ICSEG_ANSWERS": ""})  # fmt: skip

    def wait_for(what):
        end = time.monotonic() + PATIENCE
        while True:
            if trainer.poll() is not None or time.monotonic() > end:
                trainer.kill()
                pytest.fail(trainer.communicate(timeout=60)[0][-3000:])
            with contextlib.suppress(OSError, ValueError):
                rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
                if any(map(what, rows)):
                    return
            time.sleep(0.1)

    try:
        wait_for(lambda row: True)
        served.kill()
        wait_for(lambda row: row["user_failed"] > 0)
        trainer.send_signal(signal.SIGSTOP)
        served.start()
        time.sleep(simulator.PAUSE)
        trainer.send_signal(signal.SIGCONT)
        said = trainer.communicate(timeout=PATIENCE)[0]
    finally:
        trainer.kill()
        trainer.wait()
    assert trainer.returncode == 0, said[-3000:]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert any(row["user_failed"] for row in rows) and not rows[-1]["user_failed"]
    told = json.loads((folder / "summary.json").read_text())["models"]["simulator"]
    assert told["model"] == MODEL and len(told["prompt_hash"]) == 16 and told["failed"] > 0 and told["asked"] > 0
    written = [file.read_bytes() for file in folder.rglob("*") if file.is_file()]
    assert SECRET not in said and not any(SECRET.encode() in content for content in written)
