"""Pictures of a run: its curves, and the test images it gets most wrong."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from train.data import Dataset
from train.loop import Epoch

WORST = 12


def save_curves(path: Path, title: str, epochs: Sequence[Epoch]) -> None:
    """Loss and accuracy by epoch, for both phases."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    figure.suptitle(title)
    for axes, quantity in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        draw_curve(axes, epochs, quantity)
    figure.savefig(path, dpi=150)


def draw_curve(axes: Axes, epochs: Sequence[Epoch], quantity: str) -> None:
    """One quantity by epoch, for both phases."""
    numbers = [epoch.number for epoch in epochs]
    for phase, style in (("training", "C0.--"), ("validation", "C1.-")):
        axes.plot(numbers, [getattr(getattr(epoch, phase), quantity) for epoch in epochs], style, label=phase)
    axes.set(xlabel="epoch", ylabel="loss (nats)" if quantity == "loss" else quantity)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)
    axes.legend()


def save_confusion(path: Path, title: str, outputs: np.ndarray, data: Dataset) -> None:
    """The confusion matrix beside the mistakes with the largest loss."""
    images, labels = np.asarray(data.test.images), np.asarray(data.test.labels)
    predictions = outputs.argmax(axis=-1)
    worst = worst_mistakes(outputs, labels)[:WORST]
    figure = Figure(figsize=(12, 5.6), layout="constrained")
    figure.suptitle(title)
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(1.15, 1))[0]
    _draw_matrix(left.subplots(), confusion(labels, predictions, len(data.classes)), data.classes)
    right.suptitle(f"{np.sum(predictions != labels)} mistakes, the worst first", fontsize="medium")
    for axes in right.subplots(3, 4).flat:
        axes.set_axis_off()
    for axes, index in zip(right.axes, worst, strict=False):
        axes.imshow(images[index], cmap="gray_r")
        axes.set_title(f"{data.classes[labels[index]]} seen as {data.classes[predictions[index]]}", fontsize="small")
    figure.savefig(path, dpi=150)


def confusion(labels: np.ndarray, predictions: np.ndarray, classes: int) -> np.ndarray:
    """How many test images of each class (row) were seen as each class (column)."""
    counts = np.zeros((classes, classes), int)
    np.add.at(counts, (labels, predictions), 1)
    return counts


def worst_mistakes(outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Indices of the misclassified images, the largest loss first; for logits and log-probabilities alike."""
    losses = np.logaddexp.reduce(outputs, axis=-1) - outputs[np.arange(len(labels)), labels]
    mistakes = np.flatnonzero(outputs.argmax(axis=-1) != labels)
    return mistakes[np.argsort(-losses[mistakes], kind="stable")]


def _draw_matrix(axes: Axes, counts: np.ndarray, classes: Sequence[str]) -> None:
    """Counts on a logarithmic scale of colours, so that single mistakes show."""
    axes.imshow(np.log1p(counts), cmap="Blues")
    for (row, column), value in np.ndenumerate(counts):
        if value:
            colour = "white" if np.log1p(value) > np.log1p(counts.max()) / 2 else "black"
            axes.text(column, row, str(value), ha="center", va="center", color=colour, fontsize="small")
    axes.set(xlabel="predicted", ylabel="true")
    upright = max(map(len, classes)) == 1
    axes.set_xticks(range(len(classes)), classes, rotation=0 if upright else 90)
    axes.set_yticks(range(len(classes)), classes)
