"""A training that is killed at any moment and resumed ends as if nothing had happened, bit for bit."""

import asyncio
import gc
import json
import random
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import settings

from parity_tests.commands import start_training
from parity_tests.test_train_data import idx_bytes
from train import evaluate, export, idx, predict
from train.__main__ import main
from train.checkpoint import Checkpoints, _without_late_failures
from train.config import Config, RngName
from train.data import load
from train.loop import Epoch, Learner, Phase
from train.report import Monitor

FLAGS = ("--devices", "1", "--model", "net", "--epochs", "2", "--checkpoint-every", "8", "--save-model")
KILLS = 20 if settings.default.max_examples > 1000 else 3


def metrics(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "net" / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "timing"} for row in rows]


@cache
def new_learner(rng: RngName) -> Learner:
    config = Config(epochs=2)
    return Learner("net", config.recipe("net"), load("digits"), seed=9, rng=rng)


def restored(run: Path, rng: RngName = "torch") -> Learner:
    """The learner where a run has ended: weights, optimizer and random state."""
    learner = new_learner(rng)
    learner.epoch = 0
    Checkpoints(run / "net" / "checkpoints").restore(learner)
    assert learner.epoch
    return learner


def kill_after_a_new_checkpoint(process: subprocess.Popen[str], run: Path, delay: float) -> None:
    """SIGKILL, some time after the process has written a checkpoint, or when it has ended by itself."""
    folder, began = run / "net" / "checkpoints", time.time()
    while process.poll() is None and not any(p.stat().st_mtime > began for p in folder.glob("[0-9]*")):
        time.sleep(0.01)
    time.sleep(delay)
    process.kill()
    process.communicate()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole")
    assert main([*FLAGS, "--out", str(run)]) == 0
    return run


def bits(run: Path, rng: RngName) -> tuple[Any, ...]:
    """All that a run has ended with, but for times."""
    end = restored(run, rng)
    leaves = jax.tree.leaves((nnx.to_pure_dict(nnx.split(end.trained())[1]), end.state.optimizer, end.random.state()))
    arrays = [jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in leaves]
    weights = (run / "net/model.safetensors").read_bytes()
    return metrics(run), weights, end.epoch, end.step, [np.asarray(array).tobytes() for array in arrays]


def assert_ended_alike(ours: Path, theirs: Path, rng: RngName = "torch") -> None:
    assert bits(ours, rng) == bits(theirs, rng)


def test_killed_and_resumed_run_ends_bit_for_bit_alike(tmp_path: Path) -> None:
    """All in processes of their own: the tests' own process compiles otherwise, and rounds otherwise."""
    whole, killed, delays = tmp_path / "whole", tmp_path / "killed", random.Random(0)
    reference = start_training(*FLAGS, "--out", whole)
    output = reference.communicate()
    assert reference.returncode == 0, output
    arguments: tuple[str | Path, ...] = (*FLAGS, "--out", killed)
    for _ in range(KILLS):
        kill_after_a_new_checkpoint(start_training(*arguments), killed, delays.uniform(0, 0.4))
        arguments = ("--resume", killed)
    last = start_training(*arguments)
    output = last.communicate()
    assert last.returncode == 0, output
    assert_ended_alike(killed, whole)


@pytest.mark.parametrize("changed", ["metrics", "weights", "checkpoint"])
def test_the_comparison_fails_on_a_change(whole: Path, tmp_path: Path, changed: str) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "net" / {"weights": "model.safetensors"}.get(changed, "metrics.jsonl")
    if changed == "checkpoint":
        shutil.rmtree(max((tmp_path / "net/checkpoints").glob("[0-9]*"), key=lambda path: int(path.name)))
    else:
        content = file.read_bytes()
        file.write_bytes(content.replace(b"0.", b"1.", 1) if changed == "metrics" else content[:-1] + b"?")
    with pytest.raises(AssertionError):
        assert_ended_alike(tmp_path, whole)


def copied(whole: Path, run: Path, *, newest: bool) -> Path:
    """A finished run as if killed before it had saved the model, or the newest checkpoint; its newest one."""
    shutil.copytree(whole, run, dirs_exist_ok=True)
    (run / "net/model.safetensors").unlink()
    *_, before, last = sorted((run / "net/checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    if newest:
        return last
    shutil.rmtree(last)
    return before


def damage(checkpoint: Path) -> None:
    for path in checkpoint.rglob("*"):
        if path.is_file() and path.stat().st_size > 1000:
            path.write_bytes(path.read_bytes()[:100])


def test_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(
    whole: Path, tmp_path: Path, capsys: Any
) -> None:
    newest = copied(whole, tmp_path, newest=True)
    damage(newest)
    assert main(["--resume", str(tmp_path)]) == 0
    assert f"checkpoint {newest.name} is damaged" in capsys.readouterr().out
    assert_ended_alike(tmp_path, whole)


def test_damaged_accuracy_of_an_older_checkpoint_stops_nothing(whole: Path, tmp_path: Path) -> None:
    newest = copied(whole, tmp_path, newest=True)
    for file in (tmp_path / "net/checkpoints").glob("*/metrics/metrics"):
        if newest not in file.parents:
            file.write_bytes(b"")
    assert main(["--resume", str(tmp_path)]) == 0
    assert_ended_alike(tmp_path, whole)


def test_run_killed_in_its_first_save_has_no_weights(whole: Path, tmp_path: Path, capsys: Any) -> None:
    newest = copied(whole, tmp_path, newest=True)
    for checkpoint in newest.parent.iterdir():
        shutil.rmtree(checkpoint)
    (newest.parent / "8.orbax-checkpoint-tmp").mkdir()
    assert evaluate.main([str(tmp_path)]) == 2
    assert "has no weights of net" in capsys.readouterr().err


def test_run_goes_on_with_the_very_flags_it_was_started_with(whole: Path, tmp_path: Path) -> None:
    copied(whole, tmp_path, newest=False)
    assert main([*FLAGS, "--resume", str(tmp_path)]) == 0
    assert_ended_alike(tmp_path, whole)


def test_run_does_not_go_on_with_other_data(tmp_path: Path, capsys: Any) -> None:
    for folder, seed in {"some": 0, "others": 1}.items():
        (tmp_path / folder).mkdir()
        for name in idx.NAMES:
            (tmp_path / folder / f"{name}-ubyte").write_bytes(idx_bytes(name, seed))
    flags = ("--data", "mnist", "--model", "net", "--epochs", "1", "--devices", "1", "--checkpoint-every", "1")
    run = str(tmp_path / "run")
    assert main([*flags, "--data-dir", str(tmp_path / "some"), "--out", run]) == 0
    (tmp_path / "some").rename(tmp_path / "moved")
    assert main(["--resume", run, "--data-dir", str(tmp_path / "moved")]) == 0
    assert main(["--resume", run, "--data-dir", str(tmp_path / "others")]) == 2
    assert "was started with other images or labels" in capsys.readouterr().err


def test_damaged_checkpoints_alone_are_refused_and_kept(whole: Path, tmp_path: Path, capsys: Any) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    checkpoints = list((tmp_path / "net/checkpoints").glob("[0-9]*"))
    for checkpoint in checkpoints:
        damage(checkpoint)
    assert main(["--resume", str(tmp_path)]) == 1
    assert "no checkpoint of net can be read" in capsys.readouterr().err
    assert all(checkpoint.exists() for checkpoint in checkpoints)
    assert (tmp_path / "net/model.safetensors").read_bytes() == (whole / "net/model.safetensors").read_bytes()
    assert metrics(tmp_path) == metrics(whole)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--seed", "3"), "--seed is 3, was 0"),
        (("--epochs", "3", "--lr", "0.1"), "--epochs is 3, was 2; --lr is 0.1, was None"),
    ],
)
def test_other_flags_are_refused(whole: Path, capsys: Any, flags: tuple[str, ...], message: str) -> None:
    assert main(["--resume", str(whole), *flags]) == 2
    assert message in capsys.readouterr().err


def test_what_is_no_run_or_has_no_checkpoints_is_refused(tmp_path: Path, capsys: Any) -> None:
    assert main(["--resume", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    about = {"recipes": {"cnn": {}, "net": {}}, "versions": {}, "device": "cpu"}
    (tmp_path / "config.json").write_text(json.dumps(about))
    assert main(["--resume", str(tmp_path)]) == 2
    assert "without --checkpoint-every" in capsys.readouterr().err


def test_full_disk_ends_with_a_message_and_leaves_the_last_checkpoint(whole: Path, tmp_path: Path) -> None:
    last = copied(whole, tmp_path, newest=False)
    process = start_training("--resume", tmp_path, limit="ulimit -f 64;")
    _, error = process.communicate(timeout=120)
    assert process.returncode == 1, error
    assert error.startswith("error: no checkpoint could be written")
    assert error.count("\n") == 1, error
    assert last.exists()
    assert main(["--resume", str(tmp_path)]) == 0
    assert metrics(tmp_path)[-1]["epoch"] == 2


def test_late_failures_of_a_save_are_not_shown_and_others_are() -> None:
    shown: list[Any] = []
    hook = _without_late_failures(shown.append)
    late, other = (SimpleNamespace(exc_value=RuntimeError(text)) for text in ("Event loop is closed", "another"))
    hook(late)
    hook(other)
    assert shown == [other]


def test_a_write_that_fails_when_the_save_has_failed_already_is_not_logged(caplog: Any) -> None:
    async def write() -> None:
        raise ValueError("File too large")

    async def save() -> None:
        asyncio.get_running_loop().create_task(write())

    loop = asyncio.new_event_loop()
    loop.run_until_complete(save())
    loop.close()
    gc.collect()
    assert not caplog.records


def test_resuming_repeats_jaxs_random_numbers_too(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    assert main([*FLAGS, "--rng", "jax", "--out", str(first)]) == 0
    assert int(copied(first, second, newest=False).name) % 45, "in the middle of an epoch"
    assert main(["--resume", str(second)]) == 0
    assert_ended_alike(second, first, rng="jax")


def test_a_checkpoint_within_what_is_dispatched_at_once_is_of_its_own_step(tmp_path: Path) -> None:
    """An epoch's 45 steps do not divide the 50 after which a checkpoint falls."""
    first, second = tmp_path / "a", tmp_path / "b"
    assert main([*FLAGS, "--checkpoint-every", "50", "--dispatch", "50", "--out", str(first)]) == 0
    assert copied(first, second, newest=False).name == "50"
    assert main(["--resume", str(second)]) == 0
    assert_ended_alike(second, first)


def test_the_seconds_before_a_checkpoint_count_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    with monkeypatch.context() as slow:
        slow.setattr(Monitor, "step", lambda *_: time.sleep(0.01))
        assert main([*FLAGS, "--epochs", "1", "--checkpoint-every", "44", "--out", str(first)]) == 0
    assert copied(first, second, newest=False).name == "44"
    assert main(["--resume", str(second)]) == 0
    timing = json.loads((second / "net/metrics.jsonl").read_text())["timing"]
    assert timing["training_seconds"] > 0.44
    assert timing["images_per_second"] < 1437 / 0.44


def test_weights_that_are_not_finite_end_the_training_before_a_checkpoint_holds_them(
    tmp_path: Path, capsys: Any
) -> None:
    assert main([*FLAGS, "--lr", "1e30", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "error: net: the weights are not finite after step 8: lower --lr\n"
    assert not list((tmp_path / "net/checkpoints").iterdir())


NOT_FINITE = {
    "evaluate": (evaluate.main, ("RUN",), 2, "RUN/net/checkpoints/90: not all weights are finite"),
    "predict": (predict.main, ("RUN", "x.png"), 2, "RUN/net/checkpoints/90: not all weights are finite"),
    "export": (export.main, ("RUN", "x.pt"), 2, "RUN/net/checkpoints/90: not all weights are finite"),
    "resume": (main, ("--resume", "RUN"), 1, "--resume: the weights of net are not finite after step 90"),
}


@pytest.mark.parametrize(("command", "arguments", "code", "message"), NOT_FINITE.values(), ids=NOT_FINITE)
def test_a_checkpoint_of_weights_that_are_not_finite_is_refused(
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    command: Callable[..., int],
    arguments: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    """Older versions wrote these, after the last step too."""
    monkeypatch.chdir(tmp_path)
    newest, learner = copied(whole, Path("RUN"), newest=True), new_learner("torch")
    epochs, _ = Checkpoints(newest.parent).restore(learner)
    params = jax.tree.map(lambda leaf: leaf.at[..., 0].set(jnp.nan), learner.state.params)
    learner.state = learner.state._replace(params=params)
    with monkeypatch.context() as older:
        older.setattr("train.checkpoint.finite", lambda _: True)
        Checkpoints(newest.parent).save(learner, epochs)
    capsys.readouterr()
    assert command(list(arguments)) == code
    out, err = capsys.readouterr()
    assert "accuracy" not in out
    assert err.startswith(f"error: {message}: train again with a lower --lr")
    assert err.count("\n") == 1


def test_the_newest_two_and_the_most_accurate_are_kept(whole: Path, tmp_path: Path) -> None:
    """In the middle of an epoch no accuracy is known, and a manager that was opened anew knows those of the others."""
    learner = restored(whole)
    phase = Phase(1, 1, 0.0, 0.0, 0.0, 0.0)
    for epoch, accuracy in enumerate((0.9, 0.5, 0.5, 0.5), start=1):
        for step in (8, 16, 0):
            learner.epoch, learner.step = epoch + (step == 0), step
            done = [Epoch(number, 0.1, phase, phase) for number in range(1, epoch)]
            done += [Epoch(epoch, 0.1, phase, replace(phase, accuracy=accuracy))] * (step == 0)
            Checkpoints(tmp_path).save(learner, done)
    per_epoch = learner.steps_per_epoch
    assert {int(path.name) for path in tmp_path.iterdir()} == {per_epoch, 3 * per_epoch + 16, 4 * per_epoch}
