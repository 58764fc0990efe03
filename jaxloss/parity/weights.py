"""Weights between PyTorch's state_dict and Flax NNX modules, bit for bit both ways."""

import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxloss.parity._compare import is_constant
from jaxloss.parity._fused import OUT, PARTS, fused, fused_paths
from jaxloss.parity._joined import Joined
from jaxloss.parity._layout import Layout, Shape, permuted, same
from jaxloss.parity._pairs import guesses, kept_otherwise, pair_weights
from jaxloss.parity._recurrent import (
    CELLS,
    added,
    are_together,
    cells,
    fused_gates,
    has_one_bias,
    numbers_of,
    second_biases,
    second_of,
    torch_name,
)
from jaxloss.parity._state_dict import read_state_dict, transpose

Module = TypeVar("Module", bound=nnx.Module)
FeatureMaps = Mapping[str, Sequence[int]]
Names = Mapping[str, str]  # PyTorch's by ours
StateDict = Mapping[str, Any] | str | os.PathLike[str]


def load_torch(
    module: Module,
    state_dict: StateDict,
    *,
    flatten: FeatureMaps | None = None,
    names: Names | None = None,
    ignore: Collection[str] = (),
    transposed: Collection[str] = (),
) -> Module:
    """Copies a PyTorch state_dict into a Flax NNX module.

    Layers are paired by name: `self.layer1 = nnx.Sequential(nnx.Conv(...), ...)` receives `layer1.0.weight`. Those
    without a namesake are paired by shape, in the order in which both frameworks define them, and these pairs are
    printed: read them, and give `names` where they are wrong. (A module that was copied, or made by `nnx.eval_shape`,
    has its attributes sorted by name; where that leaves a doubt, nothing is loaded.)

    The layers of Flax get PyTorch's layouts (Linear, LinearGeneral, Conv and ConvTranspose of any dimension, Embed,
    PReLU, the norms with their running statistics); any other variable keeps its own. A MultiHeadAttention gets query,
    key and value out of PyTorch's `in_proj_weight` and `in_proj_bias`, if there are such; LSTMCell, OptimizedLSTMCell,
    SimpleCell and GRUCell, in an RNN or a Bidirectional or alone, what PyTorch's recurrent layers and cells keep
    together. Their one bias is the sum of PyTorch's two, unless the cell was given a second one. Random state is left
    alone, and so is BatchNorm's `num_batches_tracked`, which Flax does not have.

    Args:
        module: changed in place, or not at all if anything is wrong. May be abstract (`nnx.eval_shape`); random state,
            like that of an `nnx.RNN`, then stays so.
        state_dict: arrays (NumPy, JAX or PyTorch) by PyTorch's names; or the path of a `.safetensors` file; or that
            of a `.pt` or `.pth` file that holds nothing else, as `torch.save(model.state_dict(), path)` writes it.
        flatten: where PyTorch flattens a feature map, as (channels, height, width), Flax has (height, width,
            channels), and the weights have to be permuted. So name every linear layer that reads a flattened feature
            map, or whose output is reshaped to one, with the shape in PyTorch: `{"fc": (64, 7, 7)}`. The layer's
            sizes tell which side is meant; the input if both fit. Leave out a layer that gets PyTorch's order because
            the Flax model transposes first, and a LinearGeneral over three or more axes: those are a feature map
            anyway. `{}` says that there is no such layer. The default, None, does so only for modules that show no sign
            of one: next to convolutions, a linear layer whose size is a multiple of their channels is refused, unless
            it is as wide as the convolution before it (or after it, for what it writes), as behind global pooling.
        names: PyTorch's names by the module's, for the weights that would be paired otherwise; `weight_map` returns
            them all.
        ignore: names in the state_dict that the module does not need, like a causal mask; or patterns, `"*.mask"`.
        transposed: names in the state_dict, or patterns, of matrices that PyTorch keeps as (inputs, outputs): those of
            Hugging Face's `Conv1D`, `["*.c_attn.weight", "*.c_proj.weight", "*.c_fc.weight"]` of GPT-2.

    Returns:
        The same module. The weights are copies, with the state_dict's dtypes whatever the module's were. (An
        `nnx.Embed` still casts to the dtype it was built with.)

    Raises:
        ValueError: weights are missing, unexpected or misshapen (all are listed); a dtype needs `jax_enable_x64`; tied
            weights differ; a GRUCell has no place for PyTorch's second bias; two variables of the module have one name
            in PyTorch; `flatten` is needed or impossible; the file is of another kind, broken, or a pickle that could
            run code; layers of equal shapes have other names and an order that is not known.
        TypeError: there are things other than arrays among the values (all are listed).

    Examples:
        >>> import numpy as np
        >>> from flax import nnx
        >>> from jaxloss.parity import load_torch
        >>> layer = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
        >>> load_torch(layer, {"weight": np.array([[1, 2]], "float32"), "bias": np.zeros(1, "float32")}).kernel[...]
        Array([[1.],
               [2.]], dtype=float32)

    References:
        https://docs.pytorch.org/docs/stable/generated/torch.nn.Module.html#torch.nn.Module.load_state_dict
    """
    if not isinstance(module, nnx.Module):
        raise TypeError(
            f"load_torch: the module is a {type(module).__name__}, expected an nnx.Module. (A Linen module's weights "
            "are variables of its own: check copies PyTorch's for the comparison.)"
        )
    arrays = transpose(read_state_dict(state_dict, ignore), transposed)
    weights = weights_of(module, flatten, arrays, names or {})
    arrays = added(arrays, second_biases(weights, arrays, names or {}))
    pairs = _pairs(weights, arrays, names)
    _check_fit(type(module).__name__, weights, arrays, pairs)
    guessed = {ours: theirs for ours, theirs in pairs.items() if ours != theirs and ours not in (names or {})}
    if unsure := guesses(guessed, {name: weight.layout.merged for name, weight in weights.items()}):
        raise ValueError(
            f"{', '.join(unsure)} have the same shapes and other names than in PyTorch, and the order in which "
            f"{type(module).__name__} defines them is not known: check weight_map(...), and pass it as names=."
        )
    if guessed:
        print(f"{type(module).__name__}: paired by shape and order (to change it: load_torch(..., names=...)):")
        print("\n".join(f"  {ours} {arrays[theirs].shape} <- {theirs}" for ours, theirs in guessed.items()))
    for name, weight in ((name, weights[name]) for name in pairs):
        # Our own copy, because jnp.asarray may alias a NumPy array, and that one PyTorch's memory.
        weight.variable.set_value(jnp.asarray(np.array(weight.layout.to_flax(arrays[pairs[name]]), order="C")))
    return module


def weight_map(
    module: nnx.Module,
    state_dict: StateDict,
    *,
    flatten: FeatureMaps | None = None,
    names: Names | None = None,
    ignore: Collection[str] = (),
    transposed: Collection[str] = (),
) -> dict[str, str]:
    """Returns what `load_torch` would copy where: PyTorch's names by the module's, as far as they can be paired.

    Args:
        module: see `load_torch`, also for the other arguments.
        state_dict: only names and shapes are used.
        flatten: does not change the pairs.
        names: kept as they are.
        ignore: left out.
        transposed: see `load_torch`.

    Returns:
        A dict that can be changed and given to `load_torch` and `to_torch` as `names`.

    Raises:
        ValueError: `names` has a name that the module or the state_dict does not have; `flatten` is needed.

    Examples:
        >>> import numpy as np
        >>> from flax import nnx
        >>> from jaxloss.parity import weight_map
        >>> module = nnx.Sequential(nnx.Linear(2, 1, use_bias=False, rngs=nnx.Rngs(0)))
        >>> weight_map(module, {"head.weight": np.zeros((1, 2))})
        {'0.weight': 'head.weight'}
    """
    arrays = transpose(read_state_dict(state_dict, ignore), transposed)
    weights = weights_of(module, flatten, arrays, names or {})
    arrays = added(arrays, second_biases(weights, arrays, names or {}))
    return _pairs(weights, arrays, names)


def to_torch(
    module: nnx.Module,
    *,
    flatten: FeatureMaps | None = None,
    names: Names | None = None,
    transposed: Collection[str] = (),
) -> dict[str, np.ndarray]:
    """Returns the weights of a Flax NNX module as a PyTorch state_dict, in NumPy: the inverse of `load_torch`.

    Args:
        module: see `load_torch` for what its layers become.
        flatten: see `load_torch`.
        names: PyTorch's names by the module's, where the two differ; see `weight_map`. An nnx.MultiHeadAttention
            becomes PyTorch's, with query, key and value in one tensor, unless `names` has them apart.
        transposed: see `load_torch`.

    Returns:
        Copies in PyTorch's layouts and the module's dtypes, by PyTorch's names. (Of a recurrent cell with one bias,
        PyTorch's second one is 0.) `safetensors.numpy.save_file` writes them all; `torch.from_numpy` does not know
        NumPy's bfloat16.

    Raises:
        ValueError: `flatten` is needed or impossible; `names` or `transposed` has an unknown name, or `names` gives one
            to two weights.

    Examples:
        >>> from flax import nnx
        >>> from jaxloss.parity import to_torch
        >>> weights = to_torch(nnx.Conv(3, 8, (5, 5), rngs=nnx.Rngs(0)))
        >>> {name: array.shape for name, array in weights.items()}
        {'weight': (8, 3, 5, 5), 'bias': (8,)}
    """
    names = names or {}
    weights = weights_of(module, flatten, None, names)
    if unknown := [name for name in names if name not in weights]:
        raise ValueError(f"names: there is no {', no '.join(unknown)} in the module.")
    entries, sources = {}, {}
    for name, weight in weights.items():
        theirs = names.get(name, name)
        if sources.setdefault(theirs, weight.key) != weight.key:
            raise ValueError(f"names: {theirs} would be two weights, one of them {name}.")
        entries[theirs] = weight.layout.to_torch(np.asarray(weight.variable.get_value()))
        if has_one_bias(weight.layer) and (second := second_of(theirs)) != theirs:
            entries[second] = np.zeros_like(entries[theirs])
    # Contiguous, because safetensors writes the wrong elements of an array that is not.
    return {name: np.array(array, order="C") for name, array in transpose(entries, transposed).items()}


Linear = nnx.Linear | nnx.LinearGeneral
_CONVOLUTIONS = (nnx.Conv, nnx.ConvTranspose)
_NORMS = (nnx.BatchNorm, nnx.GroupNorm, nnx.InstanceNorm, nnx.LayerNorm, nnx.RMSNorm)
_LAYERS = (nnx.Linear, nnx.LinearGeneral, nnx.Embed, nnx.PReLU, *_CONVOLUTIONS, *_NORMS)
NAMES = {  # PyTorch's, where the two differ
    "embedding": "weight",
    "kernel": "weight",
    "mean": "running_mean",
    "negative_slope": "weight",
    "scale": "weight",
    "var": "running_var",
}
_NOT_WEIGHTS = (nnx.Cache, nnx.Intermediate, nnx.RngState)


class Weight(NamedTuple):
    """One variable that PyTorch would save."""

    variable: Any  # has a shape and get_value(); in a module it is an nnx.Variable
    layout: Layout
    layer: object
    layer_name: str  # as PyTorch would have it
    flax_name: str

    @property
    def parts(self) -> Sequence[Any]:
        """The variables that it is made of."""
        return self.variable.variables if isinstance(self.variable, Joined) else (self.variable,)

    def turned(self) -> "Weight":
        """The same matrix, of which PyTorch has the transpose of what the layout says."""
        shape = self.variable.shape
        return self._replace(layout=permuted(shape, (1, 0)) if self.layout == same(shape) else same(shape))

    @property
    def key(self) -> tuple[int, ...]:
        """The same for a weight that comes under another name too."""
        return tuple(map(id, self.parts))

    def split(self, array: Any) -> Any:
        """An array in the weight's layout, as Flax has it: in several where it is made of several variables."""
        return self.variable.split(array) if isinstance(self.variable, Joined) else array

    def join(self, parts: Any) -> Any:
        """The inverse."""
        return self.variable.join(parts) if isinstance(self.variable, Joined) else parts

    @property
    def is_trained(self) -> bool:
        """Whether Flax's optimizers see it."""
        return all(isinstance(part, nnx.Param) for part in self.parts)


Weights = dict[str, Weight]


def weights_of(
    module: nnx.Module, flatten: FeatureMaps | None, theirs: Collection[str] | None, names: Collection[str] = ()
) -> Weights:
    """Every variable that PyTorch would save, by PyTorch's name.

    PyTorch's own names in their order, if they are known, and those that are given for the module tell the attentions
    whose query, key and value are one there.
    """
    attentions: dict[str, int] = {}  # by path; a shared one has several

    def collect(path: str, node: nnx.Module) -> None:
        if isinstance(node, nnx.MultiHeadAttention):
            attentions[path] = id(node)

    def is_fused(path: str, node: nnx.Module) -> bool:
        if isinstance(node, nnx.MultiHeadAttention):
            return id(node) in together
        return are_together(path, theirs, names)

    apart = [(".".join(path), attribute) for path, _, attribute, _ in _walk(module, collect)]
    together = {attentions[path] for path in fused_paths(attentions, apart, theirs, names)}
    found = list(_walk(module, is_fused))
    numbers = numbers_of([path for path, layer, _, _ in found if isinstance(layer, CELLS)])
    layers = {".".join(path): layer for path, layer, _, _ in found}
    known = dict.fromkeys(name.rpartition(".")[0] for name in theirs or ())
    if layers.keys() <= known.keys():
        layers = {name: layers[name] for name in known if name in layers}
    _check_flatten(layers, flatten)
    weights: Weights = {}
    for path, layer, attribute, variable in found:
        name = NAMES.get(attribute, attribute) if isinstance(layer, _LAYERS) else attribute
        full, flax_name = ".".join((*path, name)), ".".join((*path, attribute))
        if isinstance(layer, CELLS) and isinstance(variable, Joined):
            full = torch_name(path, attribute, names if theirs is None else theirs, numbers.get(path, 0))
        layer_name = full.rpartition(".")[0]
        feature_map = tuple((flatten or {}).get(layer_name, ()))
        layout = _layout(layer, attribute, variable.shape, feature_map)
        own = isinstance(layer, Linear) and attribute in ("kernel", "bias")
        if own and math.prod(variable.shape) != math.prod(layout.merged):
            raise ValueError(
                f"{type(module).__name__}: {flax_name} has shape {variable.shape}, its layer says {layout.merged}. If "
                "nnx.vmap has stacked layers, keep them in a list: PyTorch's are paired one by one."
            )
        if full in weights:
            raise ValueError(
                f"{type(module).__name__}: {weights[full].flax_name} and {flax_name} would both be {full} in PyTorch: "
                "rename one."
            )
        weights[full] = Weight(variable, layout, layer, layer_name, flax_name)
    _check_shared(type(module).__name__, weights)
    return weights


def _check_shared(module: str, weights: Weights) -> None:
    """Raises where two attentions share some of query, key and value: PyTorch's share all or nothing."""
    owners: dict[int, str] = {}
    for name, weight in weights.items():
        for part in weight.key:
            owner = owners.setdefault(part, name)
            if weights[owner].key != weight.key:
                raise ValueError(f"{module}: {owner} and {name} share a part, which they cannot in PyTorch.")


def _walk(
    node: Any,
    is_fused: Callable[[str, nnx.Module], Any],
    path: tuple[str, ...] = (),
    above: tuple[int, ...] = (),
    joined: frozenset[int] = frozenset(),
) -> Iterator[tuple[tuple[str, ...], Any, str, nnx.Variable | Joined]]:
    """Path, layer, attribute and variable of every weight; a shared one comes under each of its names.

    `above` are the nodes around, by identity, and `joined` the cells and variables that have come with one of them.
    """
    if id(node) in above:  # a reference to itself, or to its parent
        return
    match node:
        case nnx.MultiHeadAttention() if is_fused(".".join(path), node):
            yield from ((path, node, name, weight) for name, weight in fused(node, linear_layout))
            children = [(OUT if name == "out" else name, child) for name, child in vars(node).items()]
            children = [(name, child) for name, child in children if name not in PARTS]
        case nnx.Module() if (
            (found := cells(node)) and is_fused(".".join(path), node) and id(found[0][0]) not in joined
        ):
            for cell, end in found:
                for name, weight in fused_gates(cell, linear_layout):
                    yield path, cell, name + end, weight
                    joined |= {id(cell), *map(id, weight.variables)}
            children = vars(node).items()
        case nnx.Pytree():
            children = vars(node).items()
        case dict():
            children = node.items()
        case list() | tuple():
            children = enumerate(node)
        case _:
            return
    for attribute, child in children:
        if isinstance(child, nnx.Variable):
            if not isinstance(child, _NOT_WEIGHTS) and id(child) not in joined:
                yield path, node, str(attribute), child
        else:
            # PyTorch numbers the entries of a Sequential directly: "layer1.0", where Flax has "layer1.layers.0".
            name = () if isinstance(node, nnx.Sequential) else (str(attribute),)
            yield from _walk(child, is_fused, (*path, *name), (*above, id(node)), joined)


def _layout(layer: object, attribute: str, shape: Shape, feature_map: Shape) -> Layout:
    match layer:
        case nnx.Linear() | nnx.LinearGeneral():
            return linear_layout(layer, attribute, shape, feature_map)
        case nnx.Conv() | nnx.ConvTranspose() if attribute == "kernel":
            *spatial, inputs, outputs = range(len(shape))
            if isinstance(layer, nnx.Conv) or layer.transpose_kernel:
                return permuted(shape, (outputs, inputs, *spatial))
            return permuted(shape, (inputs, outputs, *spatial), flip=tuple(spatial))  # Flax does not flip it
        case nnx.PReLU():
            return Layout(shape, split=(), order=(), merged=(1,))
    return same(shape)


def linear_layout(layer: Any, attribute: str, shape: Shape, feature_map: Shape) -> Layout:
    """PyTorch has (outputs, inputs), both flattened."""
    reads = math.prod(feature_map) == math.prod(_sizes(layer.in_features))
    inputs, input_order = _axes(layer.in_features, feature_map if reads else ())
    outputs, output_order = _axes(layer.out_features, () if reads else feature_map)
    if attribute == "bias":
        return Layout(shape, outputs, output_order, (math.prod(outputs),))
    order = (*(len(inputs) + axis for axis in output_order), *input_order)
    return Layout(shape, inputs + outputs, order, (math.prod(outputs), math.prod(inputs)))


def _axes(features: int | Sequence[int], feature_map: Shape) -> tuple[Shape, Shape]:
    """The sizes that one side of a linear layer is made of in Flax's order, and PyTorch's order of them."""
    sizes = (*feature_map[1:], *feature_map[:1]) or _sizes(features)
    *others, last = range(len(sizes))
    return sizes, (last, *others) if feature_map or len(sizes) > 2 else (*others, last)


def _sizes(features: int | Sequence[int]) -> Shape:
    return (features,) if isinstance(features, int) else tuple(features)


def _check_flatten(layers: Mapping[str, object], flatten: FeatureMaps | None) -> None:
    """Raises where `flatten` cannot be meant, and where it is not given but may be due."""
    linears = {name: layer for name, layer in layers.items() if isinstance(layer, Linear)}
    if flatten is None:
        _check_undeclared(layers)
    channels = {
        size
        for layer in layers.values()
        if isinstance(layer, _CONVOLUTIONS)
        for size in (layer.in_features, layer.out_features)
    }
    for name, feature_map in (flatten or {}).items():
        if name not in linears:
            raise ValueError(f"flatten: there is no linear layer {name!r}, only {', '.join(linears) or 'none'}.")
        _check_feature_map(name, linears[name], tuple(feature_map), channels)


def _check_undeclared(layers: Mapping[str, object]) -> None:
    """Raises if a linear layer might read or write a flattened feature map.

    Sizes cannot prove that none does. A layer as wide as the convolution before it is taken to follow global pooling,
    and a model with a LinearGeneral over three or more axes to use one wherever it needs one.
    """
    linears = [layer for layer in layers.values() if isinstance(layer, Linear)]
    if any(len(_sizes(side)) > 2 for layer in linears for side in (layer.in_features, layer.out_features)):
        return
    forwards = list(layers.items())
    found = {
        *_suspects(forwards, "in_features", "out_features"),
        *_suspects(forwards[::-1], "out_features", "in_features"),
    }
    if suspects := [name for name in layers if name in found]:
        raise ValueError(
            f"{', '.join(suspects)} may read or write a flattened feature map. PyTorch flattens (channels, height, "
            "width) and Flax (height, width, channels): pass flatten={'LAYER': (channels, height, width), ...} with "
            "the layers that do, or flatten={} if none does."
        )


def _suspects(layers: Sequence[tuple[str, object]], side: str, other: str) -> Iterator[str]:
    """Linear layers with a side as large as feature maps of any convolution, and not as wide as the last one."""
    channels = {getattr(layer, other) for _, layer in layers if isinstance(layer, _CONVOLUTIONS)} - {1}
    last = None
    for name, layer in layers:
        if isinstance(layer, _CONVOLUTIONS):
            last = getattr(layer, other)
        elif isinstance(layer, Linear):
            size = math.prod(_sizes(getattr(layer, side)))
            if size != last and any(size % channel == 0 and size != channel for channel in channels):
                yield name


def _check_feature_map(name: str, layer: Linear, feature_map: Shape, channels: set[int]) -> None:
    """Raises if neither side of a linear layer can be this feature map, or if it seems to be in Flax's order."""
    flax_map = (*feature_map[1:], *feature_map[:1])
    sides = _sizes(layer.in_features), _sizes(layer.out_features)
    if not any(sizes in ((math.prod(feature_map),), flax_map) for sizes in sides):
        raise ValueError(
            f"flatten: {name} has inputs {sides[0]} and outputs {sides[1]}; neither can be (channels, *spatial) = "
            f"{feature_map}, which is {flax_map} in Flax."
        )
    if feature_map[0] not in channels and feature_map[-1] in channels:
        raise ValueError(f"flatten: {name}: {feature_map} seems to have the channels last; PyTorch has them first.")


def check_names(names: Names | None, ours: Collection[str], theirs: Collection[str]) -> None:
    """Raises unless every name is one of ours and gives one of theirs."""
    names = names or {}
    unknown = [f"{name} in the module" for name in names if name not in ours]
    unknown += [f"{name} in PyTorch" for name in names.values() if name not in theirs]
    if unknown:
        raise ValueError(f"names: there is no {', no '.join(unknown)}.")


def _pairs(weights: Weights, arrays: Mapping[str, np.ndarray], names: Names | None) -> dict[str, str]:
    check_names(names, weights, arrays)
    ours = {name: weight.layout.merged for name, weight in weights.items()}
    return pair_weights(ours, {name: array.shape for name, array in arrays.items()}, given=names)


def _is_tied(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and not is_constant(a) and np.array_equal(a, b)


def _check_fit(module: str, weights: Weights, arrays: Mapping[str, np.ndarray], pairs: Names) -> None:
    """Raises one error that lists everything wrong."""
    shapes, turned, dtypes, tied = [], [], [], []
    first_names: dict[tuple[int, ...], str] = {}
    for name, theirs in sorted(pairs.items()):
        layout, array = weights[name].layout, arrays[theirs]
        first = first_names.setdefault(weights[name].key, theirs)
        if array.shape != layout.merged:
            shapes.append(f"{theirs} is {array.shape}, expected {layout.merged}")
            turned += [theirs] if array.ndim == 2 and array.shape == layout.merged[::-1] else []
        elif jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
            dtypes.append(f"{theirs} is {array.dtype}")
        elif theirs != first and array.tobytes() != arrays[first].tobytes():
            tied.append(f"{first} and {theirs}")
    faults = {
        "missing": sorted(name for name, weight in weights.items() if weight.key not in first_names),
        "unexpected": sorted(arrays.keys() - set(pairs.values())),
        "of another shape": shapes,
        "in need of jax_enable_x64": dtypes,
        "one variable in the module but different in the state_dict": tied,
    }
    lines = [f"{fault}: {', '.join(names)}" for fault, names in faults.items() if names]
    if turned:
        lines.append(
            f"If PyTorch keeps {', '.join(turned)} as (inputs, outputs), as Hugging Face's Conv1D does, pass these and "
            "the square ones of the kind as transposed=[...]."
        )
    lines += dict.fromkeys(filter(None, map(kept_otherwise, faults["unexpected"])))
    for name in faults["unexpected"]:
        if twin := next((theirs for theirs in pairs.values() if _is_tied(arrays[name], arrays[theirs])), None):
            lines.append(f"{name} equals {twin}: if PyTorch ties them, pass ignore=[{name!r}]")
    if lines:
        raise ValueError("\n  ".join([f"The state_dict does not fit {module}.", *lines]))
