"""Faults that ports have: each must be found, at the right place, and named. The table of what is said is faults.md.

To write the table anew: `python -m parity_tests.test_zoo`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from torch.nn import functional as F  # noqa: N812

import jaxloss
from jaxloss.parity import Report
from jaxloss.parity._change import Choice
from jaxloss.parity._changes import changes
from jaxloss.parity._changes_rotary import HALVES, NEIGHBOURS, TURNS
from jaxloss.parity._original import Functions
from parity_tests.zoo import (
    CASES,
    FlaxResidual,
    FlaxTied,
    attend_in_jax,
    by_root_mean_square,
    gru,
    lstm,
    nearest,
    normalised,
    pad,
    resized,
    run,
    turned_in_jax,
)


@dataclass
class Fault:
    """What is done to a port, and what the report must say."""

    case: str
    mutate: Callable[[Any, Any], Any]  # the port, and the original that it is a port of
    place: str
    says: str  # in the diagnosis
    kind: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    optimizers: Callable[[Any], Any] | None = None


def set_on(path: str, **attributes: Any) -> Callable[[Any, Any], None]:
    """Sets attributes of a layer."""

    def mutate(port: Any, original: Any) -> None:
        layer = get(port, path)
        for name, value in attributes.items():
            setattr(layer, name, value)

    return mutate


def change(path: str, function: Callable[[Any], Any]) -> Callable[[Any, Any], None]:
    """Changes a weight."""

    def mutate(port: Any, original: Any) -> None:
        variable = get(port, path)
        variable.set_value(jnp.asarray(function(variable[...])))

    return mutate


def get(port: Any, path: str) -> Any:
    for name in filter(None, path.split(".")):
        port = port.layers[int(name)] if name.isdigit() else getattr(port, name)
    return port


def swap(first: str, second: str) -> Callable[[Any, Any], None]:
    def mutate(port: Any, original: Any) -> None:
        a, b = (nnx.state(get(port, path)) for path in (first, second))
        nnx.update(get(port, first), jax.tree.map(jnp.copy, b))
        nnx.update(get(port, second), jax.tree.map(jnp.copy, a))

    return mutate


def calls(**methods: Callable[..., Any]) -> Callable[[Any, Any], Any]:
    """A port of a subclass with other methods."""

    def mutate(port: Any, original: Any) -> Any:
        port.__class__ = type(type(port).__name__, (type(port),), methods)
        return port

    return mutate


def nothing(port: Any, original: Any) -> None:
    """The fault is in the options."""


def same_padding_stem(port: Any, original: Any) -> None:
    port.stem.padding = "SAME"


def unpermute(kernel: Any) -> Any:
    return jnp.moveaxis(kernel, 2, 0).reshape(kernel.shape)


def after(function: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    def mutate(port: Any, original: Any) -> Any:
        kind = type(port)
        return calls(__call__=lambda self, x: function(kind.__call__(self, x)))(port, original)

    return mutate


def without_log_softmax(port: Any, original: Any) -> Any:
    def call(self: Any, images: Any) -> Any:
        x = nnx.relu(pool(self.conv1(images)))
        x = nnx.relu(pool(self.conv2_drop(self.conv2(x))))
        return self.fc2(self.dropout(nnx.relu(self.fc1(x))))

    return calls(__call__=call)(port, original)


def pool(x: Any) -> Any:
    return nnx.max_pool(x, (2, 2), (2, 2))


def share(port: Any, original: Any) -> None:
    port.fc.bias.set_value(jnp.from_dlpack(original.fc.bias.detach()))


def lose_the_tie(port: Any, original: Any) -> None:
    port.head = nnx.data(nnx.Linear(4, 7, use_bias=False, rngs=nnx.Rngs(0)))
    port.head.kernel.set_value(jnp.array(original.head.weight.detach().T))


def attend_with_jax(self: Any, x: Any) -> Any:
    batch, length, width = x.shape
    q, k, v = (f(x).reshape(batch, length, 2, width // 2) for f in (self.query, self.key, self.value))
    return jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(batch, length, width)


def loss_with(ours: Callable[..., Any], theirs: Callable[..., Any] = F.cross_entropy) -> dict[str, Any]:
    return {"losses": (theirs, ours)}


def eval_for_ever(port: Any, original: Any) -> None:
    port.conv2_drop.rate = port.dropout.rate = 0.0


def rows_in_torchs_order(kernel: Any) -> Any:
    return kernel.reshape(5, 3, 4, 6).transpose(2, 0, 1, 3).reshape(kernel.shape)


WEIGHT = np.linspace(0.5, 2, 6)


def weighted(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(outputs, targets, torch.from_numpy(WEIGHT))


def mean_of_rows(outputs: Any, targets: Any) -> Any:
    return jaxloss.cross_entropy(outputs, targets, weight=WEIGHT, reduction="sum") / len(targets)


def optimizer(kind: Callable[..., Any], ours: Any, says: str, *, step: int = 1, **options: Any) -> Fault:
    """Another optimizer on the small network, seen at a step."""
    pair = lambda original: (kind(original.parameters(), **options), ours)  # noqa: E731
    return Fault("flat", nothing, f"step {step}", says, options={"steps": 3}, optimizers=pair)


def recurrent(step: Callable[..., Any], says: str, **options: Any) -> Fault:
    """Another step of an LSTM or a GRU."""
    place = "between the input and head"
    return Fault(step.__name__, set_on("", step=partial(step, **options)), place, says)


def without_bias_hh(port: Any, original: Any) -> None:
    def call(self: Any, x: Any, h: Any) -> Any:
        return x @ self.weight_ih_l0.T + self.bias_ih_l0, h @ self.weight_hh_l0.T

    calls(__call__=call)(port.rnn, original)


def feed_without_norm2(self: Any, x: Any) -> Any:
    return x + self.down(jax.nn.gelu(self.up(x), approximate=False))


def mix_from_the_norm(self: Any, x: Any) -> Any:
    x = self.norm1(x)
    return x + self.proj(self.attend(x))


def by_running_statistics(port: Any, original: Any) -> None:
    call = lambda self, x: nnx.BatchNorm.__call__(self, x, use_running_average=True)  # noqa: E731
    calls(__call__=call)(port.bn1, original)


def between(case: str, function: Callable[[Any], Any], says: str) -> Fault:
    """Another function between two layers."""
    return Fault(case, set_on("", function=function), "between first and last", says)


def masked(kept: Any) -> Callable[[Any], Any]:
    return partial(attend_in_jax, mask=kept)


TRAIN = {"train": True}
FAULTS = {
    "transposed square kernel": Fault(
        "transformer", change("proj.kernel", jnp.transpose), "proj", "inputs and outputs are swapped", "layout"
    ),
    "kernel height and width swapped": Fault(
        "residual",
        change("conv1.kernel", lambda k: k.swapaxes(0, 1)),
        "conv1",
        "axes in the order (1, 0, 2, 3)",
        "layout",
    ),
    "kernel flipped": Fault(
        "residual", change("conv2.kernel", lambda k: k[::-1, ::-1]), "conv2", "flipped along (0, 1)", "layout"
    ),
    "flatten order of the weights": Fault(
        "cnn", change("fc.kernel", unpermute), "fc", "(channels, height, width)", "layout"
    ),
    "swapped layers of equal shapes": Fault("residual", swap("conv1", "conv2"), "conv1", "holds PyTorch's conv2"),
    "bias never copied": Fault("residual", change("conv1.bias", jnp.zeros_like), "conv1", "still the initial 0"),
    "bias missing": Fault(
        "residual", set_on("conv1", bias=None, use_bias=False), "conv1", "no counterpart in the port"
    ),
    "scale never copied": Fault("residual", change("bn1.scale", jnp.ones_like), "bn1", "scale is still the initial 1"),
    "stale running mean": Fault("residual", change("bn1.mean", jnp.zeros_like), "bn1", "still the initial 0"),
    "weight scaled": Fault("cnn", change("fc.kernel", lambda k: 2 * k), "fc", "times 2", "scale"),
    "SAME padding with stride": Fault("residual", same_padding_stem, "stem", "pads SAME"),
    "circular padding": Fault("cnn", set_on("layer2.0", padding="CIRCULAR"), "layer2.0", "pads CIRCULAR"),
    "batch norm epsilon": Fault("residual", set_on("bn2", epsilon=1e-3), "bn2", "epsilon is 0.001"),
    "layer norm epsilon": Fault("transformer", set_on("norm2", epsilon=1e-6), "norm2", "epsilon is 1e-06"),
    "bfloat16 layer": Fault("transformer", set_on("up", dtype=jnp.bfloat16), "up", "computes in bfloat16", "precision"),
    "float16 layer": Fault("cnn", set_on("fc", dtype=jnp.float16), "fc", "computes in float16", "precision"),
    "aliased weights": Fault("flat", share, "fc", "shares PyTorch's memory"),
    "tie lost": Fault("tied", lose_the_tie, "head", "PyTorch ties it to embed.weight"),
    "kernel not flipped": Fault(
        "upsample", change("up.kernel", lambda k: k[::-1, ::-1]), "up", "flipped along (0, 1)", "layout"
    ),
    "sum in bfloat16": Fault(
        "residual",
        calls(pool=lambda self, x: FlaxResidual.pool(self, x).astype(jnp.bfloat16)),
        "between bn2 and fc",
        "computes in bfloat16",
        "precision",
    ),
    "float32 inside a function": Fault(
        "transformer", calls(attend=attend_with_jax), "between value and proj", "computes in float32", "precision"
    ),
    "gradient at ties": Fault(
        "tied", calls(pool=lambda self, x: x.max(1)), "between embed and the output", "derivative", "localised"
    ),
    "GELU approximation": Fault("transformer", set_on("", approximate=True), "between up and down", "approximate=True"),
    "attention not scaled": Fault("transformer", set_on("", scale=1.0), "between value and proj", "division by 2"),
    "attention sees the future": Fault(
        "transformer", set_on("", causal=False), "between value and proj", "leaves out a mask"
    ),
    "softmax over another axis": Fault(
        "transformer", set_on("", axis=-2), "between value and proj", "softmax over axis 2"
    ),
    "queries and keys swapped": Fault(
        "transformer", set_on("", scores="bkhd,bqhd->bhqk"), "between value and proj", "is the transpose of PyTorch's"
    ),
    "attention scaled by 1/d": Fault(
        "transformer", set_on("", scale=0.25), "between value and proj", "by sqrt(4) once more"
    ),
    "heads merged before they are moved": Fault(
        "transformer", set_on("", merged="bhqk,bkhd->bhqd"), "between value and proj", "transposition is missing"
    ),
    "fused attention scaled by 1/d": between(
        "attention", partial(attend_in_jax, scale=1 / 2), "by d, PyTorch by sqrt(d)"
    ),
    "fused attention's queries and keys": between(
        "attention", partial(attend_in_jax, swapped=True), "swaps queries and keys"
    ),
    "earlier positions masked": between("causal", masked(jnp.tri(25, dtype=bool).T), "masks earlier positions"),
    "mask off by one": between("causal", masked(jnp.tri(25, k=1, dtype=bool)), "see the next"),
    "masked scores of 0": Fault("transformer", set_on("", filler=0.0), "between value and proj", "with 0, PyTorch"),
    "neighbours turned for halves": between(
        "halves", turned_in_jax("neighbours"), "neighbouring channels together, PyTorch"
    ),
    "neighbours turned for halves, apart": between(
        "apart", turned_in_jax("neighbours"), "neighbouring channels together"
    ),
    "halves turned for neighbours": between(
        "neighbours", turned_in_jax("halves"), "one half of the channels with the other"
    ),
    "halves turned for every two": between(
        "every two", turned_in_jax("halves"), "one half of the channels with the other"
    ),
    "angles of halves": between(
        "halves", turned_in_jax("neighbours", angles="halves"), "laid out for turning one half"
    ),
    "angles of neighbours": between(
        "every two", turned_in_jax("halves", angles="neighbours"), "laid out for turning neighbouring"
    ),
    "turned backwards": between("halves", turned_in_jax("halves", -1), "negative angles"),
    "complex conjugates": between("neighbours", turned_in_jax("neighbours", -1), "negative angles"),
    "neighbours, and other digits": Fault(
        "table", set_on("", function=turned_in_jax("neighbours")), "between first and last", "of the difference remains"
    ),
    "frequencies with more digits": Fault(
        "table",
        set_on("", function=turned_in_jax("halves")),
        "between first and last",
        "rates has float32's digits",
        "precision",
    ),
    "scaled attention for one without": between("halves", turned_in_jax("halves", scale=0.5), "by sqrt(4) once more"),
    "heads repeated together": between("repeated", lambda x: jnp.tile(x, 2), "repeats all together"),
    "corners not aligned": between("corners", lambda x: resized(x, 7, "linear"), "align_corners=True"),
    "smoothed before it is shrunk": between("shrunk", lambda x: resized(x, 3, "linear", antialias=True), "smooths"),
    "linear for nearest": between("nearest", lambda x: resized(x, 7, "linear"), "by bilinear, PyTorch by nearest"),
    "nearest for linear": between("corners", nearest, "by nearest, PyTorch by bilinear"),
    "nearest by centres": between("nearest", lambda x: resized(x, 7, "nearest"), "nearest to its centre"),
    "joined in reverse": between("joined", lambda x: jnp.concatenate((jnp.tanh(x), x), -1), "reverse order"),
    "gated by the other half": between("gated", lambda x: jax.nn.sigmoid(x[..., :2]) * x[..., 2:], "first half"),
    "layer's scale missing": between("scaled", lambda x: x, "layer's scale"),
    "factor applied twice": between("halved", lambda x: x * 0.25, "0.5 is applied twice"),
    "difference the other way round": between("difference", lambda x: x - jnp.tanh(x), "other way round"),
    "sum for difference": between("difference", lambda x: jnp.tanh(x) + x, "adds what PyTorch subtracts"),
    "sign missing": between("negated", jnp.exp, "minus sign"),
    "maximum for mean": Fault(
        "gated", set_on("", mean=lambda x: x.max((1, 2))), "between first and last", "takes the maximum"
    ),
    "sum for mean over an image": Fault(
        "gated", set_on("", mean=lambda x: x.sum((1, 2))), "between first and last", "takes the sum"
    ),
    "residual missing": Fault(
        "residual", calls(join=lambda self, y, x: nnx.relu(y)), "between bn2 and fc", "summands is missing"
    ),
    "relu before the sum": Fault(
        "residual",
        calls(join=lambda self, y, x: nnx.relu(y) + x),
        "between bn2 and fc",
        "applies relu to a sum's first term",
    ),
    "residual of the norm": Fault(
        "transformer",
        calls(mix=mix_from_the_norm),
        "between proj and norm2",
        "adds what norm1 returns, PyTorch what it gets",
    ),
    "mean for an element": Fault(
        "transformer",
        calls(pool=lambda self, x: x.mean(1)),
        "between down and head",
        "takes the mean, PyTorch element -1",
    ),
    "relu missing": Fault("residual", calls(join=lambda self, y, x: y + x), "between bn2 and fc", "leaves out relu"),
    "average without padding": Fault(
        "residual", set_on("", count_include_pad=False), "between bn2 and fc", "counts padding"
    ),
    "pool padded SAME": Fault(
        "residual",
        calls(pool=lambda self, x: nnx.avg_pool(x, (3, 3), (2, 2), "SAME")),
        "between bn2 and fc",
        "pads SAME",
    ),
    "pool not padded": Fault(
        "residual", calls(pool=lambda self, x: nnx.avg_pool(x, (3, 3), (2, 2))), "between bn2 and fc", "pads nothing"
    ),
    "pool without strides": Fault(
        "residual",
        calls(pool=lambda self, x: nnx.avg_pool(x, (3, 3), padding=pad())),
        "between bn2 and fc",
        "moves its window by 1",
    ),
    "another window": Fault(
        "residual",
        calls(pool=lambda self, x: nnx.avg_pool(x, (2, 2), (2, 2), pad())),
        "between bn2 and fc",
        "window is (2, 2)",
    ),
    "maximum for average": Fault(
        "residual",
        calls(pool=lambda self, x: nnx.max_pool(x, (3, 3), (2, 2), pad())),
        "between bn2 and fc",
        "pools maxima",
    ),
    "adaptive pool of maxima": between("pooled", lambda x: x.max((1, 2), keepdims=True), "pools maxima"),
    "layer norm for group norm": between("groups", lambda x: normalised(x, (3,)), "each position over the channels"),
    "one group for instance norm": between(
        "instances", lambda x: nnx.relu(normalised(x, (1, 2, 3))), "all channels together"
    ),
    "layer norm for instance norm": between(
        "instances", lambda x: nnx.relu(normalised(x, (3,))), "each position over the channels"
    ),
    "epsilon beside large numbers": between("large", lambda x: normalised(60 * x, (3,), 1e-6), "epsilon is 1e-06"),
    "relu for celu": between("celu", nnx.relu, "relu where PyTorch applies celu"),
    "relu for relu6": between("bounded", lambda x: nnx.relu(9 * x), "relu where PyTorch applies relu6"),
    "epsilon by hand": between(
        "root", partial(by_root_mean_square, epsilon=1e-6), "epsilon of 1e-06, PyTorch one of 1e-05"
    ),
    "a constant of ten digits": between("negated", lambda x: jnp.exp(-x) * (1 + 1e-10), "less than 1e-9"),
    "gate's activation": Fault("swiglu", set_on("", activation=nnx.relu), "between up and down", "relu where PyTorch"),
    "layer left out": Fault(
        "transformer", calls(feed=feed_without_norm2), "between proj and up", "PyTorch calls norm2 here"
    ),
    "layer of another shape": Fault(
        "upsample", set_on("up", padding="SAME"), "between the input and fc", "up returns (6, 8, 8, 3)"
    ),
    "LSTM's gates in Haiku's order": recurrent(lstm, "the forget gate for the cell gate", order="igfo"),
    "forget gate raised": recurrent(lstm, "adds 1 to the forget gate", forget=1.0),
    "second bias missing": Fault("gru", without_bias_hh, "between the input and head", "leaves out bias_hh"),
    "GRU's gates swapped": recurrent(gru, "the reset gate for the update gate", order="zrn"),
    "softmax twice": Fault("cnn", after(jax.nn.softmax), "between fc and the output", "applies softmax"),
    "logits for NLL": Fault("net", without_log_softmax, "between fc2 and the output", "leaves out log_softmax"),
    "loss of probabilities": Fault(
        "flat",
        nothing,
        "loss",
        "softmax is applied twice",
        options=loss_with(lambda x, y: jaxloss.cross_entropy(jax.nn.softmax(x), y)),
    ),
    "sum for mean": Fault(
        "flat",
        nothing,
        "loss",
        "reduction is 'sum'",
        options=loss_with(lambda x, y: jaxloss.cross_entropy(x, y, reduction="sum")),
    ),
    "stopped gradient": Fault(
        "residual",
        calls(join=lambda self, y, x: nnx.relu(y + jax.lax.stop_gradient(x))),
        "between stem and conv1",
        "derivative",
    ),
    "batch norm momentum": Fault(
        "residual", set_on("bn1", momentum=0.1), "bn1", "takes PyTorch's momentum", options=TRAIN
    ),
    "running statistics in training": Fault(
        "residual", by_running_statistics, "bn1", "normalises by running statistics", options=TRAIN
    ),
    "biased running variance": Fault(
        "residual",
        lambda port, original: setattr(port.bn2, "__class__", nnx.BatchNorm),
        "bn2",
        "by n, PyTorch by n - 1",
        options=TRAIN,
    ),
    "dropout rate": Fault(
        "net", set_on("dropout", rate=0.25), "between fc1 and fc2", "rate 0.25, PyTorch at 0.5", "scale", TRAIN
    ),
    "dropout of elements": Fault(
        "net", set_on("conv2_drop", broadcast_dims=()), "between conv2 and fc1", "drops elements", options=TRAIN
    ),
    "left in eval mode": Fault("net", eval_for_ever, "between conv2 and fc1", "drops never", options=TRAIN),
    "flatten order": Fault(
        "flat", change("fc.kernel", rows_in_torchs_order), "between conv and fc", "flattens (height, width, channels)"
    ),
    "ignore_index dropped": Fault(
        "flat",
        nothing,
        "loss",
        "does not ignore 3",
        options=loss_with(jaxloss.cross_entropy, partial(F.cross_entropy, ignore_index=3)),
    ),
    "mean over all rows": Fault(
        "flat", nothing, "loss", "by the number of rows", options=loss_with(mean_of_rows, weighted)
    ),
    "label smoothing missing": Fault(
        "flat",
        nothing,
        "loss",
        "label_smoothing is 0",
        options=loss_with(jaxloss.cross_entropy, partial(F.cross_entropy, label_smoothing=0.2)),
    ),
    "log-probabilities once more": Fault(
        "net", nothing, "loss", "", options=loss_with(lambda x, y: jaxloss.nll_loss(jnp.exp(x), y), F.nll_loss)
    ),
    "weight decay of optax's adamw": optimizer(
        torch.optim.AdamW, optax.adamw(1e-3), "weight_decay is 0.0001, PyTorch's 0.01"
    ),
    "decoupled weight decay": optimizer(
        torch.optim.Adam, optax.adamw(1e-3, weight_decay=0.1), "decoupled_weight_decay is True", weight_decay=0.1
    ),
    "Adam epsilon": optimizer(torch.optim.Adam, optax.adam(1e-3, eps=1e-6), "eps is 1e-06"),
    "nesterov missing": optimizer(
        torch.optim.SGD, optax.sgd(0.1, momentum=0.9), "nesterov is False", lr=0.1, momentum=0.9, nesterov=True
    ),
    "dampening": optimizer(
        torch.optim.SGD, optax.sgd(0.1, momentum=0.9), "dampening is 0.0", step=2, lr=0.1, momentum=0.9, dampening=0.5
    ),
    "RMSprop's epsilon inside the root": optimizer(
        torch.optim.RMSprop, optax.rmsprop(1e-2, decay=0.99, eps_in_sqrt=True), "inside the root"
    ),
    "Adagrad's initial accumulator": optimizer(
        torch.optim.Adagrad, optax.adagrad(1e-2, eps=1e-10), "initial_accumulator_value is 0.1"
    ),
    "learning rate": optimizer(torch.optim.SGD, optax.sgd(0.07), "times 0.7", lr=0.1),
    "a schedule that PyTorch lacks": optimizer(
        torch.optim.SGD, optax.sgd(lambda count: 0.1 * 0.5 ** (count // 2)), "times 0.5", step=3, lr=0.1
    ),
    "gradients clipped": optimizer(
        torch.optim.Adam, optax.chain(optax.clip_by_global_norm(1e-2), optax.adam(1e-3)), "gradients"
    ),
    "RMSprop decay": optimizer(
        torch.optim.RMSprop, optax.rmsprop(1e-2, decay=0.9, eps_in_sqrt=False), "alpha is 0.9, PyTorch's 0.99"
    ),
}


def diagnose(fault: Fault) -> Report:
    options = {"steps": 0, "dtypes": ("float64",), "optimizers": fault.optimizers} | fault.options
    return run(CASES[fault.case], 0, fault.mutate, **options)


def row(name: str) -> str:
    """A line of the table: where the fault is found, and what is said of it."""
    fault, first = FAULTS[name], diagnose(FAULTS[name]).first_divergence
    assert first is not None
    assert first.place == fault.place
    assert fault.says in first.diagnosis + first.problem
    assert fault.kind in (None, first.kind)
    return f"| {name} | {fault.case} | {first.place} | {first.kind or '-'} | {first.diagnosis or first.problem} |"


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_found_placed_and_named(name):
    assert row(name) in TABLE.read_text().splitlines()


@pytest.mark.parametrize("name", sorted(CASES.keys() - {"cnn", "net"}))  # those are tested with their trainings
def test_network_without_a_fault_passes(name, parity):
    parity.judge(run(CASES[name], steps=0, dtypes=["float64"]))


@pytest.mark.parametrize("function", [torch.add, torch.sub, torch.mul, torch.div, torch.matmul, torch.bmm])
def test_a_call_that_names_its_operands_is_changed_as_one_that_does_not(function):
    a, b = torch.rand(2, 3, 3), torch.rand(2, 3, 3)
    second = "mat2" if function is torch.bmm else "other"
    expected = [change.result() for change in changes(function, (a, b), {})]
    assert expected
    assert not all(torch.equal(each, function(a, b)) for each in expected)
    for args, kwargs in (((a,), {second: b}), ((), {"input": a, second: b})):
        found = [change.result() for change in changes(function, args, kwargs)]
        torch.testing.assert_close(found, expected)


def test_search_for_a_reason_does_not_end_on_integers():
    def shifted(self, tokens):
        return FlaxTied.__call__(self, (tokens + 1) % 7)

    first = diagnose(Fault("tied", calls(__call__=shifted), "", "")).first_divergence
    assert first.place == "between the input and embed"
    assert "search" not in first.fix


def test_a_join_of_unlike_tensors_can_be_reversed():
    a, b = torch.rand(2, 3), torch.rand(2, 5)
    found = [change.result() for change in changes(torch.cat, ([a, b], 1), {})]
    torch.testing.assert_close(found, [torch.cat((b, a), 1)])


@pytest.mark.parametrize(
    "take_apart",
    [
        lambda x: x.chunk(2, -1),
        lambda x: x.split(4, -1),
        lambda x: x.tensor_split(2, dim=-1),
        lambda x: (x.narrow(-1, 0, 4), x.narrow(-1, 4, 4)),
        lambda x: (x[..., :4], x[:, 4:]),
    ],
)
def test_however_rotary_positions_take_halves_neighbours_can_be_taken(take_apart):
    x = torch.rand(3, 8)
    with Functions(0, inside=True, choice=Choice(None, TURNS.format(NEIGHBOURS, HALVES), 0)):
        found = take_apart(x)
    torch.testing.assert_close(tuple(found), (x[:, ::2], x[:, 1::2]))


@pytest.mark.parametrize(
    "take_apart", [lambda x: x.unflatten(-1, (4, 2)).unbind(-1), lambda x: (x[..., ::2], x[:, 1::2])]
)
def test_however_rotary_positions_take_neighbours_halves_can_be_taken(take_apart):
    x = torch.rand(3, 8)
    with Functions(0, inside=True, choice=Choice(None, TURNS.format(HALVES, NEIGHBOURS), 0)):
        found = take_apart(x)
    torch.testing.assert_close(tuple(found), (x[:, :4], x[:, 4:]))


def test_readme_shows_what_a_report_says():
    lines = str(diagnose(FAULTS["GELU approximation"])).splitlines()[:4]
    assert "\n".join(lines) in (Path(__file__).parents[1] / "README.md").read_text()


TABLE = Path(__file__).parent / "faults.md"

if __name__ == "__main__":
    head = ["| fault | network | found at | class | diagnosis |", "| --- | --- | --- | --- | --- |"]
    TABLE.write_text("\n".join([*head, *map(row, FAULTS)]) + "\n")
