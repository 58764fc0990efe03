"""Fixtures: eight fake CPU devices, beartype on private functions, strict promotion, profiles, compilation."""

import gc
import os

# Before jax starts: eight devices for the sharding tests.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

from collections.abc import Iterator

import jax
import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

gc.set_threshold(100_000)  # of the tests' many compiled programs hardly anything is garbage, and looking takes long
install_import_hook("jaxloss", "beartype.beartype")  # public functions opt out with no_type_check

settings.register_profile("default", max_examples=300, deadline=None, derandomize=True)
settings.register_profile("thorough", max_examples=5000, deadline=None)
settings.load_profile("default")


class Compilation:
    """Has XLA compile quickly, in half the time, where a test asks what is computed and not how exactly."""

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        thorough = item.config.getoption("--hypothesis-profile") == "thorough"
        shown = isinstance(item, pytest.DoctestItem) or item.get_closest_marker("rounding") is not None
        quick = not thorough and not shown
        if quick != jax.config.read("jax_disable_most_optimizations"):
            jax.config.update("jax_disable_most_optimizations", quick)
            jax.clear_caches()


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Compilation())  # not a hook here: those do not see the doctests of jaxloss


@pytest.fixture
def strict() -> Iterator[None]:
    """Strict dtype promotion and no implicit rank promotion, for calls of jaxloss alone."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def x64() -> Iterator[None]:
    """Float64 and int64 in JAX; off by default, as for users."""
    with jax.enable_x64(True):
        yield
