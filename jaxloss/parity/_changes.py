"""What ports do otherwise: for each PyTorch function, the calls that a faulty port makes in its place."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from jaxloss.parity._change import Change, Rule
from jaxloss.parity._changes_between import BETWEEN_LAYERS, EPSILONS, of_terms
from jaxloss.parity._changes_recurrent import RECURRENT
from jaxloss.parity._changes_rotary import ROTARY


def changes(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Change]:
    """Everything that a port may have done instead of this call."""
    name = getattr(function, "__name__", "").strip("_")
    for rules in (_RULES, ROTARY):
        if name in rules:
            yield from rules[name](function, args, kwargs)


def dropped(x: Tensor, source: Tensor, p: float) -> Tensor:
    """What dropout made of `source`: stands for the call in `changes`."""
    return x


def insertions(x: Tensor) -> Iterator[Change]:
    """What a port may have done on top."""
    axis = 1 if x.ndim > 1 else 0
    for name, function in {**_ACTIVATIONS, **_softmaxes(axis)}.items():
        yield Change(f"the port applies {name} here, PyTorch does not", f"remove {name}", lambda f=function: f(x))


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu with approximate=True": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "elu": F.elu,
    "leaky_relu": F.leaky_relu,
    "relu6": F.relu6,
    "softplus": F.softplus,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "mish": F.mish,
    "selu": F.selu,
    "celu": F.celu,
    "logsigmoid": F.logsigmoid,
    "softsign": F.softsign,
    "the quick GELU, x * sigmoid(1.702 x)": lambda x: x * torch.sigmoid(1.702 * x),
}


def _softmaxes(axis: int) -> dict[str, Callable[[Tensor], Tensor]]:
    return {"softmax": lambda x: F.softmax(x, axis), "log_softmax": lambda x: F.log_softmax(x, axis)}


def _activation(function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Change]:
    name, x = function.__name__, args[0]
    approximate = kwargs.get("approximate") == "tanh"
    own = f"{name} with approximate=True" if approximate else name
    if name == "hardtanh" and (*args[1:3], *kwargs.values())[:2] == (0, 6):
        own = "relu6"
    if name in _PARAMETERS:
        parameter, values, fix = _PARAMETERS[name]
        own_value = kwargs.get(parameter, args[1] if len(args) > 1 else values[0])
        for value in (value for value in values if value != own_value):
            meaning = f"the port's {name} has {parameter}={value:g}, PyTorch's {parameter}={own_value:g}"
            yield Change(meaning, fix.format(own_value), lambda value=value: function(x, value))
    for other, instead in _ACTIVATIONS.items():
        if other != own:
            of_gelu = name == other[:4] == "gelu"
            fix = f"pass approximate={approximate} to jax.nn.gelu" if of_gelu else f"use {own}"
            yield Change(f"the port applies {other} where PyTorch applies {own}", fix, lambda f=instead: f(x))
    yield Change(f"the port leaves out {name}", f"apply {name}", lambda: x)
    for meaning in of_terms(name):
        yield Change(meaning, f"apply {name} to the sum", lambda: x, together=True)


# By activation: its parameter, what ports give it, PyTorch's default first, and the fix.
_PARAMETERS: dict[str, tuple[str, tuple[float, ...], str]] = {
    "elu": ("alpha", (1.0,), "pass alpha={:g} to jax.nn.elu"),
    "leaky_relu": ("negative_slope", (0.01, 0.1, 0.2), "pass negative_slope={:g} to jax.nn.leaky_relu"),
    "softplus": ("beta", (1.0,), "compute jax.nn.softplus({0:g} * x) / {0:g}"),
}


def _softmax(function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Change]:
    name, x = function.__name__, args[0]
    yield Change(f"the port leaves out {name}", _SOFTMAX_FIX[name], lambda: x)
    for axis in range(x.ndim):
        for other, instead in _softmaxes(axis).items():
            yield Change(
                f"the port applies {other} over axis {axis}",
                f"apply {name} over the axis of PyTorch's dim",
                lambda f=instead: f(x),
            )


_SOFTMAX_FIX = {
    "softmax": "apply softmax",
    "log_softmax": "end with log_softmax: nll_loss takes log-probabilities; logits belong in cross_entropy",
}


def _conv(function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Change]:
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = dict(zip(names, args, strict=False)) | kwargs
    x, weight, axes = given["input"], given["weight"], given["weight"].ndim - 2
    padding, dilation = given.get("padding", 0), given.get("dilation", 1)

    def again(**other: Any) -> Callable[[], Tensor]:
        return lambda: function(**{**given, **other})

    def same(dilation: Any = dilation) -> Tensor:
        steps, wide = ([_at(value, axis) for axis in range(axes)] for value in (given.get("stride", 1), dilation))
        kernel = [wide[axis] * (weight.shape[2 + axis] - 1) + 1 for axis in range(axes)]
        return again(input=F.pad(x, _same(x, kernel, steps)), padding=0, dilation=dilation)()

    fix = f"pass padding={padding} to the Flax layer: its default is SAME, PyTorch's is 0"
    yield Change(f"the port pads SAME, PyTorch {padding}", fix, same)
    if any(_at(dilation, axis) > 1 for axis in range(axes)):
        fix = f"pass padding={padding} and kernel_dilation={dilation}"
        yield Change(f"the port pads SAME and does not dilate, PyTorch by {dilation}", fix, lambda: same(dilation=1))
    yield Change(f"the port pads nothing, PyTorch {padding}", f"pass padding={padding}", again(padding=0))
    if not isinstance(padding, str) and any(_at(padding, axis) for axis in range(axes)):
        pads = [_at(padding, axis) for axis in reversed(range(axes)) for _ in (0, 1)]
        for mode, name in {"circular": "CIRCULAR", "reflect": "REFLECT"}.items():
            meaning, fix = f"the port pads {name}, PyTorch with zeros", f"pass padding={padding}"
            yield Change(meaning, fix, lambda mode=mode: again(input=F.pad(x, pads, mode=mode), padding=0)())
    yield from _kernels(again, weight, range(2, weight.ndim))
    yield _no_bias(again)


def _same(x: Tensor, kernel: Sequence[int], steps: Sequence[int]) -> list[int]:
    """What SAME pads, as F.pad takes it: the last axis first."""
    pads: list[int] = []
    for size, window, step in reversed(list(zip(x.shape[-len(kernel) :], kernel, steps, strict=True))):
        total = max((math.ceil(size / step) - 1) * step + window - size, 0)
        pads += [total // 2, total - total // 2]
    return pads


def _linear(function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Change]:
    given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs

    def again(**other: Any) -> Callable[[], Tensor]:
        return lambda: function(**{**given, **other})

    yield from _kernels(again, given["weight"], ())
    yield _no_bias(again)


def _kernels(again: Callable[..., Callable[[], Tensor]], weight: Tensor, spatial: Any) -> Iterator[Change]:
    fix = "convert with jaxloss.parity.load_torch"
    yield Change("the kernel's inputs and outputs are swapped", fix, again(weight=weight.transpose(0, 1)))
    if len(spatial) > 1:
        yield Change("the kernel's height and width are swapped", fix, again(weight=weight.transpose(-1, -2)))
    if spatial:
        yield Change("the kernel is flipped", fix, again(weight=weight.flip(tuple(spatial))))


def _no_bias(again: Callable[..., Callable[[], Tensor]]) -> Change:
    return Change("the port adds no bias", "copy the bias, and keep use_bias=True", again(bias=None))


def _norm(function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Change]:
    names = _NORM_ARGUMENTS[function.__name__]
    given = dict(zip(names, args, strict=False)) | kwargs

    def again(**other: Any) -> Callable[[], Tensor]:
        return lambda: function(**{**given, **other})

    def by_place() -> Tensor:
        x = given["input"].movedim(1, -1)
        return F.layer_norm(x, x.shape[-1:], given.get("weight"), given.get("bias"), eps).movedim(-1, 1)

    eps = given.get("eps", 1e-5)
    eps = torch.finfo(given["input"].dtype).eps if eps is None else eps  # rms_norm's default
    for other in EPSILONS:
        yield Change(f"the port's epsilon is {other:g}, PyTorch's {eps:g}", f"pass epsilon={eps:g}", again(eps=other))
    if (groups := given.get("num_groups")) is not None:
        channels = given["input"].shape[1]
        fix = f"pass num_groups={groups}, no group_size and epsilon={eps:g} to nnx.GroupNorm"
        for other in (n for n in range(1, channels + 1) if channels % n == 0 and n != groups):
            meaning = f"the port has {other} groups of channels, PyTorch {groups}"
            yield Change(meaning, fix, again(num_groups=other))
            yield Change(f"{meaning}, and another epsilon", fix, again(num_groups=other, eps=1e-6))
        meaning = "the port normalises each position over the channels, PyTorch groups of channels over all positions"
        yield Change(meaning, "use nnx.GroupNorm, not nnx.LayerNorm", by_place)
    if function.__name__ == "instance_norm":
        meaning = "the port normalises each position over the channels, PyTorch each channel over all positions"
        yield Change(meaning, "use nnx.InstanceNorm, not nnx.LayerNorm", by_place)
        meaning, fix = "the port normalises all channels together, PyTorch each by itself", "use nnx.InstanceNorm"
        affine = given["input"], 1, given.get("weight"), given.get("bias"), eps
        yield Change(meaning, fix, lambda: F.group_norm(*affine))
    if "training" in given:
        which = "running statistics", "the batch's own statistics"
        ours, theirs = which if given["training"] else which[::-1]
        fix = f"call {'train' if given['training'] else 'eval'}() on the port"
        statistics = {name: t.clone() for name in ("running_mean", "running_var") if (t := given.get(name)) is not None}
        yield Change(
            f"the port normalises by {ours}, PyTorch by {theirs}",
            fix,
            again(training=not given["training"], **statistics),
        )
        if statistics:
            fresh = {
                "running_mean": torch.zeros_like(statistics["running_mean"]),
                "running_var": torch.ones_like(statistics["running_var"]),
            }
            yield Change(
                "the port's running statistics are still the initial ones",
                "copy running_mean and running_var",
                again(**fresh),
            )
    for name in ("weight", "bias"):
        yield Change(
            f"the port has no {'scale' if name == 'weight' else name}", f"copy the {name}", again(**{name: None})
        )


_NORM_ARGUMENTS = {
    "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps"),
    "rms_norm": ("input", "normalized_shape", "weight", "eps"),
    "group_norm": ("input", "num_groups", "weight", "bias", "eps"),
    "batch_norm": ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    "instance_norm": ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps"),
}


def _pool(function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Change]:
    names = ("input", "kernel_size", "stride", "padding")
    given = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in (*names, "ceil_mode")}
    name = function.__name__
    kind, axes = ("max", "avg")["avg" in name], int(name[-2])
    other = getattr(F, f"{'avg' if kind == 'max' else 'max'}_pool{axes}d")
    words = {"max": "maxima", "avg": "averages"}
    fix = f"pool {words[kind]}"
    yield Change(
        f"the port pools {words['avg' if kind == 'max' else 'max']}, PyTorch {words[kind]}", fix, lambda: other(**given)
    )
    yield Change("the port leaves out the pool", fix, lambda: given["input"])
    x, padding = given["input"], given.get("padding", 0)
    stride = given.get("stride") or given["kernel_size"]
    kernel, steps = ([_at(value, axis) for axis in range(axes)] for value in (given["kernel_size"], stride))

    def again(**other: Any) -> Callable[[], Tensor]:
        return lambda: function(**{**given, "stride": stride, **other})

    def same() -> Tensor:
        bordered = F.pad(x, _same(x, kernel, steps), value=float("-inf") if kind == "max" else 0.0)
        return again(input=bordered, padding=0)()

    fix = f"pass padding={tuple((_at(padding, axis),) * 2 for axis in range(axes))}"
    yield Change(f"the port pads SAME, PyTorch {padding}", fix, same)
    yield Change(f"the port pads nothing, PyTorch {padding}", fix, again(padding=0))
    fix = f"pass strides={tuple(steps)}: the default is 1, PyTorch's is the window"
    yield Change(f"the port moves its window by 1, PyTorch by {stride}", fix, again(stride=1))
    for change in (-1, 1):
        other_window = tuple(size + change for size in kernel)
        fix = f"pass window_shape={tuple(kernel)}"
        yield Change(f"the port's window is {other_window}", fix, again(kernel_size=other_window))
    yield Change(
        "the port keeps an incomplete last window",
        "pass padding='VALID'",
        lambda: function(**{**given, "ceil_mode": True}),
    )
    if kind == "avg":
        count = not kwargs.get("count_include_pad", True)
        fix = f"pass count_include_pad={not count} to nnx.avg_pool"
        yield Change(
            "the port counts padding otherwise in its averages",
            fix,
            lambda: function(**{**given, "count_include_pad": count}),
        )


def _adaptive_pool(function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Change]:
    kind, other = ("max", "avg")[:: 1 if "max" in function.__name__ else -1]
    instead, words = getattr(F, function.__name__.replace(kind, other)), {"max": "maxima", "avg": "averages"}
    given = dict(zip(("input", "output_size"), args, strict=False)) | kwargs
    given.pop("return_indices", None)
    yield Change(
        f"the port pools {words[other]}, PyTorch {words[kind]}", f"pool {words[kind]}", lambda: instead(**given)
    )


def _dropout(function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Change]:
    """Called with the dropped array, what it was made of, and p."""
    x, source, p = args
    yield Change("the port does not divide what dropout keeps by 1 - p", "divide by 1 - p", lambda: x * (1 - p))
    yield Change("the port drops nothing", "call train() on the port", lambda: source)
    yield Change("the port swaps the rates of keeping and dropping", f"pass rate={p:g}", lambda: x * (1 - p) / p)


def _loss(function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Change]:
    names = ("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing")
    given = dict(zip(names, args, strict=False)) | kwargs
    x, targets = given["input"], given["target"]
    axis = 1 if x.ndim > 1 else 0

    def again(loss: Callable[..., Tensor] = function, **other: Any) -> Callable[[], Tensor]:
        return lambda: loss(**{**given, **other})

    if function.__name__ == "cross_entropy":
        probabilities, log_probs = F.softmax(x, axis), F.log_softmax(x, axis)
        yield Change(
            "the port gives softmax's probabilities to cross_entropy: softmax is applied twice",
            "give it the logits",
            again(input=probabilities),
        )
        yield Change(
            "the port gives the logits to nll_loss", "use cross_entropy, or apply log_softmax first", again(_nll)
        )
        yield Change(
            "the port gives softmax's probabilities to nll_loss", "use log_softmax", again(_nll, input=probabilities)
        )
        yield Change(
            "the port uses the natural logarithm of 1 + p",
            "use log_softmax",
            again(_nll, input=log_probs.exp().log1p()),
        )
        for smoothing in (0.0, 0.1):
            was = given.get("label_smoothing", 0.0)
            yield Change(
                f"the port's label_smoothing is {smoothing:g}, PyTorch's {was:g}",
                f"pass label_smoothing={was:g}",
                again(label_smoothing=smoothing),
            )
    else:
        yield Change("the port applies log_softmax to log-probabilities", "use nll_loss", again(F.cross_entropy))
        yield Change("the port gives probabilities to nll_loss", "give it log-probabilities", again(input=x.exp()))
    yield Change("the port leaves out the class weights", "pass weight", again(weight=None))
    rows = max(targets.numel(), 1) if not targets.is_floating_point() else max(x.numel() // x.shape[axis], 1)
    reduction = given.get("reduction", "mean")
    for other in {"mean", "sum"} - {reduction}:
        yield Change(
            f"the port's reduction is {other!r}, PyTorch's {reduction!r}",
            f"pass reduction={reduction!r}",
            again(reduction=other),
        )
    if reduction == "mean":
        fix = "divide by the sum of the targets' weights, as jaxloss does"
        yield Change(
            "the port divides by the number of rows, ignored ones and all, PyTorch by the sum of the targets' weights",
            fix,
            lambda: again(reduction="sum")() / rows,
        )
        yield Change("the port divides by the number of elements", fix, lambda: again(reduction="sum")() / x.numel())
    if not targets.is_floating_point():
        ignored = given.get("ignore_index", -100)
        for label in (0, x.shape[axis] - 1, ignored % x.shape[axis]):
            filled = targets.masked_fill(targets == ignored, label)
            yield Change(
                f"the port does not ignore {ignored}: it counts those rows as class {label}",
                f"pass ignore_index={ignored}",
                again(target=filled, ignore_index=-100),
            )


def _nll(**given: Any) -> Tensor:
    return F.nll_loss(**{name: value for name, value in given.items() if name != "label_smoothing"})


def _at(value: Any, axis: int) -> int:
    return value[axis if len(value) > 1 else 0] if isinstance(value, tuple | list) else value


_RULES: dict[str, Rule] = {
    **dict.fromkeys([*(name for name in _ACTIVATIONS if name.isidentifier()), "hardtanh", "clamp"], _activation),
    **dict.fromkeys(("softmax", "log_softmax"), _softmax),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _conv),
    "linear": _linear,
    **dict.fromkeys(_NORM_ARGUMENTS, _norm),
    **dict.fromkeys(("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d"), _pool),
    **dict.fromkeys([f"adaptive_{kind}_pool{axes}d" for kind in ("avg", "max") for axes in (1, 2, 3)], _adaptive_pool),
    **dict.fromkeys(("cross_entropy", "nll_loss"), _loss),
    dropped.__name__: _dropout,
    **BETWEEN_LAYERS,
    **RECURRENT,
}
