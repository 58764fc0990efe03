"""What on a machine can make equal programs differ."""

import os
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jaxloss.parity._environment import PACKAGES, version

Row = tuple[str, str, str]  # what, how it is here, what that means


def examine() -> Iterator[Row]:
    """One row for each thing worth knowing."""
    for package in PACKAGES:
        yield package, version(package), ""
    yield "device", f"{jax.default_backend()} / {'cuda' if torch.cuda.is_available() else 'cpu'}", "JAX's / PyTorch's"
    x64 = jnp.zeros(0).dtype == jnp.float64
    yield (
        "jax_enable_x64",
        str(x64),
        "" if x64 else "float64 arrays become float32; check() turns it on for itself",
    )
    yield from _matmul()
    yield "denormals in XLA", *_denormals(jnp.float32(1e-38) * jnp.float32(0.01))
    yield "denormals in PyTorch", *_denormals(torch.tensor(1e-38) * torch.tensor(0.01))
    aliased = _aliases()
    yield "jnp.asarray of a tensor", "aliases" if aliased else "copies", _ALIAS if aliased else ""
    yield (
        "threads",
        f"{os.cpu_count()} cores, {torch.get_num_threads()} in PyTorch",
        "sums may be added in another order",
    )


_ALIAS = "an in-place PyTorch optimizer then changes JAX's array; jnp.array copies"


def _matmul() -> Iterator[Row]:
    precision = jax.config.values["jax_default_matmul_precision"] or "default"
    random = np.random.default_rng(0)
    a, b = (random.normal(size=(256, 256)) for _ in range(2))
    exact = a.astype(np.float32).astype(float) @ b.astype(np.float32).astype(float)
    for name, product in {
        f"JAX matmul ({precision})": np.asarray(jnp.array(a, jnp.float32) @ jnp.array(b, jnp.float32)),
        f"PyTorch matmul ({torch.get_float32_matmul_precision()})": _torch_product(a, b),
    }.items():
        error = float(np.linalg.norm(product - exact) / np.linalg.norm(exact))
        lossy = error > 1e-5
        remark = (
            "TF32 or bfloat16 inside: jax.config.update('jax_default_matmul_precision', 'highest') helps"
            if lossy
            else "float32 inside"
        )
        yield name, f"off by {error:.1e}", remark


def _torch_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return (
        (torch.tensor(a, dtype=torch.float32).to(device) @ torch.tensor(b, dtype=torch.float32).to(device))
        .cpu()
        .numpy()
    )


def _denormals(tiny: jax.Array | torch.Tensor) -> tuple[str, str]:
    return ("kept", "") if float(tiny) else ("flushed to zero", "numbers below 1.2e-38 are 0 here")


def _aliases() -> bool:
    """Whether JAX reads PyTorch's memory, tried with an array that is large and aligned."""
    tensor = torch.zeros(1 << 16)
    array = jnp.asarray(tensor.numpy())
    tensor += 1
    return bool(array[0] == 1)
