"""PyTorch state_dicts in all their forms, as NumPy arrays by name. Reading one never runs code from the file."""

import difflib
import fnmatch
import itertools
import os
import pickle
import struct
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_BROKEN = (  # what torch.load raises for broken bytes, found by feeding it tens of thousands of them
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
)


def read_state_dict(
    source: Mapping[str, Any] | str | os.PathLike[str], ignore: Collection[str] = ()
) -> dict[str, np.ndarray]:
    """The arrays of a dict or a file by name, without those to ignore, and where possible without copying."""
    if not isinstance(source, Mapping | str | os.PathLike):
        raise TypeError(f"The state_dict is a {type(source).__name__}, expected a dict or a path: module.state_dict().")
    entries = source if isinstance(source, Mapping) else _read_file(Path(source))
    if not isinstance(entries, Mapping):
        raise TypeError(f"{source} holds a {type(entries).__name__}, expected a dict of arrays by name.")
    arrays, others = {}, []
    unwanted = ignored(ignore, [name for name in entries if isinstance(name, str)])
    for name, value in entries.items():
        array = to_array(value)
        if array is None or not isinstance(name, str):
            others.append(f"{name!r} is a {type(value).__name__}")
        elif name not in unwanted:
            arrays[name] = array
    if others:
        raise TypeError(f"The state_dict must be a dict of arrays by name, but {', '.join(others)}.")
    return arrays


def ignored(patterns: Collection[str], names: Collection[str], where: str = "the state_dict") -> set[str]:
    """The names that fit a pattern, and those of `num_batches_tracked`, which Flax does not have."""
    counters = (name for name in names if name.rpartition(".")[2] == "num_batches_tracked")
    return {*_fitting("ignore", patterns, names, where), *counters}


def transpose(arrays: Mapping[str, np.ndarray], patterns: Collection[str]) -> dict[str, np.ndarray]:
    """The arrays, of which the matrices whose names fit a pattern are transposed."""
    names = _fitting("transposed", patterns, arrays, "the state_dict")
    if others := [name for name in arrays if name in names and arrays[name].ndim != 2]:
        raise ValueError(f"transposed: {', '.join(others)} is no matrix.")
    return {name: array.T if name in names else array for name, array in arrays.items()}


def _fitting(option: str, patterns: Collection[str], names: Collection[str], where: str) -> set[str]:
    """The names that fit a pattern.

    Raises:
        ValueError: a pattern fits no name; it says where there is none, and which are the closest.
    """
    found = {pattern: fnmatch.filter(names, pattern) for pattern in patterns}
    if unused := [pattern for pattern, fitting in found.items() if not fitting]:
        closest = itertools.chain(*(difflib.get_close_matches(pattern, names, cutoff=0) for pattern in unused))
        raise ValueError(
            f"{option}: there is no {', '.join(unused)} in {where}. The closest names are "
            f"{', '.join(dict.fromkeys(closest))}."
        )
    return {*itertools.chain(*found.values())}


def _read_file(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read as safetensors: {error}") from error
    if path.suffix not in (".pt", ".pth"):
        raise ValueError(f"{path} is no state_dict: expected a .safetensors, .pt or .pth file.")
    import torch  # only here: nothing else needs it to be installed

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except _BROKEN as error:
        raise ValueError(
            f"{path} is broken, or holds more than tensors. Unpickling anything else can run code, so it is refused: "
            "save model.state_dict() alone, or as safetensors."
        ) from error


def to_numpy(tensor: Any) -> np.ndarray:
    """A copy of a tensor; bfloat16 as ml_dtypes has it."""
    array = to_array(tensor)
    assert array is not None
    return np.array(array)


def to_tensor(array: np.ndarray) -> Any:
    """The tensor of an array; PyTorch does not know NumPy's bfloat16, so the bits are handed over."""
    import torch

    if array.dtype == jnp.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.tensor(array)


def to_array(value: Any) -> np.ndarray | None:
    """A view of an array of any of the three libraries, None for anything else."""
    torch = sys.modules.get("torch")  # no tensor can exist without it
    if torch is not None and isinstance(value, torch.Tensor):
        tensor = value.detach().cpu().to_dense()
        # PyTorch does not know NumPy's bfloat16, so the bits are handed over.
        return tensor.view(torch.int16).numpy().view(jnp.bfloat16) if tensor.dtype == torch.bfloat16 else tensor.numpy()
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return np.asarray(value) if jnp.issubdtype(value.dtype, np.number) or value.dtype == bool else None
    return None
