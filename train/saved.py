"""The models of a finished or interrupted run, and what they make of images."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxloss import log_softmax
from jaxloss.parity import load_torch
from train.config import Config, ModelName, UserError
from train.data import Dataset, Split
from train.loop import EVALUATION_BATCH, LOSSES
from train.randomness import JaxRandomness
from train.steps import batched, finite, take


class Saved(NamedTuple):
    """One trained model in evaluation mode, and the file or checkpoint that its weights are from."""

    name: ModelName
    module: nnx.Module
    source: str


def read_models(run: Path, config: Config, model: ModelName | None) -> list[Saved]:
    """The model that is asked for, or all those of the run that have weights; there is one at least."""
    if model and model not in config.models:
        raise UserError(f"--model {model}: the run in {run} trained the {config.model} only")
    names = (model,) if model else config.models
    saved = [_read(name, source) for name in names for source in _sources(run / name)]
    if not saved:
        raise UserError(f"{run} has no weights of {' or '.join(names)}: train with --save-model or --checkpoint-every")
    return saved


def _sources(folder: Path) -> Iterator[Path]:
    """The saved model, or else the checkpoints, or else nothing."""
    if (file := folder / "model.safetensors").exists():
        yield file
    elif any(path.name.isdigit() for path in (folder / "checkpoints").glob("*")):  # else half-written
        yield folder / "checkpoints"


def _read(name: ModelName, source: Path) -> Saved:
    module = JaxRandomness(name, 0).module()
    module.eval()
    if source.is_dir():
        from train.checkpoint import newest_params  # Orbax takes seconds to load

        params, where = newest_params(source, nnx.state(module, nnx.Param))
        nnx.update(module, params)
    else:
        try:
            module, where = load_torch(module, source), str(source)
        except ValueError as error:
            raise UserError(f"{source} does not hold a {name}: {error}") from error
    if not finite(nnx.state(module, nnx.Param)):
        raise UserError(f"{where}: not all weights are finite: train again with a lower --lr")
    return Saved(name, module, where)


def evaluate(model: Saved, data: Dataset) -> dict[str, Any]:
    """Means over the test images, and the accuracy of every class that has any."""
    labels = np.asarray(data.test.labels)
    outputs = outputs_of(model.module, data.test)
    right = outputs.argmax(axis=-1) == labels
    return {
        "weights": model.source,
        "images": len(labels),
        "loss": float(LOSSES[model.name](outputs, labels)),
        "accuracy": float(right.mean()),
        "classes": {data.classes[label]: float(right[labels == label].mean()) for label in np.unique(labels)},
    }


def most_probable(model: Saved, images: Split) -> list[list[tuple[int, float]]]:
    """The three most probable classes of each image, with their probabilities.

    The first one is the argmax over axis -1, and its probability the max. Log-probabilities are their own log_softmax,
    so models that return these and models that return logits are treated alike.
    """
    log_probs, classes = jax.lax.top_k(log_softmax(outputs_of(model.module, images)), 3)
    return [list(zip(*rows, strict=True)) for rows in zip(classes.tolist(), jnp.exp(log_probs).tolist(), strict=True)]


def outputs_of(module: nnx.Module, split: Split) -> np.ndarray:
    """What a model makes of every image, in order."""
    graph, state = nnx.split(module)
    split, count = jax.device_put(split), len(split.labels)
    batches = batched(np.arange(count), min(count, EVALUATION_BATCH))
    return np.concatenate([_outputs(graph, state, split, rows) for rows in batches])[:count]


@partial(jax.jit, static_argnums=0)
def _outputs(graph: nnx.GraphDef, state: nnx.State, split: Split, rows: jax.Array) -> jax.Array:
    return nnx.merge(graph, state)(take(split, rows)[0])
