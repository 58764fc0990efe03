"""``python -m train.export RUN FILE`` writes a model of a run for PyTorch, as .safetensors or .pt."""

import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from safetensors.numpy import save
from tyro.conf import Positional, arg

from train.command import Run, one_line_errors, write_whole
from train.config import ModelName, UserError, read_config


@dataclass(frozen=True)
class Export:
    """Write a run's model with PyTorch's names and layouts, ready for load_state_dict of the PyTorch original."""

    run: Run
    out: Positional[Annotated[Path, arg(metavar="FILE")]]
    """New file whose name ends in .safetensors or .pt; the latter needs PyTorch."""
    model: ModelName | None = None
    """Which model; needed if the run has two."""


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Convert and write."""
    asked = tyro.cli(Export, prog="python -m train.export", args=arguments)
    config = read_config(asked.run)
    if asked.out.suffix not in (".safetensors", ".pt"):
        raise UserError(f"{asked.out} must end in .safetensors or .pt")
    if asked.out.exists():
        raise UserError(f"{asked.out} exists already: choose another name")
    from jaxloss.parity import to_torch  # JAX loads here, after mistakes and --help have been answered
    from train.saved import read_models

    model, *others = read_models(asked.run, config, asked.model)
    if others:
        raise UserError(f"{asked.run} has two models: choose with --model cnn or --model net")
    weights = to_torch(model.module)
    write_whole(asked.out, save(weights) if asked.out.suffix == ".safetensors" else _pickled(weights))
    print(f"{asked.out}: {model.name} with the weights from {model.source}")


def _pickled(weights: dict[str, np.ndarray]) -> bytes:
    """What `torch.save(module.state_dict(), path)` writes."""
    try:
        import torch  # only here: .safetensors does without
    except ModuleNotFoundError as error:
        raise UserError("a .pt file needs PyTorch: pip install torch, or write a .safetensors file") from error
    file = io.BytesIO()
    torch.save({name: torch.from_numpy(array) for name, array in weights.items()}, file)
    return file.getvalue()


if __name__ == "__main__":
    sys.exit(main())
