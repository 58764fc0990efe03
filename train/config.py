"""What can be asked of ``python -m train``. Every value is checked here, before JAX loads."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args, get_origin, get_type_hints

from tyro.conf import arg

ModelName = Literal["cnn", "net"]
DataName = Literal["digits", "mnist", "fashion-mnist"]
OptimizerName = Literal["sgd", "adam", "adamw", "adadelta"]
ScheduleName = Literal["exponential", "one-cycle"]
RngName = Literal["torch", "jax"]


class UserError(Exception):
    """What the user can mend: one line on stderr instead of a traceback."""

    def __init__(self, message: str, exit_code: int = 2) -> None:
        """Keep the exit code: 2 if the command cannot start, 1 if the training itself failed."""
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Recipe:
    """How one model is trained."""

    optimizer: OptimizerName
    lr: float
    momentum: float
    gamma: float
    epochs: int
    batch_size: int
    schedule: ScheduleName = "exponential"


# The notes' SGD (.01, momentum .5) suits MNIST's 60,000 images; on 1,437 digits it stays at chance for epochs.
MNIST_RECIPES: dict[ModelName, Recipe] = {
    "cnn": Recipe("adam", lr=1e-3, momentum=0.0, gamma=1.0, epochs=1, batch_size=100),
    "net": Recipe("sgd", lr=1e-2, momentum=0.5, gamma=0.97, epochs=2, batch_size=64),
}
RECIPES: dict[DataName, dict[ModelName, Recipe]] = {
    "digits": {
        "cnn": Recipe("adam", lr=2e-3, momentum=0.0, gamma=0.9, epochs=15, batch_size=32),
        "net": Recipe("adam", lr=3e-3, momentum=0.0, gamma=0.9, epochs=20, batch_size=32),
    },
    "mnist": MNIST_RECIPES,
    "fashion-mnist": MNIST_RECIPES,
}
# Learning rate and momentum for an optimizer that is not the recipe's own.
RATES: dict[OptimizerName, tuple[float, float]] = {
    "sgd": (1e-2, 0.5),
    "adam": (1e-3, 0.0),
    "adamw": (1e-3, 0.0),
    "adadelta": (1.0, 0.0),
}


def _per_model(field: str, text: str) -> Any:
    """A flag whose default is the model's own; the help lists those defaults."""
    defaults = (
        f"{data} " + ", ".join(f"{model} {getattr(recipe, field)}" for model, recipe in RECIPES[data].items())
        for data in ("digits", "mnist")
    )
    return arg(help=text, help_behavior_hint=f"(default: {'; '.join(defaults)})")


@dataclass(frozen=True)
class Config:
    """Train the CNN with cross_entropy and the Net with nll_loss, on one of three sets of 28x28 images."""

    data: DataName = "digits"
    """Images to learn from. The digits come with scikit-learn; the others need --data-dir or --download."""
    data_dir: Path | None = None
    """The data set's own folder, or one that holds mnist/ and fashion-mnist/. Without it: $JAXLOSS_DATA_DIR."""
    download: bool = False
    """Fetch missing data into --data-dir (without it: the user's cache folder), checked by SHA-256."""
    model: Literal["both", "cnn", "net"] = "both"
    """What to train."""
    epochs: Annotated[int | None, _per_model("epochs", "Passes over the training images.")] = None
    batch_size: Annotated[int | None, _per_model("batch_size", "Images per step.")] = None
    optimizer: Annotated[OptimizerName | None, _per_model("optimizer", "PyTorch's, with its defaults.")] = None
    lr: Annotated[float | None, _per_model("lr", "Learning rate.")] = None
    momentum: Annotated[float | None, _per_model("momentum", "For sgd only, in [0, 1).")] = None
    gamma: Annotated[float | None, _per_model("gamma", "Multiplies lr after each epoch; in (0, 1].")] = None
    schedule: ScheduleName = "exponential"
    """exponential: --gamma; one-cycle: PyTorch's OneCycleLR up to --lr and down again, the momentum the other way."""
    seed: int = 0
    """Draws the initial weights, the order of the images and the dropout masks."""
    rng: RngName = "torch"
    """torch: what PyTorch draws for this seed, so that its training is repeated; jax: from jax.random."""
    log_interval: int = 0
    """Print the loss of every k-th step, which waits for that step; 0: never."""
    dry_run: bool = False
    """One step and one evaluation of each model. Writes nothing and judges no target."""
    save_model: bool = False
    """Write model.safetensors with PyTorch's names and layouts. An interrupted run of one process always does."""
    target_accuracy: float | None = None
    """Exit with 1 unless every model reaches this fraction of the test images, in (0, 1]."""
    out: Path | None = None
    """Folder for metrics and pictures. Default: runs/DATA-DATE-TIME."""
    tensorboard: bool = False
    """Write events for TensorBoard too; needs the extra: pip install -e '.[tensorboard]'."""
    checkpoint_every: int = 0
    """Write a checkpoint after every k-th step and after every epoch; 0: none."""
    resume: Path | None = None
    """Go on with the run in this folder, from its last checkpoints, with the flags that it was started with."""
    devices: int | None = None
    """Devices of each process to divide a batch over. Default: all."""
    dispatch: int | None = None
    """Steps handed to the devices at once, fewer where a checkpoint falls. Default: 20, on CPU
    1 for the CNN and 8 for the Net in batches of at most 100."""
    coordinator: str | None = None
    """HOST:PORT of process 0, the same for all processes of a training; auto: as Slurm, Open MPI or a TPU tells."""
    num_processes: int | None = None
    """How many processes there are."""
    process_id: int | None = None
    """Which one this is, from 0; only process 0 prints and writes."""

    def check(self) -> None:
        """Raise `UserError` for the first value that makes no sense."""
        if fault := next(self._faults(), None):
            raise UserError(fault)

    def check_resumes(self, started: "Config") -> None:
        """Raise `UserError` if this is not the training that was started, or one without checkpoints."""
        free = {"resume", "log_interval", "save_model", "target_accuracy"}
        # The training does not depend on where it runs, nor on where its data are.
        free |= {"devices", "dispatch", "coordinator", "num_processes", "process_id", "data_dir", "download"}
        changed = [
            f"--{field.name.replace('_', '-')} is {getattr(self, field.name)}, was {getattr(started, field.name)}"
            for field in fields(self)
            if field.name not in free and getattr(self, field.name) != getattr(started, field.name)
        ]
        if changed:
            raise UserError(f"--resume goes on with the same flags, but {'; '.join(changed)}")
        if not started.checkpoint_every:
            raise UserError("--resume: the run has no checkpoints, because it was started without --checkpoint-every")

    def recipe(self, model: ModelName) -> Recipe:
        """The model's own recipe with what was asked for instead."""
        recipe = RECIPES[self.data][model]
        if self.optimizer not in (None, recipe.optimizer):
            lr, momentum = RATES[self.optimizer]
            recipe = replace(recipe, optimizer=self.optimizer, lr=lr, momentum=momentum)
        if self.schedule == "one-cycle":  # sgd's momentum starts from there
            momentum = 0.95 if recipe.optimizer == "sgd" else 0.0
            recipe = replace(recipe, momentum=momentum, gamma=1.0, schedule=self.schedule)
        names = ("lr", "momentum", "gamma", "epochs", "batch_size")
        return replace(recipe, **{name: value for name in names if (value := getattr(self, name)) is not None})

    @property
    def models(self) -> tuple[ModelName, ...]:
        """What to train, in order."""
        return get_args(ModelName) if self.model == "both" else (self.model,)

    def _faults(self) -> Iterator[str]:
        for name in ("gamma", "momentum"):
            if self.schedule == "one-cycle" and getattr(self, name) is not None:
                yield f"--{name} is for --schedule exponential only; one-cycle has its own rates and momenta"
        for model in self.models:
            recipe = self.recipe(model)
            if recipe.epochs < 1:
                yield f"--epochs must be at least 1, got {recipe.epochs}"
            if recipe.batch_size < 1:
                yield f"--batch-size must be at least 1, got {recipe.batch_size}"
            if not 0 < recipe.lr < math.inf:
                yield f"--lr must be a positive number, got {recipe.lr}"
            if not 0 <= recipe.momentum < 1:
                yield f"--momentum must lie in [0, 1), got {recipe.momentum}"
            if recipe.momentum and recipe.optimizer != "sgd":
                yield f"--momentum is for --optimizer sgd only; the {model} uses {recipe.optimizer} here"
            if not 0 < recipe.gamma <= 1:
                yield f"--gamma must lie in (0, 1], got {recipe.gamma}"
        if not 0 <= self.seed < 2**32:
            yield f"--seed must lie in [0, 2**32), got {self.seed}"
        yield from self._faulty_places()
        if self.checkpoint_every < 0:
            yield f"--checkpoint-every must not be negative, got {self.checkpoint_every}"
        if self.log_interval < 0:
            yield f"--log-interval must not be negative, got {self.log_interval}"
        if self.target_accuracy is not None and not 0 < self.target_accuracy <= 1:
            yield f"--target-accuracy must be a fraction in (0, 1], got {self.target_accuracy}"
        if self.tensorboard and not find_spec("tensorboardX"):
            yield "--tensorboard needs tensorboardX: pip install -e '.[tensorboard]'"
        if self.data == "digits" and (self.data_dir or self.download):
            yield "--data-dir and --download need --data mnist or fashion-mnist: the digits come with scikit-learn"

    def _faulty_places(self) -> Iterator[str]:
        for name, count in (("devices", self.devices), ("dispatch", self.dispatch)):
            if count is not None and count < 1:
                yield f"--{name} must be at least 1, got {count}"
        place = self.num_processes, self.process_id
        if self.coordinator is None and place != (None, None):
            yield "--num-processes and --process-id need --coordinator"
        if self.coordinator not in (None, "auto"):
            if None in place:
                yield "--coordinator needs --num-processes and --process-id"
            elif not 0 <= cast(int, self.process_id) < cast(int, self.num_processes):
                yield f"--process-id must lie in [0, {self.num_processes}), got {self.process_id}"
            if not re.fullmatch(r".+:\d{1,5}", self.coordinator) or int(self.coordinator.rpartition(":")[2]) > 65535:
                yield f"--coordinator must be HOST:PORT or auto, got {self.coordinator}"


def read_config(folder: Path) -> Config:
    """What the run in a folder was started with."""
    kinds: dict[str, Any] = get_type_hints(Config)
    try:
        about = json.loads((folder / "config.json").read_text())
        if not isinstance(about, dict):
            raise ValueError("config.json holds no object")
        about = {**asdict(Config()), **about}
        for name, kind in {**kinds, "recipes": dict, "versions": dict, "device": str}.items():
            if not _fits(about.get(name), kind):
                raise ValueError(f"{name} is {about.get(name)} in config.json")
        paths = {name: Path(about[name]) for name in ("data_dir", "out") if about[name] is not None}
        config = Config(**{**{name: about[name] for name in kinds}, **paths, "resume": None})
        if missing := set(config.models) - set(about["recipes"]):
            raise ValueError(f"config.json has no recipe of {' and '.join(sorted(missing))}")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} holds no run of python -m train that can be read: {error}") from error
    return config


def _fits(value: object, kind: Any) -> bool:
    """Whether JSON's value can be of that type."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if union := get_args(kind):
        return any(_fits(value, each) for each in union)
    return isinstance(value, {Path: str, float: (int, float)}.get(kind, kind))
