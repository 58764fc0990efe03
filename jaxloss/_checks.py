"""Every argument check and every error message.

Each check returns what the losses compute with: JAX arrays, a non-negative axis, None for an option that is off.
A message says what was called, what was expected, what came and, where it helps, how to fix it.
"""

import math
import operator
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array

Shaped = Array | jax.ShapeDtypeStruct
Size = Any  # of an array's axis: int, or symbolic as in `jax.export`
MeshAxes = str | tuple[str, ...]
_REDUCTIONS = ("none", "mean", "sum")


def _array(name: str, argument: str, value: Any) -> Array:
    value = _held(value)
    if isinstance(value, jax.Array):
        return value
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"{name}: {argument} must be an array of numbers, got {_kind(value)}.") from error
    except RuntimeError as error:  # a torch tensor that requires grad
        raise TypeError(f"{name}: {argument} must be an array, got {_kind(value)}: {error}") from error


def _held(value: Any) -> Any:
    """The array in a Flax variable and the like; other values as they are."""
    array_of = getattr(value, "__jax_array__", None)
    return array_of() if array_of else value


def _kind(value: Any) -> str:
    dtype = getattr(value, "dtype", None)
    return type(value).__name__ + ("" if dtype is None else f" of {dtype}")


def floating_array(name: str, argument: str, value: Any) -> Array:
    """An array of a real floating dtype."""
    array = _array(name, argument, value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        dtype = getattr(value, "dtype", array.dtype)
        raise TypeError(f"{name}: {argument} must be floating, got {dtype}. Cast with .astype(jnp.float32).")
    return array


def floating_dtype(name: str, dtype: DTypeLike) -> jnp.dtype:
    """A real floating dtype, as this JAX configuration has it."""
    try:
        canonical = jax.dtypes.canonicalize_dtype(dtype)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: dtype must be a floating dtype, got {dtype!r}.") from error
    if not jnp.issubdtype(canonical, jnp.floating):
        raise TypeError(f"{name}: dtype must be floating, got {canonical}.")
    return canonical


def logits_array(name: str, logits: Any, dtype: DTypeLike | None) -> Array:
    """Logits cast to `dtype`, which integers need."""
    if dtype is None:
        return floating_array(name, "logits", logits)
    array = _array(name, "logits", logits)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise TypeError(f"{name}: logits must be real, got {array.dtype}.")
    return array.astype(floating_dtype(name, dtype))


def result_dtype(name: str, dtype: DTypeLike | None, *arrays: Array) -> jnp.dtype:
    """`dtype`, or the floating arrays' dtypes promoted together."""
    if dtype is not None:
        return floating_dtype(name, dtype)
    dtypes = {array.dtype for array in arrays if jnp.issubdtype(array.dtype, jnp.floating)}
    return promote(*dtypes) if len(dtypes) > 1 else dtypes.pop()


def promote(*dtypes: DTypeLike) -> jnp.dtype:
    """JAX's standard promotion, whatever the caller's promotion mode: these casts are explicit."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*dtypes)


def axis(name: str, axis: Any, ndim: int) -> int:
    """The axis counted from the front."""
    axis = integer(name, "axis", axis)
    bound = max(ndim, 1)
    if not -bound <= axis < bound:
        raise IndexError(f"{name}: axis out of range (expected to be in [{-bound}, {bound - 1}], got {axis}).")
    return axis % bound


def reduction(name: str, reduction: Any, allowed: tuple[str, ...] = _REDUCTIONS) -> Any:
    """One of the names of `allowed`."""
    if not isinstance(reduction, str) or reduction not in allowed:
        raise ValueError(f"{name}: reduction must be one of {', '.join(map(repr, allowed))}, got {reduction!r}.")
    return reduction


def fraction(name: str, argument: str, value: Any, upper: float, least: str = "at least 0") -> Any:
    """A scalar in [0, upper]; None for a concrete 0, which switches the option off. A tracer's value is not known."""
    value = _held(value)
    if isinstance(value, jax.core.Tracer):
        real = jnp.issubdtype(value.dtype, np.number) and not jnp.issubdtype(value.dtype, np.complexfloating)
        if value.shape or not real:
            raise TypeError(f"{name}: {argument} must be a real scalar, got {value.dtype}{list(value.shape)}.")
        floating = jnp.issubdtype(value.dtype, np.floating)
        return value if floating else value.astype(jnp.result_type(float))
    dtype = getattr(value, "dtype", None)
    kinds = jnp.floating, jnp.integer
    unreal = isinstance(dtype, np.dtype) and not any(jnp.issubdtype(dtype, kind) for kind in kinds)
    if unreal or isinstance(value, str | bool):
        raise TypeError(f"{name}: {argument} must be a number, got {value!r}.")
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"{name}: {argument} must be a number, got {value!r}.") from error
    if not (0 <= number <= upper and math.isfinite(number)):
        bounds = f"between 0 and {upper:g}" if math.isfinite(upper) else f"finite and {least}"
        raise ValueError(f"{name}: {argument} must be {bounds}, got {number:g}.")
    return number or None


def mesh_axes(name: str, class_axis_name: Any) -> MeshAxes | None:
    """The names of mesh axes that are there, or None."""
    if class_axis_name is None:
        return None
    names = (class_axis_name,) if isinstance(class_axis_name, str) else class_axis_name
    if not isinstance(names, tuple) or not all(isinstance(each, str) for each in names):
        raise TypeError(f"{name}: class_axis_name must be a mesh axis or a tuple of them, got {class_axis_name!r}.")
    try:
        lax.axis_size(names)
    except NameError as error:
        message = f"{name}: class_axis_name: no mesh axis {class_axis_name!r} here. It is for use in jax.shard_map."
        raise ValueError(message) from error
    return class_axis_name


def weight(name: str, weight: Any, classes: Size) -> Array | None:
    """Class weights of shape (classes,)."""
    if weight is None:
        return None
    array = _array(name, "weight", weight)
    if jnp.issubdtype(array.dtype, jnp.complexfloating) or array.dtype == bool:
        raise TypeError(f"{name}: weight must be real numbers, got {array.dtype}.")
    if array.shape != (classes,):
        raise ValueError(f"{name}: weight must have shape ({classes},), one for each class, got {array.shape}.")
    return array


def targets(
    name: str, targets: Any, logits: Shaped, axis: int, ignore_index: int, class_axis_name: MeshAxes | None
) -> Array:
    """Class probabilities if the shape is that of the logits, else class indices."""
    if _shape(_held(targets)) == logits.shape and logits.ndim:
        return _probability_targets(name, targets, ignore_index)
    return index_targets(name, targets, logits, "logits", axis, ignore_index, bounded=class_axis_name is None)


def _shape(value: Any) -> tuple | None:
    try:
        return np.shape(value)
    except jax.errors.TracerArrayConversionError:  # a list with traced values
        return jnp.shape(jnp.asarray(value))
    except ValueError:  # a ragged sequence
        return None


def _probability_targets(name: str, targets: Any, ignore_index: int) -> Array:
    array = _array(name, "targets", targets)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        dtype = getattr(targets, "dtype", array.dtype)
        raise TypeError(
            f"{name}: targets in the shape of logits are class probabilities and must be floating, got {dtype}. "
            "Class indices have the shape of logits without the class axis."
        )
    if integer(name, "ignore_index", ignore_index) >= 0:
        raise ValueError(f"{name}: ignore_index applies to class indices, got {ignore_index} with probability targets.")
    return array


def integer(name: str, argument: str, value: Any) -> int:
    """A Python integer."""
    if isinstance(value, bool):
        raise TypeError(f"{name}: {argument} must be an integer, got {value}.")
    try:
        return operator.index(value)
    except TypeError as error:
        raise TypeError(f"{name}: {argument} must be an integer, got {type(value).__name__}.") from error


def index_targets(
    name: str, targets: Any, values: Shaped, argument: str, axis: int, ignore_index: int, bounded: bool = True
) -> Array:
    """Class indices as int32, in the shape of `values` without `axis`; in range if they are concrete and `bounded`."""
    limit = np.iinfo(np.int32)
    if not limit.min < integer(name, "ignore_index", ignore_index) < limit.max:
        raise ValueError(f"{name}: ignore_index must fit in int32, got {ignore_index}.")
    targets = _held(targets)
    if isinstance(targets, np.ma.MaskedArray):
        raise TypeError(f"{name}: targets must not be a masked array. Pass targets.filled({ignore_index}).")
    if not isinstance(targets, jax.Array | np.ndarray):
        try:
            targets = np.asarray(targets)
        except jax.errors.TracerArrayConversionError:  # a list of traced scalars
            targets = jnp.asarray(targets)
        except ValueError as error:
            raise TypeError(f"{name}: targets must be an array of integers, got a ragged sequence.") from error
    _index_dtype(name, targets.dtype, values, argument)
    rows = _index_shape(name, targets.shape, values, argument, axis)
    if bounded:
        _in_range(targets, values.shape[axis], ignore_index)
    if targets.dtype != np.int32 or not isinstance(targets, jax.Array):
        if jnp.iinfo(targets.dtype).max > limit.max:  # a cast alone would wrap
            targets = targets.clip(max(limit.min, jnp.iinfo(targets.dtype).min), limit.max)
        targets = jnp.asarray(targets, np.int32)
    return targets if targets.shape == rows else targets.reshape(rows)


def _index_dtype(name: str, dtype: np.dtype, values: Shaped, argument: str) -> None:
    if not jnp.issubdtype(dtype, jnp.integer) or dtype.kind == "m":  # NumPy's time differences are integers to it
        probabilities = (
            f"class probabilities must have the shape of logits, {values.shape}"
            if argument == "logits"
            else "for class probabilities use cross_entropy or kl_div"
        )
        raise TypeError(
            f"{name}: targets must be integers (class indices), got {dtype}. "
            f"Cast class indices with .astype(jnp.int32); {probabilities}."
        )


def _index_shape(name: str, shape: tuple, values: Shaped, argument: str, axis: int) -> tuple:
    if not values.shape:
        raise ValueError(f"{name}: {argument} must have a class axis, got a scalar.")
    rows = values.shape[:axis] + values.shape[axis + 1 :]
    if shape != rows and not (rows == () and shape == (1,)):
        last = axis == values.ndim - 1
        layout = "PyTorch's (N, C, ...) layout pass axis=1" if last else "channels-last (N, ..., C) pass axis=-1"
        has_axis = rows and not isinstance(values, jax.ShapeDtypeStruct)  # logits never made have no axis to pass
        raise ValueError(
            f"{name}: targets must have shape {rows} ({argument}.shape without axis {-1 if last else axis}), "
            f"got {shape}.{f' For {layout}.' if has_axis else ''}"
        )
    return rows


def _in_range(targets: jax.Array | np.ndarray, classes: Size, ignore_index: int) -> None:
    if isinstance(targets, jax.core.Tracer) or (isinstance(targets, jax.Array) and not targets.is_fully_addressable):
        return
    if not isinstance(classes, int):  # symbolic
        return
    values = np.asarray(targets)
    if values.size == 0 or (values.min() >= 0 and values.max() < classes):
        return
    wrong = values[((values < 0) | (values >= classes)) & (values != ignore_index)]
    if wrong.size:
        raise IndexError(f"Target {wrong[0]} is out of bounds.")


def broadcastable(name: str, *shapes: tuple[Any, ...]) -> None:
    """Shapes that NumPy's rules combine."""
    try:
        jnp.broadcast_shapes(*shapes)
    except ValueError as error:
        raise ValueError(
            f"{name}: log_probs and targets must have shapes that broadcast, got {shapes[0]} and {shapes[1]}."
        ) from error


def flag(name: str, argument: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name}: {argument} must be True or False, got {value!r}.")
    return bool(value)


def projection(name: str, inputs: Array, linear_weight: Array) -> jax.ShapeDtypeStruct:
    """The logits that the projection would give, as a shape: (..., classes), or (batch, classes, d1, ..., dK)."""
    if inputs.ndim == 0 or linear_weight.ndim < 2 or inputs.shape[-1] != linear_weight.shape[-1]:
        raise ValueError(
            f"{name}: inputs (..., features) and linear_weight (classes, features) must share their last axis, "
            f"got {inputs.shape} and {linear_weight.shape}. Pass a Flax kernel as kernel.T."
        )
    if linear_weight.ndim > 2 and inputs.ndim != 2:
        raise ValueError(
            f"{name}: linear_weight {linear_weight.shape} with more than two axes needs inputs (batch, features), "
            f"got {inputs.shape}."
        )
    return jax.ShapeDtypeStruct(inputs.shape[:-1] + linear_weight.shape[:-1], inputs.dtype)


def some_classes(name: str, linear_weight: Array) -> None:
    """At least one class, or there is none to be the most probable."""
    if linear_weight.shape[0] == 0:
        raise ValueError(f"{name}: linear_weight must have at least one class, got {linear_weight.shape}.")


def linear_targets(
    name: str,
    value: Any,
    logits: jax.ShapeDtypeStruct,
    axis: int,
    ignore_index: int | None,
    class_axis_name: MeshAxes | None,
) -> tuple[Array, int]:
    """Targets for logits that are never made, and the index to ignore: with probabilities, none may be given."""
    ignored = -100 if ignore_index is None else integer(name, "ignore_index", ignore_index)
    found = targets(name, value, logits, axis, ignored, class_axis_name)
    if ignore_index is not None and jnp.issubdtype(found.dtype, jnp.floating):
        raise ValueError(f"{name}: ignore_index applies to class indices, got {ignore_index} with probability targets.")
    return found, ignored


def bias(name: str, bias: Any, out: tuple[int, ...]) -> Array | None:
    """A bias of the shape of the projection's outputs."""
    if bias is None:
        return None
    array = floating_array(name, "linear_bias", bias)
    if array.shape != out:
        raise ValueError(
            f"{name}: linear_bias must have shape {out} (linear_weight's, no features), got {array.shape}."
        )
    return array


def positive(name: str, argument: str, value: Any) -> Any:
    """A scalar above 0, checked if it is concrete; None stays None."""
    if value is None:
        return None
    checked = fraction(name, argument, value, upper=math.inf, least="above 0")
    if checked is None:
        raise ValueError(f"{name}: {argument} must be above 0, got {value}. Pass None to leave it out.")
    return checked


def budget(name: str, memory_budget: Any) -> int | None:
    """A positive number of bytes, or None."""
    if memory_budget is None:
        return None
    if integer(name, "memory_budget", memory_budget) <= 0:
        raise ValueError(f"{name}: memory_budget must be a positive number of bytes, got {memory_budget}.")
    return int(memory_budget)
