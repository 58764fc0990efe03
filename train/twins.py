"""The PyTorch originals and their JAX ports, trained from one seed, and how far they agree."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader

from jaxloss.parity import to_torch
from train import originals
from train.config import ModelName, Recipe
from train.data import Dataset, Split
from train.loop import EVALUATION_BATCH, Learner
from train.randomness import TorchRandomness
from train.steps import Params, dtype_of, take

Weights = dict[str, np.ndarray]
ORIGINALS: dict[ModelName, tuple[Callable[[], nn.Module], Callable[..., Tensor]]] = {
    "cnn": (originals.CNN, F.cross_entropy),
    "net": (originals.Net, F.nll_loss),
}
OPTIMIZERS = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adadelta": torch.optim.Adadelta,
}


@dataclass
class Run:
    """One training, as it went."""

    rows: list[np.ndarray] = field(default_factory=list)  # of every step
    masks: list[list[np.ndarray]] = field(default_factory=list)  # what dropout kept in every step
    losses: list[float] = field(default_factory=list)  # of every step
    gradient: Weights = field(default_factory=dict)  # of the first step
    weights: list[Weights] = field(default_factory=list)  # after every epoch
    predictions: np.ndarray = field(default_factory=lambda: np.empty(0))  # of the test images, at the end

    def accuracy(self, test: Split) -> float:
        """The fraction of test images that are labelled rightly."""
        return float(np.mean(self.predictions == np.asarray(test.labels)))


@dataclass(frozen=True)
class Twins:
    """One model's four trainings."""

    model: ModelName
    torch32: Run
    torch64: Run
    jax32: Run
    jax64: Run

    def distances(self) -> Iterator[tuple[float, float, float]]:
        """After each epoch: JAX from PyTorch in float64, in float32, and PyTorch's float32 from its float64."""
        for ours64, ours32, theirs64, theirs32 in zip(
            *(run.weights for run in (self.jax64, self.jax32, self.torch64, self.torch32)), strict=True
        ):
            yield distance(ours64, theirs64), distance(ours32, theirs32), distance(theirs32, theirs64)


def distance(ours: Weights, theirs: Weights) -> float:
    """Relative L2 over all arrays together."""
    x, y = (np.concatenate([np.float64(arrays[name]).ravel() for name in theirs]) for arrays in (ours, theirs))
    return float(np.linalg.norm(x - y) / np.linalg.norm(y))


def train_torch(model: ModelName, recipe: Recipe, data: Dataset, seed: int, dtype: torch.dtype) -> Run:
    """The original as a PyTorch user trains it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        build, loss = ORIGINALS[model]
        module, run = build().to(dtype), Run()
        options: dict[str, Any] = {"momentum": recipe.momentum} if recipe.optimizer == "sgd" else {}
        optimizer = OPTIMIZERS[recipe.optimizer](module.parameters(), lr=recipe.lr, **options)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, recipe.gamma)
        train = DataLoader(_Rows(data.train), batch_size=recipe.batch_size, shuffle=True)
        test = DataLoader(_Rows(data.test), batch_size=EVALUATION_BATCH)
        for _ in range(recipe.epochs):
            module.train()
            for rows in train:
                images, labels = _take(data.train, rows, dtype)
                optimizer.zero_grad()
                with _Masks() as masks:
                    cost = loss(module(images), labels)
                cost.backward()
                if not run.losses:
                    run.gradient = {name: _numpy(p.grad) for name, p in module.named_parameters()}
                optimizer.step()
                run.rows.append(rows.numpy())
                run.masks.append(masks.kept)
                run.losses.append(cost.item())
            scheduler.step()
            module.eval()
            with torch.no_grad():
                found = [module(_take(data.test, rows, dtype)[0]).argmax(1) for rows in test]
            run.predictions = torch.cat(found).numpy()
            run.weights.append({name: _numpy(tensor) for name, tensor in module.state_dict().items()})
    return run


def train_jax(model: ModelName, recipe: Recipe, data: Dataset, seed: int, dtype: str) -> Run:
    """The port, with what PyTorch draws."""
    run = Run()
    with jax.enable_x64(dtype == "float64"):
        learner = Learner(model, recipe, data, seed, "torch", dtype)
        learner.random = _Recorded(model, seed, run)
        learner.random.module()  # draws the weights again, so that the stream stands after them
        run.gradient = _first_gradient(learner, model, seed)
        for _ in learner.epochs(Event(), lambda step, cost: run.losses.append(float(cost))):
            run.weights.append(to_torch(learner.trained()))
        run.predictions = learner.evaluate()[1].argmax(1)
    return run


class _Recorded(TorchRandomness):
    """Keeps what it has drawn."""

    def __init__(self, model: ModelName, seed: int, run: Run) -> None:
        super().__init__(model, seed)
        self.run = run

    def order(self, epoch: int, count: int) -> np.ndarray:
        order = super().order(epoch, count)
        self._left = order
        return order

    def masks(self, images: int, size: int) -> Any:
        masks = super().masks(images, size)
        self.run.rows.append(self._left[:images])
        self._left = self._left[images:]
        self.run.masks.append([np.asarray(mask)[:images] for each in masks for mask in each])
        return masks


def _first_gradient(learner: Learner, model: ModelName, seed: int) -> Weights:
    random = TorchRandomness(model, seed)
    random.module()
    rows = random.order(1, len(learner.train.labels))[: learner.batch_size]
    masks = random.masks(len(rows), len(rows))
    params = learner.state.params
    images, labels = take(learner.train, jnp.asarray(rows), dtype_of(params))

    def cost(params: Params) -> jax.Array:
        return learner.loss(learner.forward(params, images, *masks), labels)

    gradient = nnx.clone(learner.module)
    nnx.update(gradient, jax.jit(jax.grad(cost))(params))
    return to_torch(gradient)


class _Masks(TorchFunctionMode):
    """Sees what dropout keeps: each call is made twice from one random state, the first time on ones."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[np.ndarray] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (F.dropout, F.dropout2d):
            state = torch.get_rng_state()
            kept = func(torch.ones_like(args[0]), *args[1:], **kwargs) != 0
            torch.set_rng_state(state)
            kept = kept[:, :, 0, 0, None, None].movedim(1, -1) if kept.ndim == 4 else kept
            self.kept.append(kept.numpy())
        return func(*args, **kwargs)


class _Rows(torch.utils.data.Dataset[int]):
    """The numbers of a split's images: a loader orders them, and whole batches are taken at once."""

    def __init__(self, split: Split) -> None:
        self._count = len(split.labels)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> int:
        return index


def _take(split: Split, rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    images, labels = (torch.from_numpy(np.asarray(array)[rows.numpy()]) for array in (split.images, split.labels))
    return (images[:, None].to(dtype) / 255 - split.mean) / split.deviation, labels.long()


def _numpy(tensor: Tensor | None) -> np.ndarray:
    assert tensor is not None
    return tensor.detach().numpy().copy()


def train_twins(model: ModelName, recipe: Recipe, data: Dataset, seed: int) -> Twins:
    """All four."""
    return Twins(
        model,
        train_torch(model, recipe, data, seed, torch.float32),
        train_torch(model, recipe, data, seed, torch.float64),
        train_jax(model, recipe, data, seed, "float32"),
        train_jax(model, recipe, data, seed, "float64"),
    )


def table(twins: Sequence[Twins], data: Dataset) -> Table:
    """What agrees, and how well."""
    result = Table("", *(each.model for each in twins), title="PyTorch and JAX from one seed")

    def row(name: str, cell: Callable[[Twins], str]) -> None:
        result.add_row(name, *map(cell, twins))

    row("batches identical", lambda t: _count(t.jax32.rows, t.torch32.rows))
    row("dropout masks identical", lambda t: _count(_flat(t.jax32.masks), _flat(t.torch32.masks)))
    for bits in ("64", "32"):
        ours, theirs = f"jax{bits}", f"torch{bits}"
        row(
            f"first gradient, float{bits}",
            lambda t, a=ours, b=theirs: f"{distance(getattr(t, a).gradient, getattr(t, b).gradient):.1e}",
        )
    for epoch in range(len(twins[0].jax32.weights)):
        names = "weights, float64", "weights, float32", "  PyTorch's float32 from its float64"
        for i, name in enumerate(names):
            row(f"{name}, epoch {epoch + 1}", lambda t, e=epoch, i=i: f"{list(t.distances())[e][i]:.1e}")
    row("test accuracy, PyTorch", lambda t: f"{t.torch32.accuracy(data.test):.2%}")
    row("test accuracy, JAX", lambda t: f"{t.jax32.accuracy(data.test):.2%}")
    row("images labelled differently", lambda t: str(int(np.sum(t.jax32.predictions != t.torch32.predictions))))
    return result


def _flat(lists: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
    return [array for arrays in lists for array in arrays]


def _count(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> str:
    if not ours and not theirs:
        return "none drawn"
    same = sum(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
    return f"{same} of {len(theirs)}"


def draw(twins: Sequence[Twins], path: Path) -> None:
    """Both loss curves of each model, and their difference below."""
    figure = Figure(figsize=(5 * len(twins), 5), layout="constrained")
    axes = figure.subplots(2, len(twins), squeeze=False, sharex="col", height_ratios=[2, 1])
    for (upper, lower), each in zip(axes.T, twins, strict=True):
        upper.plot(each.torch32.losses, label="PyTorch", linewidth=3, alpha=0.4)
        upper.plot(each.jax32.losses, label="JAX", linewidth=1)
        upper.set(title=each.model, ylabel="loss of the batch")
        upper.legend()
        for bits, ours, theirs in (("float32", each.jax32, each.torch32), ("float64", each.jax64, each.torch64)):
            difference = np.abs(np.subtract(ours.losses, theirs.losses))
            lower.semilogy(np.maximum(difference, 1e-18), label=bits)
        lower.set(xlabel="step", ylabel="|difference|")
        lower.legend()
    figure.savefig(path, dpi=120)
