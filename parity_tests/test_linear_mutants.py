"""Faults that others' versions of linear_cross_entropy have shipped: the suite's own comparisons must fail on each."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jaxloss import _linear, _slabs
from jaxloss._class_axis import ClassAxis
from parity_tests import test_linear, test_linear_sharding


def to_bfloat16(x: jax.Array) -> jax.Array:
    """Rounded for good: XLA on CPU would drop a cast there and back."""
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def half_precision_products(patch: pytest.MonkeyPatch) -> None:
    right = _slabs.dot

    def dot(a, b, axes):
        product = right(a, b, axes)
        return to_bfloat16(product) if a.dtype == jnp.bfloat16 else product

    for module in (_linear, _slabs):
        patch.setattr(module, "dot", dot)


def padding_unmasked(patch: pytest.MonkeyPatch) -> None:
    right = _linear._slab_losses
    patch.setattr(
        _linear,
        "_slab_losses",
        lambda settings, arrays, logits, real: right(settings, arrays, logits, jnp.ones_like(real)),
    )


def soft_cap_derivative_dropped(patch: pytest.MonkeyPatch) -> None:
    right = _linear.soft_cap
    patch.setattr(_linear, "soft_cap", lambda z, cap: z if cap is None else z + lax.stop_gradient(right(z, cap) - z))


def smoothing_local_to_a_shard(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ClassAxis, "size", lambda self, x: x.shape[self.position])


def half_precision_across_slabs(patch: pytest.MonkeyPatch) -> None:
    right = _linear.scan

    def scan(settings, step, start, arrays):
        def rounding(carry, part, real):
            (total, dmatrix, *rest), outputs = step(carry, part, real)
            return (total, to_bfloat16(dmatrix), *rest), outputs

        return right(settings, rounding if isinstance(start, tuple) else step, start, arrays)

    patch.setattr(_linear, "scan", scan)


def weight_gradient_of_the_last_slab_alone(patch: pytest.MonkeyPatch) -> None:
    right = _linear.scan

    def scan(settings, step, start, arrays):
        def forgetful(carry, part, real):
            (total, dmatrix, *rest), outputs = step(carry, part, real)
            return (total, dmatrix - carry[1], *rest), outputs

        return right(settings, forgetful if isinstance(start, tuple) else step, start, arrays)

    patch.setattr(_linear, "scan", scan)


def shared_scalars_counted_on_every_shard(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_linear, "varying_alike", lambda settings, arrays: arrays)


RAGGED = {
    "leading": (test_linear.TOKENS,),
    "inner": (),
    "soft": True,
    "optional": ["linear_bias"],
    "options": {"reduction": "sum", "label_smoothing": 0.1},
    "budget": 5 * 3 * 8 * test_linear.CLASSES,
}


def compare_with_pytorch() -> None:
    case = test_linear.fill(RAGGED, 0)
    with jax.enable_x64(True):
        ours = test_linear.evaluate_jax(case, "float64")
    test_linear.assert_float64_close(ours, test_linear.evaluate_torch(case, "float64"))


def compare_with_the_materialised_loss() -> None:
    with jax.enable_x64(True):
        test_linear.test_transform_equals_that_of_the_materialised_loss("index", "mean", "grad", None)


def compare_with_a_single_device() -> None:
    test_linear_sharding.test_class_axis_name_in_shard_map_gives_the_single_device_result("index", "grad outside", "x")


MUTANTS = {
    half_precision_products: test_linear.test_bfloat16_inputs_accumulate_in_float32_within_and_across_slabs,
    half_precision_across_slabs: test_linear.test_bfloat16_inputs_accumulate_in_float32_within_and_across_slabs,
    padding_unmasked: compare_with_pytorch,
    soft_cap_derivative_dropped: compare_with_the_materialised_loss,
    smoothing_local_to_a_shard: compare_with_a_single_device,
    weight_gradient_of_the_last_slab_alone: compare_with_pytorch,
    shared_scalars_counted_on_every_shard: (
        test_linear_sharding.test_gradient_to_shared_scalars_inside_shard_map_is_counted_once
    ),
}


@pytest.fixture
def uncached() -> Iterator[None]:
    """What is compiled before or with a fault must not serve for the other."""
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_fault_is_detected(mutant, monkeypatch, uncached):
    compare = MUTANTS[mutant]
    compare()
    jax.clear_caches()
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        compare()
