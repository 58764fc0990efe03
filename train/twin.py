"""``python -m train.twin`` trains the PyTorch originals and their JAX ports side by side from one seed."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import tyro
from matplotlib.backend_bases import FigureCanvasBase
from rich.console import Console

from train.command import one_line_errors
from train.config import Config, DataName, UserError


@dataclass(frozen=True)
class Twin:
    """Train each model four times from one seed: PyTorch and JAX, in float32 and in float64."""

    data: DataName = "digits"
    """Images to learn from."""
    data_dir: Path | None = None
    """The data set's own folder, or one that holds mnist/ and fashion-mnist/. Without it: $JAXLOSS_DATA_DIR."""
    model: Literal["both", "cnn", "net"] = "both"
    """What to train."""
    epochs: int = 3
    """Passes over the training images."""
    seed: int = 0
    """Draws the initial weights, the order of the images and the dropout masks."""
    out: Path = Path("twin.png")
    """Where to draw the loss curves and their difference."""


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, prints the table, and draws."""
    asked = tyro.cli(Twin, prog="python -m train.twin", args=arguments)
    config = Config(asked.data, asked.data_dir, model=asked.model, epochs=asked.epochs, seed=asked.seed)
    config.check()
    if asked.out.suffix[1:].lower() not in FigureCanvasBase.filetypes:
        raise UserError(f"--out {asked.out} must end in .{', .'.join(FigureCanvasBase.filetypes)}")
    if not asked.out.parent.is_dir():
        raise UserError(f"--out {asked.out}: there is no folder {asked.out.parent}")
    if not find_spec("torch"):
        raise UserError("the originals need PyTorch: pip install torch")
    from train.data import load  # JAX and PyTorch load here, after mistakes and --help have been answered
    from train.twins import draw, table, train_twins

    data = load(config.data, config.data_dir)
    twins = [train_twins(model, config.recipe(model), data, config.seed) for model in config.models]
    Console().print(table(twins, data))
    draw(twins, asked.out)
    print(f"curves: {asked.out}")


if __name__ == "__main__":
    sys.exit(main())
