"""What on a machine can make equal programs differ."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxloss.parity._environment import PACKAGES, version

Row = tuple[str, str, str]  # what, how it is here, what that means


def examine() -> Iterator[Row]:
    """One row for each thing worth knowing; those of PyTorch only where it is installed."""
    for package in PACKAGES:
        yield package, version(package), ""
    yield "device of JAX", jax.default_backend(), ""
    x64 = jnp.zeros(0).dtype == jnp.float64
    yield (
        "jax_enable_x64",
        str(x64),
        "" if x64 else "float64 arrays become float32; check() turns it on for itself",
    )
    precision = jax.config.values["jax_default_matmul_precision"] or "default"
    yield f"JAX matmul ({precision})", *_matmul(lambda a, b: np.asarray(jnp.array(a) @ jnp.array(b)))
    yield "denormals in XLA", *_denormals(float(jnp.float32(1e-38) * jnp.float32(0.01)))
    yield "cores", str(os.cpu_count()), _ORDER
    yield from _examine_torch()


_ORDER = "sums may be added in another order"
_ALIAS = "an in-place PyTorch optimizer then changes JAX's array; jnp.array copies"


def _examine_torch() -> Iterator[Row]:
    try:
        import torch
    except ImportError:  # the extra `replay` has none
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    yield "device of PyTorch", device, ""

    def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (torch.tensor(a, device=device) @ torch.tensor(b, device=device)).cpu().numpy()

    yield f"PyTorch matmul ({torch.get_float32_matmul_precision()})", *_matmul(product)
    yield "denormals in PyTorch", *_denormals(float(torch.tensor(1e-38) * torch.tensor(0.01)))
    aliased = _aliases(torch.zeros(1 << 16))
    yield "jnp.asarray of a tensor", "aliases" if aliased else "copies", _ALIAS if aliased else ""
    yield "threads of PyTorch", str(torch.get_num_threads()), _ORDER


def _matmul(product: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> tuple[str, str]:
    random = np.random.default_rng(0)
    a, b = (random.normal(size=(256, 256)).astype(np.float32) for _ in range(2))
    exact = a.astype(float) @ b.astype(float)
    error = float(np.linalg.norm(product(a, b) - exact) / np.linalg.norm(exact))
    lossy = error > 1e-5
    remark = (
        "TF32 or bfloat16 inside: jax.config.update('jax_default_matmul_precision', 'highest') helps"
        if lossy
        else "float32 inside"
    )
    return f"off by {error:.1e}", remark


def _denormals(tiny: float) -> tuple[str, str]:
    return ("kept", "") if tiny else ("flushed to zero", "numbers below 1.2e-38 are 0 here")


def _aliases(tensor: Any) -> bool:
    """Whether JAX reads PyTorch's memory, tried with zeros that are many and aligned."""
    array = jnp.asarray(tensor.numpy())
    tensor += 1
    return bool(array[0] == 1)
