"""The versions and settings on which rounding depends."""

import importlib.metadata
import platform
from datetime import UTC, datetime

import jax
import jax.numpy as jnp

import jaxloss

PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "numpy")


def version(package: str) -> str:
    """Of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def environment() -> dict[str, str]:
    """What a report says of where it was made."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "jaxloss": jaxloss.__version__,
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "platform": platform.platform(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind} ({jax.default_backend()})",
        "jax_enable_x64": str(jnp.zeros(0).dtype == jnp.float64),
        "jax_default_matmul_precision": str(jax.config.values["jax_default_matmul_precision"] or "default"),
    }
