"""``python -m train.predict RUN IMAGE ...`` tells what the models of a run see in image files."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich import box
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional, arg

from train.command import Run, one_line_errors
from train.config import ModelName, UserError, read_config


@dataclass(frozen=True)
class Predict:
    """Print the three most probable classes of each image."""

    run: Run
    images: Positional[Annotated[tuple[Path, ...], arg(metavar="IMAGE ...")]]
    """Pictures of any size and colours, light on dark or dark on light."""
    model: ModelName | None = None
    """Which model, if not all of them."""


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Predict and print."""
    asked = tyro.cli(Predict, prog="python -m train.predict", args=arguments)
    if not asked.images:
        raise UserError("name at least one image after the run's folder")
    config = read_config(asked.run)
    from train.data import CLASSES  # JAX loads here, after mistakes and --help have been answered
    from train.images import read_images
    from train.saved import most_probable, read_models

    models = read_models(asked.run, config, asked.model)
    images, names = read_images(asked.images, config.data), CLASSES[config.data]
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    for model in models:
        table = Table(model.name, "1st", "2nd", "3rd", box=box.SIMPLE_HEAD, pad_edge=False)
        table.columns[0].overflow = "fold"
        for path, best in zip(asked.images, most_probable(model, images), strict=True):
            table.add_row(str(path), *(f"{names[index]} {probability:.2%}" for index, probability in best))
        console.print(table)


if __name__ == "__main__":
    sys.exit(main())
