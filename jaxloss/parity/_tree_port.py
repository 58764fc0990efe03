"""Ports that are no NNX modules: Linen modules with their variables, and plain functions with their parameters."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen

from jaxloss.parity._layout import Layout, Shape, permuted, same
from jaxloss.parity._port import Port, Run, Tape, leaf_layers, train_flags
from jaxloss.parity._recurrent import LINEN_CELLS, are_together, linen_gates
from jaxloss.parity.weights import NAMES, Weight, linear_layout

_STATISTICS = ("batch_stats",)
_SHORT = {"w": "weight", "b": "bias"}


class _Leaf:
    """An array of a pytree, as a weight's variable."""

    def __init__(self, array: Any) -> None:
        self._array = array
        self.shape = np.shape(array)
        self.dtype = np.asarray(array).dtype

    def get_value(self) -> Any:
        """The array."""
        return self._array


class FunctionPort(Port):
    """A function of parameters and inputs. Nothing is known of its layers. Integers and strings of Python stay."""

    def __init__(self, function: Callable[..., Any], params: Any, dtype: jax.typing.DTypeLike) -> None:
        """Copies nothing: arrays are immutable."""
        self.dtype, self.flatten, self.layers = dtype, {}, []
        self._function = function
        self._params = params
        arrays = jax.tree.map(lambda leaf: None if isinstance(leaf, int | str) else leaf, params)
        flat, self._structure = jax.tree_util.tree_flatten_with_path(arrays)
        self._leaves = [(tuple(_plain(key) for key in path), _Leaf(leaf)) for path, leaf in flat]
        self._modules: dict[str, Any] = {}
        self.set_flatten({})

    def set_flatten(self, flatten: Mapping[str, Sequence[int]]) -> None:
        """Says which kernels read or write a flattened feature map."""
        self.flatten = dict(flatten)
        self.weights: dict[str, Weight] = {}
        self._places: list[tuple[str, int]] = []  # of each leaf: in which weight it is, and which part of it
        for path, leaf in self._leaves:
            *layer, attribute = path or ("weight",)
            name = ".".join(layer)
            module = self._modules.get(name)
            layout = _leaf_layout(module, attribute, leaf.shape, tuple(self.flatten.get(name, ())))
            weight = Weight(leaf, layout, module, name, ".".join((*layer, attribute)))
            full = ".".join((*layer, _SHORT.get(attribute) or NAMES.get(attribute, attribute)))
            if full in self.weights:
                raise ValueError(f"parity: two parameters of the port would be called {full} in PyTorch.")
            self.weights[full] = weight
            self._places.append((full, 0))

    @property
    def parameters(self) -> list[str]:
        """Names of every leaf but integers."""
        return [name for name, weight in self.weights.items() if jnp.issubdtype(weight.variable.dtype, jnp.inexact)]

    def _run(self, values: Mapping[str, Any], inputs: Sequence[Any], hook: Tape) -> Run:
        trained = set(self.parameters)
        statistics = {name: value for name, value in values.items() if name not in trained}
        return Run(self._function(self._tree(values), *inputs), statistics, hook)

    def _tree(self, values: Mapping[str, Any]) -> Any:
        parts = {name: self.weights[name].split(value) for name, value in values.items()}
        arrays = self._structure.unflatten(
            [parts[name][part] if isinstance(parts[name], list) else parts[name] for name, part in self._places]
        )
        return jax.tree.map(
            lambda x, given: given if x is None else x, arrays, self._params, is_leaf=lambda x: x is None
        )


class LinenPort(FunctionPort):
    """A Linen module with its variables."""

    def __init__(
        self,
        module: linen.Module,
        variables: Mapping[str, Any],
        dtype: jax.typing.DTypeLike,
        *,
        train: bool,
        told: Collection[np.dtype],
        inputs: Sequence[Any],
        theirs: Collection[str],
    ) -> None:
        """Runs it once, abstractly, to see its layers; `theirs` are PyTorch's names of weights."""
        self._module, self._told, self._theirs = module, told, theirs
        flags = train_flags(type(module), len(inputs), train=train)
        # A module refuses to be told by its call what its attribute says.
        self._flags: dict[str, Any] = {
            name: flag for name, flag in flags.items() if getattr(module, name, None) is None
        }
        super().__init__(module.apply, variables, dtype)
        self._collections = [path[0] for path, _ in self._leaves]
        self._leaves = [(path[1:], leaf) for path, leaf in self._leaves]
        self._modules = self._find_modules(inputs)
        self.set_flatten({})
        self.layers = leaf_layers(self.weights)

    def set_flatten(self, flatten: Mapping[str, Sequence[int]]) -> None:
        """The same, and joins what recurrent cells have apart."""
        super().set_flatten(flatten)
        apart, names = self.weights, dict[str, tuple[str, int]]()
        cells = self._modules.items() if are_together("", self._theirs, ()) else ()
        for layer, cell in cells:
            for full, joined, parts in linen_gates(layer, cell, apart, self._theirs):
                weight = Weight(joined, same(joined.shape), cell, full.rpartition(".")[0], f"{layer}.{full}")
                self.weights = {name: each for name, each in self.weights.items() if name not in parts} | {full: weight}
                names |= {name: (full, part) for part, name in enumerate(parts)}
        self._places = [names.get(name, (name, part)) for name, part in self._places]

    @property
    def parameters(self) -> list[str]:
        """Names of what is trained; all other weights are statistics."""
        collections = {name: collection for (name, _), collection in zip(self._places, self._collections, strict=True)}
        return [name for name in super().parameters if collections[name] == "params"]

    def _run(self, values: Mapping[str, Any], inputs: Sequence[Any], hook: Tape) -> Run:
        def intercept(function: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
            if context.method_name != "__call__" or (not context.module.path and self.layers != [""]):
                return function(*args, **kwargs)
            _set_dtype(context.module, self.dtype, self._told)
            return hook.call(".".join(context.module.path), context.module, function, args, kwargs)

        with linen.intercept_methods(intercept), self._own_carries():
            outputs, changed = self._apply(self._tree(values), inputs)
        flat = {tuple(_plain(k) for k in path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(changed)[0]}
        places = zip(self._places, self._collections, self._leaves, strict=True)
        trained = set(self.parameters)
        after = {
            name: flat.get((collection, *path), values[name])
            for (name, _), collection, (path, _) in places
            if name not in trained
        }
        return Run(outputs, after, hook)

    @contextmanager
    def _own_carries(self) -> Iterator[None]:
        """Has the states of cells, which are made before these are called, begin in the port's dtype."""

        def own(initialize: Callable[..., Any]) -> Callable[..., Any]:
            def initialize_carry(cell: linen.Module, *args: Any, **kwargs: Any) -> Any:
                _set_dtype(cell, self.dtype, self._told)
                return initialize(cell, *args, **kwargs)

            return initialize_carry

        with ExitStack() as stack:
            for kind in LINEN_CELLS:
                patched = mock.patch.object(kind, "initialize_carry", own(kind.initialize_carry))
                stack.enter_context(patched)
            yield

    def _apply(self, variables: Any, inputs: Sequence[Any]) -> Any:
        rngs = {"dropout": jax.random.key(0)}
        return self._module.apply(variables, *inputs, **self._flags, mutable=list(_STATISTICS), rngs=rngs)

    def _find_modules(self, inputs: Sequence[Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}

        def intercept(function: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
            found.setdefault(".".join(context.module.path), context.module)
            return function(*args, **kwargs)

        with linen.intercept_methods(intercept):
            jax.eval_shape(self._apply, self._params, list(inputs))
        return found


def _plain(key: Any) -> str:
    return str(next(getattr(key, name) for name in ("key", "name", "idx") if hasattr(key, name)))


def _set_dtype(module: linen.Module, dtype: jax.typing.DTypeLike, told: Collection[np.dtype]) -> None:
    """Has a layer that was told to compute in one of these dtypes compute in the port's."""
    for name in ("dtype", "param_dtype"):  # a recurrent cell's carry begins in param_dtype
        now = getattr(module, name, None)
        if now is not None and jnp.dtype(now) in told:
            object.__setattr__(module, name, dtype)


def _leaf_layout(module: Any, attribute: str, shape: Shape, feature_map: Shape) -> Layout:
    """By the layer if it is known, else by the names and shapes that JAX programs use."""
    if attribute in ("bias", "b") and (feature_map or isinstance(module, linen.DenseGeneral)):
        return _bias_layout(shape, feature_map)
    if attribute not in ("kernel", "w"):
        return same(shape)
    if isinstance(module, linen.DenseGeneral):
        count = len(module.axis) if isinstance(module.axis, Sequence) else 1
        return _dense(shape[:count], shape[count:], shape, feature_map)
    if len(shape) == 2:
        return _dense(shape[:1], shape[1:], shape, feature_map)
    if len(shape) < 2:
        return same(shape)
    *spatial, inputs, outputs = range(len(shape))
    if isinstance(module, linen.ConvTranspose) and not module.transpose_kernel:
        return permuted(shape, (inputs, outputs, *spatial), flip=tuple(spatial))
    return permuted(shape, (outputs, inputs, *spatial))


def _dense(inputs: Shape, outputs: Shape, shape: Shape, feature_map: Shape) -> Layout:
    return linear_layout(SimpleNamespace(in_features=inputs, out_features=outputs), "kernel", shape, feature_map)


def _bias_layout(shape: Shape, feature_map: Shape) -> Layout:
    writes = math.prod(shape) == math.prod(feature_map)
    layer = SimpleNamespace(in_features=(0,), out_features=shape)
    return linear_layout(layer, "bias", shape, feature_map if writes else ())
