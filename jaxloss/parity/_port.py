"""A Flax NNX module opened up: run with any weights, every layer's call handed to a hook."""

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jax.extend.core import get_opaque_trace_state

from jaxloss.parity._fused import dropping, exact_attention
from jaxloss.parity._layout import Shape
from jaxloss.parity._masks import PortDrop
from jaxloss.parity._pairs import Call
from jaxloss.parity._recurrent import CELLS, LINEN_CELLS
from jaxloss.parity.weights import Weights, weights_of

Arrays = dict[str, jax.Array]
Hook = Callable[[object, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

_TRAIN_FLAGS = {"train": True, "training": True, "is_training": True, "deterministic": False}
_DROPOUTS = (nnx.Dropout, linen.Dropout)

_hook: ContextVar[Hook | None] = ContextVar("hook", default=None)


class Run(NamedTuple):
    """What a run of a port gives."""

    outputs: Any
    statistics: Arrays  # afterwards
    tape: "Tape"


class InnerTraceError(Exception):
    """A layer or a dropout is called inside a function that is traced by itself."""


class Port:
    """A copy of a Flax NNX module, in a dtype and a mode of its own."""

    def __init__(
        self,
        module: nnx.Module,
        dtype: jax.typing.DTypeLike,
        *,
        train: bool,
        told: Collection[np.dtype],
        theirs: Collection[str] = (),
        names: Collection[str] = (),
    ) -> None:
        """Copies the module, and has layers that are told to compute in one of the dtypes told compute in this one.

        Of the names of a weight that has several, one of theirs, PyTorch's, is kept. `names` are those that are given.
        """
        copied = nnx.clone(module)
        copied.train() if train else copied.eval()
        self._flags_after = partial(train_flags, type(module), train=train)
        for node in _modules(copied):
            for name in ("dtype", "param_dtype"):  # a recurrent cell's carry begins in param_dtype
                computed, now = isinstance(getattr(type(node), name, None), property), getattr(node, name, None)
                if not computed and now is not None and jnp.dtype(now) in told:
                    setattr(node, name, dtype)
            if dtype == jnp.float64 and getattr(node, "attention_fn", None) is nnx.dot_product_attention:
                node.attention_fn = exact_attention
            node.__class__ = _hooked(type(node))
        self.dtype, self._copied, self._theirs, self._names = dtype, copied, theirs, names
        self._graph, self._state = nnx.split(copied)
        self._order = list(weights_of(module, {}, theirs, names))  # of definition: a copy's attributes are sorted
        self.set_flatten({})
        self.layers = leaf_layers(self.weights)

    def set_flatten(self, flatten: Mapping[str, Sequence[int]]) -> None:
        """Says which linear layers read or write a flattened feature map, as `load_torch` takes it."""
        self.flatten = dict(flatten)
        weights = self._weights_of(self._copied)
        firsts: dict[tuple[int, ...], str] = {}
        for name in sorted(weights, key=lambda name: name not in self._theirs):
            firsts.setdefault(weights[name].key, name)
        self.weights = {name: weights[name] for name in self._order if name in firsts.values()}

    def _weights_of(self, module: nnx.Module) -> Weights:
        return weights_of(module, self.flatten, self._theirs, self._names)

    @property
    def parameters(self) -> list[str]:
        """Names of what is trained, which integers never are; all other weights are statistics."""
        params = [name for name, weight in self.weights.items() if weight.is_trained]
        return [name for name in params if jnp.issubdtype(self.weights[name].variable.dtype, jnp.inexact)]

    def values(self) -> Arrays:
        """The module's own weights, the floating ones in the port's dtype."""
        return {name: self.cast(weight.variable.get_value()) for name, weight in self.weights.items()}

    def cast(self, array: Any) -> jax.Array:
        """A copy, in the port's dtype if it is floating, and in its precision if it is complex."""
        array = np.array(array)
        if np.iscomplexobj(array):
            return jnp.array(array, jnp.promote_types(self.dtype, jnp.complex64))
        return jnp.array(array, self.dtype if jnp.issubdtype(array.dtype, jnp.floating) else None)

    def run(self, values: Mapping[str, Any], inputs: Sequence[Any], tape: Callable[[], "Tape"]) -> Run:
        """The outputs, the statistics afterwards, and the tape that has seen it all."""
        first = tape()
        try:
            with dropping(first.drop):
                return self._run(values, inputs, first)
        except InnerTraceError:  # a jit keeps what it traced of one run for the next: without it, calls are seen
            again = tape()
            again.inline = True
            with jax.disable_jit(), dropping(again.drop):
                return self._run(values, inputs, again)

    def _run(self, values: Mapping[str, Any], inputs: Sequence[Any], hook: "Tape") -> Run:
        module = nnx.merge(self._graph, self._state, copy=True)
        weights = self._weights_of(module)
        for name, value in values.items():
            weights[name].variable.set_value(value)
        hook.names = {id(weights[name].layer): weights[name].layer_name for name in reversed(list(values))}
        with _hooks(hook):
            outputs = module(*inputs, **self._flags_after(len(inputs)))
        after = {name: weights[name].variable.get_value() for name in values if name not in self.parameters}
        return Run(outputs, after, hook)


class Tape:
    """Sees every call of a module in one run, and gives dropout the masks of the original."""

    def __init__(self, layers: Sequence[str], masks: Sequence[Any]) -> None:
        """Watches the layers of these names."""
        self.names: dict[int, str] = {}
        self.arrived: dict[Call, list[Any]] = {}  # in the order of the calls
        self.drops: list[PortDrop] = []  # so far
        self.outputs: dict[Call, Any] = {}
        self.inline = False  # whether jit is disabled
        self._trace = get_opaque_trace_state()
        self._layers, self._masks = set(layers), masks
        self._counts: dict[str, int] = {}

    def __call__(
        self, module: object, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Called instead of an NNX module."""
        return self.call(self.names.get(id(module)), module, function, args, kwargs)

    def call(
        self, name: str | None, module: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Called instead of a module of this name."""
        if isinstance(module, _DROPOUTS):
            x, *given = args or (kwargs["inputs"],)
            off = kwargs.get("deterministic", given[0] if given else None)
            if not (module.deterministic if off is None else off) and module.rate:
                return self.drop(x, module.rate, tuple(module.broadcast_dims))
        if name is None or name not in self._layers or self._left_whole():
            return function(*args, **kwargs)
        index = self._counts[name] = self._counts.get(name, -1) + 1
        arguments = *args, *kwargs.values()
        arrays = [arg for arg in arguments if isinstance(arg, jax.Array | np.ndarray)]
        self.arrived[name, index] = arrays

        def compute(*arrays: Any) -> Any:
            rest = iter(arrays)
            given = [next(rest) if isinstance(arg, jax.Array | np.ndarray) else arg for arg in arguments]
            return function(*given[: len(args)], **dict(zip(kwargs, given[len(args) :], strict=True)))

        return self.layer((name, index), compute, arrays)

    def layer(self, call: Call, compute: Callable[..., Any], arrays: list[Any]) -> Any:
        """What a layer returns."""
        return compute(*arrays)

    def _left_whole(self) -> bool:
        """Whether this call is inside a jit, a checkpoint, a condition, …; with a jit, all is run again without it."""
        inside = get_opaque_trace_state() != self._trace
        if inside and not self.inline:
            raise InnerTraceError
        return inside

    def drop(self, x: jax.Array, rate: float, broadcast: Shape) -> jax.Array:
        """What dropout at this rate, with one mask along the axes to broadcast, leaves in place of the port's own."""
        self._left_whole()
        window = sum(isinstance(output, jax.Array) for output in self.outputs.values())
        self.drops.append(PortDrop(window, rate, broadcast, x.shape))
        if len(self.drops) > len(self._masks):  # the original does not drop here, and the difference must show
            mask = jax.random.bernoulli(jax.random.key(len(self.drops)), 1 - rate, x.shape)
        else:
            mask = self._masks[len(self.drops) - 1]
        return jnp.where(mask, x / (1 - rate) if rate < 1 else x, 0)


class Free(Tape):
    """Lets every layer compute from what arrives."""

    def layer(self, call: Call, compute: Callable[..., Any], arrays: list[Any]) -> Any:
        """The layer's output."""
        output = self.outputs[call] = compute(*arrays)
        return output


class Cut(Tape):
    """Feeds every layer the original's inputs, and what follows it the original's output."""

    def __init__(
        self,
        layers: Sequence[str],
        masks: Sequence[Any],
        inputs: Mapping[Call, Sequence[Any]],
        outputs: Mapping[Call, Any],
    ) -> None:
        """Cuts the calls that have inputs and outputs; others are left whole."""
        super().__init__(layers, masks)
        self.inputs, self.forced = inputs, outputs

    def layer(self, call: Call, compute: Callable[..., Any], arrays: list[Any]) -> Any:
        """The original's output."""
        if call not in self.inputs:
            return compute(*arrays)
        self.outputs[call] = compute(*self.inputs[call])
        return self.forced[call]


@contextmanager
def _hooks(hook: Hook) -> Iterator[None]:
    token = _hook.set(hook)
    try:
        yield
    finally:
        _hook.reset(token)


@cache
def _hooked(kind: type) -> type:
    """A subclass that hands its calls to the hook in force."""

    def call(self: object, *args: Any, **kwargs: Any) -> Any:
        function, hook = partial(kind.__call__, self), _hook.get()
        return function(*args, **kwargs) if hook is None else hook(self, function, args, kwargs)

    return type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})


def train_flags(kind: type, inputs: int, *, train: bool) -> dict[str, bool]:
    """What a module's call takes behind so many inputs to know its mode, by the names that Flax and others use."""
    free = list(inspect.signature(kind.__call__).parameters)[1 + inputs :]
    return {name: value is train for name, value in _TRAIN_FLAGS.items() if name in free}


def _modules(module: nnx.Module) -> list[Any]:
    return [node for _, node in nnx.iter_graph(module) if isinstance(node, nnx.Module) and callable(node)]


def leaf_layers(weights: Weights) -> list[str]:
    """The names of layers inside which there is no other. PyTorch's recurrent ones return tuples: they are none."""
    names = {weight.layer_name: isinstance(weight.layer, CELLS + LINEN_CELLS) for weight in weights.values()}
    return [name for name, recurs in names.items() if not recurs and not any(_inside(other, name) for other in names)]


def _inside(name: str, parent: str) -> bool:
    return name != parent and (not parent or name.startswith(parent + "."))
