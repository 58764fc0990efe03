"""A whole run: load the data, train each model, save, report."""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

import flax
import jax
import optax
from rich.console import Console
from safetensors.numpy import save

import jaxloss
from jaxloss.parity import to_torch
from train.command import write_whole
from train.config import Config, UserError
from train.data import Dataset, load
from train.devices import find_devices, join, make_mesh, watched
from train.html import save_report
from train.loop import Cost, Epoch, Learner, default_dispatch
from train.plots import save_confusion, save_curves
from train.report import Monitor, Result, table

if TYPE_CHECKING:
    from train.checkpoint import Checkpoints

WEIGHTS = "model.safetensors"


def run(config: Config) -> int:
    """Do what ``config`` asks for; the exit code is 0, or 130 after Ctrl-C."""
    join(config)
    find_devices()
    with watched():
        return _run(config)


def _run(config: Config) -> int:
    writes = jax.process_index() == 0
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True, quiet=not writes)
    mesh = make_mesh(config.devices)
    data = load(config.data, config.data_dir, config.download)
    _refuse_other_data(config, data)
    folder = None if config.dry_run or not writes else config.resume or _make_folder(config, data)
    results = []
    with _interruptible() as interrupted:
        for model in config.models:
            recipe = config.recipe(model)
            dispatch = 1 if config.dry_run else config.dispatch or default_dispatch(model, recipe)
            learner = Learner(
                model,
                recipe,
                data,
                config.seed,
                config.rng,
                mesh=mesh,
                dispatch=dispatch,
                checkpoint_every=config.checkpoint_every,
            )
            weights = config.save_model or (folder is not None and (folder / model / WEIGHTS).exists())
            results.append(_train(learner, config, folder, interrupted, console))
            if folder:  # the weights first: what follows may fail, or be ended by a second Ctrl-C
                _save(results if interrupted.is_set() else results[-1:] if weights else [], folder)
                _draw(results[-1], folder / model, data)
                save_report(folder / "report.html", results, data)
            if interrupted.is_set():
                break
        if folder and interrupted.is_set():  # perhaps only while the report was written
            _save(results, folder)
    console.print(table(results))
    console.print(data.note)
    if folder:
        console.print(f"metrics and pictures: {folder}; in one page: {folder / 'report.html'}")
    if interrupted.is_set():
        return 130  # what a shell reports after Ctrl-C
    if config.target_accuracy and not config.dry_run:
        _judge(results, config.target_accuracy)
    return 0


def _train(learner: Learner, config: Config, folder: Path | None, interrupted: Event, console: Console) -> Result:
    """Train one model; print and record each epoch as it ends."""
    recipe = ", ".join(f"{name} {value}" for name, value in asdict(learner.recipe).items())
    console.print(f"{learner.model}: {learner.loss.__name__}, {recipe}, seed {config.seed}, rng {config.rng}")
    stop = interrupted
    if config.dry_run:  # stopped from the start, a model still takes one step
        stop = Event()
        stop.set()
    epochs: list[Epoch] = []
    checkpoints = _checkpoints(config, folder or config.resume, learner)
    if checkpoints and config.resume:
        epochs, damaged = checkpoints.restore(learner)
        console.print(*damaged, f"going on after step {learner.steps_done}", sep="\n")
        if folder:
            (folder / learner.model / WEIGHTS).unlink(missing_ok=True)  # outdated once the training goes on
            _record(folder / learner.model, epochs, mode="w")
    with Monitor(console, learner, config.log_interval) as monitor:

        def on_step(step: int, cost: Cost) -> None:
            monitor.step(step, cost)
            within = step < learner.steps_per_epoch  # else after the evaluation
            if folder and checkpoints and within and learner.steps_done % config.checkpoint_every == 0:
                checkpoints.save(learner, epochs)

        for epoch in _ahead(learner.epochs(stop, on_step), config, folder and folder / learner.model, epochs):
            epochs.append(epoch)
            monitor.epoch(epoch)
            if folder:
                _record(folder / learner.model, [epoch])
            if folder and checkpoints and not stop.is_set():
                checkpoints.save(learner, epochs)
    if interrupted.is_set():
        console.print("interrupted: saving and reporting what was learned so far")
    return Result(learner, epochs, learner.evaluate()[1])


def _ahead(ahead: Iterator[Epoch], config: Config, folder: Path | None, done: list[Epoch]) -> Iterator[Epoch]:
    """The epochs ahead, written for TensorBoard too if wanted."""
    if folder is None or not config.tensorboard:
        return ahead
    from train.tensorboard import logged  # an optional extra

    return logged(ahead, folder / "tensorboard", done)


def _checkpoints(config: Config, folder: Path | None, learner: Learner) -> "Checkpoints | None":
    if folder is None or not config.checkpoint_every:
        return None
    from train.checkpoint import Checkpoints  # Orbax takes seconds to load

    return Checkpoints(folder / learner.model / "checkpoints")


def _refuse_other_data(config: Config, data: Dataset) -> None:
    """Raise `UserError` if a run would go on with other images or labels than it was started with."""
    if config.resume:
        about = json.loads((config.resume / "config.json").read_text())
        if about.get("data_sha256", sha256 := _sha256(config, data)) != sha256:
            raise UserError(f"--resume {config.resume}: it was started with other images or labels: see --data-dir")


def _sha256(config: Config, data: Dataset) -> str | None:
    """Of data from files, if the run can be resumed; the digits are always the same, but for a device's rounding."""
    return data.sha256() if config.checkpoint_every and config.data != "digits" else None


def _make_folder(config: Config, data: Dataset) -> Path:
    """The run's folder, with its config.json and a folder for each model; never one that holds a run already."""
    folder = config.out or _new_folder(f"{config.data}-{time.strftime('%Y%m%d-%H%M%S')}")
    if any((folder / name).exists() for name in ("config.json", *config.models)):
        raise UserError(f"--out {folder} holds a run already: choose another folder")
    _make(folder)
    about = {
        **asdict(config),
        "recipes": {model: asdict(config.recipe(model)) for model in config.models},
        "versions": {module.__name__: module.__version__ for module in (jaxloss, jax, flax, optax)},
        "device": jax.devices()[0].device_kind,
        "data_sha256": _sha256(config, data),
    }
    with (folder / "config.json").open("x") as file:
        json.dump(about, file, default=str, indent=2)
    for model in config.models:
        (folder / model).mkdir()
    return folder


def _new_folder(stem: str) -> Path:
    """runs/stem, or the first of runs/stem-1, runs/stem-2, ... that no other run has taken."""
    folder, number = Path("runs", stem), 0
    _make(folder.parent)
    while True:
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
            folder = folder.with_name(f"{stem}-{number}")
        else:
            return folder


def _make(folder: Path) -> None:
    """A folder with those above it, if they are not there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        link = Path(error.filename)
        if link.is_symlink():
            raise UserError(
                f"{link} is a link to {link.readlink()}, which is no folder: make it, or remove the link"
            ) from error
        raise


def _record(folder: Path, epochs: list[Epoch], mode: str = "a") -> None:
    """Append epochs to metrics.jsonl. Only ``timing`` differs between two runs of one command."""
    with (folder / "metrics.jsonl").open(mode) as file:
        for epoch in epochs:
            phases = {"training": asdict(epoch.training), "validation": asdict(epoch.validation)}
            timing = {f"{name}_seconds": phase.pop("seconds") for name, phase in phases.items()}
            timing["images_per_second"] = epoch.training.images / epoch.training.seconds
            print(json.dumps({"epoch": epoch.number, "lr": epoch.lr, **phases, "timing": timing}), file=file)


def _draw(result: Result, folder: Path, data: Dataset) -> None:
    """The pictures of one model."""
    learner = result.learner
    title = f"{learner.model}, {learner.loss.__name__}: {result.accuracy:.2%} of {len(data.test.labels)} test images"
    save_curves(folder / "curves.png", title, result.epochs)
    save_confusion(folder / "confusion.png", title, result.outputs, data)


def _save(results: Sequence[Result], folder: Path) -> None:
    """The weights of models."""
    for result in results:
        write_whole(folder / result.learner.model / WEIGHTS, save(to_torch(result.learner.trained())))


def _judge(results: list[Result], target: float) -> None:
    """Fail the run if a model missed the target."""
    missed = [f"{result.learner.model} {result.accuracy:.4f}" for result in results if result.accuracy < target]
    if missed:
        raise UserError(f"test accuracy below --target-accuracy {target}: {', '.join(missed)}", exit_code=1)


@contextmanager
def _interruptible() -> Iterator[Event]:
    """Inside, Ctrl-C sets the event, and a second Ctrl-C ends the process at once."""
    event = Event()

    def interrupt(*_: object) -> None:
        # No exception, which would surface as a traceback wherever Python happens to be. Where there are other
        # processes, none of them can end its epoch early by itself.
        if event.is_set() or jax.process_count() > 1:
            os.write(sys.stderr.fileno(), b"error: interrupted\n")
            os._exit(130)
        event.set()

    previous = signal.signal(signal.SIGINT, interrupt)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)
