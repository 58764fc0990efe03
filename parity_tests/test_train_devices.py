"""A training is the same on any number of devices and processes, and none waits for one that has died."""

import json
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from parity_tests.commands import start_training
from parity_tests.many_devices import distance, trained
from parity_tests.test_processes import free_port
from train import loop
from train.__main__ import main
from train.config import ModelName, RngName
from train.loop import Learner

# Plain SGD: Adam divides gradients by their own size, and so makes much of rounding in the first steps.
FLAGS = [
    "--model",
    "net",
    "--epochs",
    "1",
    "--checkpoint-every",
    "8",
    "--batch-size",
    "30",
    "--optimizer",
    "sgd",
    "--lr",
    "0.02",
]


# Ours; or JAX's own, which ends a process at once when process 0 is gone.
TOLD = ("error: a process of this training has ended or failed", "another task died")


@pytest.mark.parametrize(("model", "rng"), [("cnn", "torch"), ("net", "torch"), ("net", "jax")])
def test_many_devices_train_as_one(model: ModelName, rng: RngName) -> None:
    alone, epochs = trained(model, rng, 1)
    for count in (2, 4, 8) if (model, rng) == ("net", "torch") else (8,):
        weights, found = trained(model, rng, count)
        assert distance(weights, alone) < 1e-13
        for ours, expected in zip(found, epochs, strict=True):
            for phase in ("training", "validation"):
                a, b = getattr(ours, phase), getattr(expected, phase)
                assert (a.steps, a.images, a.accuracy) == (b.steps, b.images, b.accuracy)
                assert (a.loss, a.cost) == pytest.approx((b.loss, b.cost), rel=1e-12)
    if model == "cnn":  # the quickest to compile
        assert distance(trained(model, rng, 1, seed=1)[0], alone) > 1e-2


def test_calls_and_dispatches_do_not_change_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """4 steps an epoch, each in two calls; in one call on two devices; three steps in one dispatch, on one and two."""
    dispatches = []
    advance = Learner._advance

    def counted(learner: Learner, batches: np.ndarray, last: jax.Array) -> Sequence[jax.Array]:
        costs = advance(learner, batches, last)
        dispatches.append(costs.size)
        return costs

    monkeypatch.setattr(Learner, "_advance", counted)
    monkeypatch.setattr(loop, "CALL", 15)
    monkeypatch.setattr(loop, "PIECE", 20)
    several = {"dispatch": 3}
    ways: list[dict[str, int]] = [{"devices": 1}, {"devices": 2}, {"devices": 1} | several, {"devices": 2} | several]
    results = [trained("net", "torch", **way) for way in ways]
    assert dispatches == [1] * 16 + [3, 1, 1, 1, 1, 1] * 2  # a dispatch begins at a multiple of its length
    for weights, epochs in results[1:]:
        assert distance(weights, results[0][0]) < 1e-13
        assert epochs[1].training.loss == pytest.approx(results[0][1][1].training.loss, rel=1e-12)


def start(*arguments: str | Path) -> list[subprocess.Popen[str]]:
    """The command in two processes of one device each."""
    place = ("--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", "2", "--process-id")
    return [start_training(*arguments, *place, str(index)) for index in range(2)]


def epochs_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "net/metrics.jsonl").read_text().splitlines()]


def assert_trained_alike(ours: Path, theirs: Path) -> None:
    (mine,), (expected,) = epochs_of(ours), epochs_of(theirs)
    assert mine["training"]["steps"] == expected["training"]["steps"]
    assert mine["training"]["accuracy"] == pytest.approx(expected["training"]["accuracy"], abs=2e-3)
    for phase in ("training", "validation"):  # this process compiles otherwise, which alone makes 1.1e-5
        assert mine[phase]["loss"] == pytest.approx(expected[phase]["loss"], rel=1e-4)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process with one device, from the beginning to the end."""
    run = tmp_path_factory.mktemp("alone")
    assert main([*FLAGS, "--devices", "1", "--out", str(run)]) == 0
    return run


def test_the_comparison_sees_other_random_numbers(alone: Path, tmp_path: Path) -> None:
    assert main([*FLAGS, "--devices", "1", "--rng", "jax", "--out", str(tmp_path)]) == 0
    with pytest.raises(AssertionError):
        assert_trained_alike(tmp_path, alone)


def test_two_processes_go_on_where_one_has_stopped_with_several_steps_at_once(alone: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(alone, tmp_path / "run"))
    *_, newest = sorted((run / "net/checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    shutil.rmtree(newest)  # the one before is from the middle of the epoch
    processes = start("--resume", run, "--dispatch", "4")
    outputs = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert re.search("going on after step [1-9]", outputs[0][0])
    assert "loss" in outputs[0][0]
    assert "loss" not in outputs[1][0], "only process 0 prints"
    assert_trained_alike(run, alone)


@pytest.mark.parametrize("dying", [0, 1])
def test_a_death_ends_the_other_process_and_one_process_goes_on(
    dying: int, alone: Path, tmp_path: Path, capsys: Any
) -> None:
    run = tmp_path / "run"
    processes = start(*FLAGS, "--out", run)
    wait_for_a_checkpoint(processes[0], run)
    processes[dying].kill()
    processes[dying].communicate()
    _, error = processes[1 - dying].communicate(timeout=60)
    assert processes[1 - dying].returncode != 0
    assert any(message in error for message in TOLD), error
    assert main(["--resume", str(run), "--devices", "1"]) == 0
    assert re.search("going on after step [1-9]", capsys.readouterr().out)
    assert_trained_alike(run, alone)


def test_an_error_of_one_process_ends_both_at_once(alone: Path) -> None:
    processes = start(*FLAGS, "--out", alone)  # where only process 0 sees that there is a run already
    (_, own), (_, others) = (process.communicate(timeout=60) for process in processes)
    assert processes[0].returncode == 2
    assert own.splitlines()[-1].startswith("error: --out")
    assert processes[1].returncode != 0
    assert any(message in others for message in TOLD), others


def wait_for_a_checkpoint(process: subprocess.Popen[str], run: Path) -> None:
    while process.poll() is None and not any(path.name.isdigit() for path in (run / "net/checkpoints").glob("*")):
        time.sleep(0.02)
    assert process.poll() is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--devices 0", "--devices must be at least 1, got 0"),
        ("--devices 9", "--devices is 9, but there are 8"),
        ("--dispatch 0", "--dispatch must be at least 1, got 0"),
        ("--num-processes 2", "--num-processes and --process-id need --coordinator"),
        ("--coordinator h:1", "--coordinator needs --num-processes and --process-id"),
        ("--coordinator h --num-processes 2 --process-id 0", "--coordinator must be HOST:PORT or auto, got h"),
        (
            "--coordinator h:99999 --num-processes 2 --process-id 0",
            "--coordinator must be HOST:PORT or auto, got h:99999",
        ),
        ("--coordinator h:1 --num-processes 2 --process-id 2", "--process-id must lie in [0, 2), got 2"),
    ],
)
def test_impossible_places_are_refused(flags: str, message: str, capsys: Any) -> None:
    assert main(flags.split()) == 2
    assert message in capsys.readouterr().err
