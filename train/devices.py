"""The devices and processes that a training is spread over."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import jax
import pooch
from jax.sharding import AxisType, Mesh

from train.config import Config, UserError

SILENCE, LEAVE = 20, 40  # seconds after which a silent process counts as dead, and that one waits for others to end


def keep_programs() -> None:
    """Have JAX keep compiled programs in the user's cache folder, unless $JAX_COMPILATION_CACHE_DIR names another."""
    folder = Path(pooch.os_cache("jaxloss"), "programs")
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ and os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def join(config: Config) -> None:
    """Meet the other processes, if the training has several; before JAX is used."""
    if config.coordinator is None:
        return
    try:
        jax.distributed.initialize(
            None if config.coordinator == "auto" else config.coordinator,
            config.num_processes,
            config.process_id,
            heartbeat_timeout_seconds=SILENCE,
            shutdown_timeout_seconds=LEAVE,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(f"--coordinator {config.coordinator}: {error}", exit_code=1) from error


def find_devices() -> None:
    """Raise `UserError` if JAX finds none of those that it is told to use."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        asked = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
        raise UserError(f"JAX finds no device of JAX_PLATFORMS={asked} {error}") from error


def make_mesh(count: int | None) -> Mesh:
    """So many devices of every process, or all."""
    if count is not None and count > jax.local_device_count():
        raise UserError(f"--devices is {count}, but there are {jax.local_device_count()}")
    devices = [device for process in range(jax.process_count()) for device in jax.local_devices(process)[:count]]
    return jax.make_mesh((len(devices),), ("batch",), (AxisType.Auto,), devices=devices)


@contextmanager
def watched() -> Iterator[None]:
    """Inside, an error ends one of several processes at once, that of another's death too.

    An orderly end would wait for the others, which wait for this one.
    """
    try:
        yield
    except (UserError, OSError, jax.errors.JaxRuntimeError) as error:
        if jax.process_count() == 1:
            raise
        what = "a process of this training has ended or failed: " * isinstance(error, jax.errors.JaxRuntimeError)
        print(f"error: {what}{str(error).splitlines()[0]}", file=sys.stderr, flush=True)
        os._exit(getattr(error, "exit_code", 1))
