"""A run's report: one page that holds all it shows, to be read without a network."""

import json
from base64 import b64encode
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure
from matplotlib.image import imsave

from train.data import Dataset
from train.loop import Epoch
from train.plots import WORST, confusion, draw_curve, worst_mistakes
from train.report import Result, table

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def save_report(path: Path, results: Sequence[Result], data: Dataset) -> None:
    """Write the page beside the run's config.json.

    Between two runs of one command only the elements of class ``timing`` differ.
    """
    page = _TEMPLATES.get_template("report.html.jinja").render(
        run=json.loads(path.with_name("config.json").read_text()),
        note=data.note,
        classes=data.classes,
        test_images=len(data.test.labels),
        summary=_summary(results),
        models=[_model(result, data) for result in results],
    )
    path.write_text(page, encoding="utf-8")


def _summary(results: Sequence[Result]) -> dict[str, Any]:
    """The terminal's table: its headings, its rows and which columns depend on the clock."""
    columns = table(results).columns
    headings = [str(column.header).replace("\n", " ") for column in columns]
    timed = [heading.endswith("seconds") or heading == "images/s" for heading in headings]
    return {"headings": headings, "timed": timed, "rows": list(zip(*(column.cells for column in columns), strict=True))}


def _model(result: Result, data: Dataset) -> dict[str, Any]:
    """What the page shows of one model."""
    images, labels = np.asarray(data.test.images), np.asarray(data.test.labels)
    predictions = result.outputs.argmax(axis=-1)
    counts = confusion(labels, predictions, len(data.classes))
    return {
        "name": result.learner.model,
        "loss": result.learner.loss.__name__,
        "planned": result.learner.recipe.epochs,
        "epochs": result.epochs,
        "accuracy": result.accuracy,
        "curves": [_curve(result.epochs, quantity) for quantity in ("loss", "accuracy")],
        "confusion": counts.tolist(),
        "shades": (100 * np.log1p(counts) / np.log1p(counts.max())).round().astype(int).tolist(),
        "mistakes": int(np.sum(predictions != labels)),
        "worst": [
            {
                "source": _thumbnail(images[index]),
                "true": data.classes[labels[index]],
                "seen": data.classes[predictions[index]],
            }
            for index in worst_mistakes(result.outputs, labels)[:WORST]
        ],
    }


def _curve(epochs: Sequence[Epoch], quantity: str) -> dict[str, str]:
    """The picture and, for who cannot see it, where it starts and ends."""
    figure = Figure(figsize=(4.8, 3.2), layout="constrained")
    draw_curve(figure.subplots(), epochs, quantity)
    ends = [
        f"{phase} from {getattr(getattr(epochs[0], phase), quantity):.4f} "
        f"to {getattr(getattr(epochs[-1], phase), quantity):.4f}"
        for phase in ("training", "validation")
    ]
    file = BytesIO()
    figure.savefig(file, dpi=150, transparent=True)
    return {"source": _embedded(file), "text": f"{quantity} by epoch: {', '.join(ends)}"}


def _thumbnail(image: np.ndarray) -> str:
    file = BytesIO()
    imsave(file, image, cmap="gray_r", vmin=0, vmax=255, format="png")
    return _embedded(file)


def _embedded(png: BytesIO) -> str:
    return f"data:image/png;base64,{b64encode(png.getvalue()).decode()}"
