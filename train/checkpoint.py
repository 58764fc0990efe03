"""Checkpoints of one model's training: all that its next step depends on, written whole or not at all by Orbax."""

import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from orbax.checkpoint.checkpoint_managers import preservation_policy

from train.config import UserError
from train.loop import Epoch, Learner, Phase
from train.steps import finite

logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax tells of every save, and of errors that we tell
logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # of other writes of a save that has failed already


def _without_late_failures(show: Callable[[Any], object]) -> Callable[[Any], None]:
    """An unraisablehook without what other writes of a save say that has failed already, and ended its event loop."""

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            show(unraisable)

    return hook


sys.unraisablehook = _without_late_failures(sys.unraisablehook)

Found = TypeVar("Found")


class Checkpoints:
    """The newest two of a training, and the most accurate one."""

    def __init__(self, folder: Path) -> None:
        """Keep them in ``folder``; process 0 writes, and removes what a killed process left half-written there."""
        process = jax.process_index()
        if process == 0:
            folder.mkdir(parents=True, exist_ok=True)
        alone = ocp.options.MultiprocessingOptions(
            primary_host=process, active_processes={process}, barrier_sync_key_prefix=f"process{process}"
        )
        kept = [preservation_policy.LatestN(2), preservation_policy.BestN(get_metric_fn=_accuracy, n=1)]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy(kept),
            best_fn=_accuracy,  # has the metrics written too
            enable_async_checkpointing=False,
            cleanup_tmp_directories=process == 0,
            create=False,
            multiprocessing_options=alone,
        )
        _drop_damaged_metrics(folder)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def save(self, learner: Learner, epochs: Sequence[Epoch]) -> None:
        """Write where the training stands, and the results of the epochs that are done."""
        step = learner.steps_done
        arrays = {"state": _plain(learner.state), "order": learner.order, "random": learner.random.state()}
        progress = {
            "epoch": learner.epoch,
            "step": learner.step,
            "seconds": time.perf_counter() - learner.began,
            "epochs": [asdict(epoch) for epoch in epochs],
        }
        items = ocp.args.Composite(
            arrays=ocp.args.StandardSave(arrays),
            progress=ocp.args.JsonSave(progress),
        )
        # In the middle of an epoch the accuracy is not known.
        accuracy = epochs[-1].validation.accuracy if epochs and not learner.step else -1.0
        if not finite(learner.state.params):
            raise UserError(f"{learner.model}: the weights are not finite after step {step}: lower --lr", exit_code=1)
        try:
            if step in self._manager.all_steps():  # a damaged one, passed over when the run was resumed
                self._manager.delete(step)
            self._manager.save(step, args=items, metrics={"accuracy": accuracy}, force=True)
        except (OSError, ValueError) as error:  # Orbax's storage reports a full disk as a ValueError
            raise UserError(f"no checkpoint could be written after step {step}: {error}", exit_code=1) from error

    def restore(self, learner: Learner) -> tuple[list[Epoch], list[str]]:
        """Put a new learner where the newest whole checkpoint stands; the epochs done, and what was passed over.

        Nothing is deleted: what cannot be read here may be readable elsewhere. Without any checkpoint the learner
        stays as it is; with unreadable ones alone, or weights that are not finite, there is a `UserError`.
        """
        epochs, broken = _newest_whole(self._manager.all_steps(), lambda step: self._read(step, learner))
        if epochs is None and broken:
            raise UserError(f"--resume: no checkpoint of {learner.model} can be read: {', '.join(broken)}", exit_code=1)
        if not finite(learner.state.params):  # older versions kept these too
            message = f"the weights of {learner.model} are not finite after step {learner.steps_done}"
            raise UserError(f"--resume: {message}: train again with a lower --lr", exit_code=1)
        return epochs or [], broken

    def _read(self, step: int, learner: Learner) -> list[Epoch]:
        template = {
            "state": _plain(learner.state),
            "order": np.zeros(len(learner.train.labels), np.int64),
            "random": learner.random.state(),
        }
        items = ocp.args.Composite(
            arrays=ocp.args.StandardRestore(template),
            progress=ocp.args.JsonRestore(),
        )
        found = self._manager.restore(step, args=items)
        arrays, progress = found["arrays"], found["progress"]
        learner.state = learner.place(_like(learner.state, arrays["state"]))
        learner.random.set_state(arrays["random"])
        learner.order = np.asarray(arrays["order"])
        learner.epoch, learner.step = progress["epoch"], progress["step"]
        learner.began = time.perf_counter() - progress["seconds"]
        return [
            Epoch(each["number"], each["lr"], Phase(**each["training"]), Phase(**each["validation"]))
            for each in progress["epochs"]
        ]


def newest_params(folder: Path, params: nnx.State) -> tuple[nnx.State, str]:
    """The weights in the newest whole checkpoint of a model with such ``params``, and where they are.

    Needs neither the data nor the devices of the training. Nothing in ``folder`` changes: the training may go on.
    """
    reader = ocp.StandardCheckpointer()

    def read(step: int) -> nnx.State:
        path = folder.absolute() / str(step) / "arrays"
        metadata: Any = reader.metadata(path).item_metadata
        template = jax.tree.map(lambda array: np.zeros(array.shape, array.dtype), metadata.tree)
        state = reader.restore(path, template)["state"]  # the leaves of a State, which begins with its params
        return _like(params, state[: len(jax.tree.leaves(params))])

    steps = [int(path.name) for path in folder.iterdir() if path.name.isdigit()]
    found, broken = _newest_whole(steps, read)
    if found is None:
        raise UserError(f"{folder} has no checkpoint that can be read: {', '.join(broken) or 'it is empty'}")
    return found, f"{folder}/{sorted(steps)[-1 - len(broken)]}"


def _newest_whole(steps: Sequence[int], read: Callable[[int], Found]) -> tuple[Found | None, list[str]]:
    """What the newest readable one holds, and which newer ones are damaged."""
    broken = []
    for step in sorted(steps, reverse=True):
        try:
            return read(step), broken
        except Exception as error:  # whatever Orbax and its storage make of damaged files
            broken.append(f"checkpoint {step} is damaged ({type(error).__name__})")
    return None, broken


def _drop_damaged_metrics(folder: Path) -> None:
    """Without its metrics a checkpoint is no candidate for the best; with damaged ones Orbax would read none at all."""
    for file in folder.glob("*/metrics/metrics"):
        with suppress(OSError):
            try:
                json.loads(file.read_bytes())
            except ValueError:
                file.unlink()


def _accuracy(metrics: dict[str, float]) -> float:
    return metrics["accuracy"]


def _plain(tree: Any) -> list[np.ndarray]:
    """The leaves, on the host."""
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def _like(tree: Found, leaves: Sequence[np.ndarray]) -> Found:
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)
