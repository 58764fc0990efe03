"""``python -m train.evaluate RUN`` tells how good the models of a run are, class by class."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro
from rich import box
from rich.console import Console
from rich.table import Table
from tyro.conf import FlagCreatePairsOff

from train.command import Run, one_line_errors
from train.config import ModelName, read_config


@dataclass(frozen=True)
class Evaluate:
    """Print the loss and the accuracy of a run's models on the test images of its data set."""

    run: Run
    model: ModelName | None = None
    """Which model, if not all of them."""
    data_dir: Path | None = None
    """Where the data set is, if not where the run found it."""
    download: bool = False
    """Fetch missing data, as python -m train does."""
    json: bool = False
    """Print one JSON object instead of a table."""


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluate and print."""
    asked = tyro.cli(Evaluate, prog="python -m train.evaluate", args=arguments, config=(FlagCreatePairsOff,))
    started = read_config(asked.run)
    data_dir = asked.data_dir or started.data_dir
    config = replace(started, data_dir=data_dir, download=asked.download, tensorboard=False)  # which needs a package
    config.check()
    from train.data import load  # JAX loads here, after mistakes and --help have been answered
    from train.saved import evaluate, read_models

    models = read_models(asked.run, config, asked.model)
    data = load(config.data, config.data_dir, config.download)
    results = {model.name: evaluate(model, data) for model in models}
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    if asked.json:
        console.print(json.dumps(results))
        return
    console.print(_table(results))
    console.print(data.note, *(f"{name}: weights from {each['weights']}" for name, each in results.items()), sep="\n")


def _table(results: Mapping[str, Mapping[str, Any]]) -> Table:
    """One column for each model."""
    table = Table("test images", *results, box=box.SIMPLE_HEAD, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    columns = list(results.values())
    table.add_row("loss (nats)", *(f"{each['loss']:.6f}" for each in columns))
    table.add_row("accuracy", *(f"{each['accuracy']:.2%}" for each in columns), end_section=True)
    for name in columns[0]["classes"]:
        table.add_row(name, *(f"{each['classes'][name]:.2%}" for each in columns))
    return table


if __name__ == "__main__":
    sys.exit(main())
