"""What a run shows while it trains and when it ends."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from train.config import ModelName
from train.loop import Cost, Epoch, Learner


@dataclass(frozen=True)
class Result:
    """What one model's training came to."""

    learner: Learner
    epochs: list[Epoch]
    outputs: np.ndarray  # the trained model's, for the test images in order

    @property
    def accuracy(self) -> float:
        """The fraction of test images that the last epoch got right."""
        return self.epochs[-1].validation.accuracy


def epoch_lines(model: ModelName, epoch: Epoch, epochs: int) -> list[str]:
    """The epoch as the notes' loop for this model prints it."""
    if model == "cnn":
        return [f"Epoch : {epoch.number:4d}/{epochs} Cost : {epoch.training.cost:.6f}"]
    return [
        f"[{name}] epoch: {epoch.number:2d} loss: {phase.loss:.8f} accuracy: {phase.accuracy:.8f}"
        for name, phase in (("training", epoch.training), ("validation", epoch.validation))
    ]


class Monitor:
    """Prints a line per epoch; on a terminal it also moves a progress bar."""

    def __init__(self, console: Console, learner: Learner, log_interval: int) -> None:
        """Follow ``learner``; print every ``log_interval``-th step's loss, or none if that is 0."""
        self.console, self.learner, self.log_interval = console, learner, log_interval
        columns = (TextColumn(learner.model), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
        self.progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.task = self.progress.add_task(
            "", total=learner.recipe.epochs * learner.steps_per_epoch, completed=learner.steps_done
        )

    def __enter__(self) -> Self:
        """Show the progress bar."""
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Take it away."""
        self.progress.stop()

    def step(self, step: int, cost: Cost) -> None:
        """Count a step."""
        self.progress.advance(self.task)
        if self.log_interval and step % self.log_interval == 0:
            self.console.print(f"step {step:5d}/{self.learner.steps_per_epoch} loss: {float(cost):.6f}")

    def epoch(self, epoch: Epoch) -> None:
        """Print what an epoch came to."""
        for line in epoch_lines(self.learner.model, epoch, self.learner.recipe.epochs):
            self.console.print(line)


class _Rate(ProgressColumn):
    """Steps per second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:.0f} steps/s")


def table(results: Sequence[Result]) -> Table:
    """One row for each model."""
    # Some headings take two lines so that the table fits 80 columns.
    headings = "model loss parameters test\naccuracy epochs compile\nseconds train\nseconds images/s"
    table = Table(*headings.split(" "), box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in table.columns[2:]:
        column.justify, column.overflow = "right", "fold"
    for result in results:
        learner = result.learner
        seconds = sum(epoch.training.seconds for epoch in result.epochs)
        images = sum(epoch.training.images for epoch in result.epochs)
        table.add_row(
            learner.model,
            learner.loss.__name__,
            f"{learner.parameters:,}",
            f"{result.accuracy:.2%}",
            f"{len(result.epochs)}/{learner.recipe.epochs}",
            f"{learner.compile_seconds:.1f}",
            f"{seconds:.1f}",
            f"{images / seconds:,.0f}",
        )
    return table
