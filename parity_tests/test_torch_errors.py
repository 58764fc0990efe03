"""PyTorch's errors: where it raises, jaxloss raises ValueError, TypeError or IndexError with the same facts."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

import jaxloss
from parity_tests.losses import OURS, THEIRS, to_torch

pytestmark = pytest.mark.usefixtures("strict")

BOTH = pytest.mark.parametrize("name", ["cross_entropy", "nll_loss"])
REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
LOGITS = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)  # (batch, classes, d)
MATRIX, ROW = LOGITS[..., 0], LOGITS[0, :, 0]
INDICES, PROBABILITIES = np.array([0, 2]), np.full((2, 3), 1 / 3, np.float32)


class Case(NamedTuple):
    """A call that both refuse: PyTorch's exception and text, then ours and the facts its message holds."""

    name: str
    call: tuple[np.ndarray, np.ndarray, dict[str, Any]]  # values, targets, options
    theirs: tuple[type[Exception], str]
    ours: tuple[type[Exception], tuple[str, ...]]


def both(call: tuple, theirs: tuple, ours: tuple) -> dict[str, Case]:
    """The case for cross_entropy and for nll_loss."""
    return {name: Case(name, call, theirs, ours) for name in ("cross_entropy", "nll_loss")}


MULTI_TARGET = "0D or 1D target tensor expected, multi-target not supported"
NOT_LONG = "expected target dtype to be Long or Byte, but got "
WEIGHT = "weight tensor should be defined either for all 3 classes or no classes but got weight tensor of shape: "
PASS_AXIS_1 = "pass axis=1"
CAST = "Cast class indices with .astype(jnp.int32)"

ROWS = {
    "reduction": both(
        (MATRIX, INDICES, {"reduction": "avg"}),
        (ValueError, "avg is not a valid value for reduction"),
        (ValueError, ("reduction must be one of 'none', 'mean', 'sum', got 'avg'",)),
    ),
    "weight of another length": both(
        (MATRIX, INDICES, {"weight": np.ones(4, np.float32)}),
        (RuntimeError, WEIGHT + "[4]"),
        (ValueError, ("weight must have shape (3,)", "one for each class", "got (4,)")),
    ),
    "weight of another rank": both(
        (MATRIX, INDICES, {"weight": np.ones((3, 1), np.float32)}),
        (RuntimeError, WEIGHT + "[3, 1]"),
        (ValueError, ("weight must have shape (3,)", "got (3, 1)")),
    ),
    "batch size": both(
        (MATRIX, np.array([0, 1, 2]), {}),
        (ValueError, "Expected input batch_size (2) to match target batch_size (3)."),
        (ValueError, ("targets must have shape (2,)", "got (3,)")),
    ),
    "multi-target": both(
        (MATRIX, np.zeros((2, 4), int), {}),
        (RuntimeError, MULTI_TARGET),
        (ValueError, ("targets must have shape (2,)", "without axis -1", "got (2, 4)", PASS_AXIS_1)),
    ),
    "target size": both(
        (LOGITS, np.zeros((2, 5), int), {}),
        (RuntimeError, "Expected target size [2, 4], got [2, 5]"),
        (ValueError, ("targets must have shape (2, 4)", "without axis 1", "got (2, 5)", "channels-last", "axis=-1")),
    ),
    "target of fewer axes": both(
        (LOGITS, INDICES, {}),
        (RuntimeError, "Expected target size [2, 4], got [2]"),
        (ValueError, ("targets must have shape (2, 4)", "got (2,)")),
    ),
    "one row, two targets": both(
        (ROW, INDICES, {}),
        (ValueError, "For 1D input, 1D target must have size 1, but got target size: 2"),
        (ValueError, ("targets must have shape ()", "got (2,)")),
    ),
    "floating indices": both(
        (MATRIX, INDICES.astype(np.float32), {}),
        (RuntimeError, NOT_LONG + "Float"),
        (TypeError, ("targets must be integers", "got float32", CAST, "class probabilities")),
    ),
    "bool targets": both(
        (MATRIX, np.array([True, False]), {}),
        (RuntimeError, NOT_LONG + "Bool"),
        (TypeError, ("targets must be integers", "got bool", CAST)),
    ),
    "same shape, integers": {
        "cross_entropy": Case(
            "cross_entropy",
            (MATRIX, np.ones((2, 3), int), {}),
            (RuntimeError, "Expected floating point type for target with class probabilities, got Long"),
            (TypeError, ("class probabilities and must be floating", "got int", "without the class axis")),
        ),
        "nll_loss": Case(
            "nll_loss",
            (MATRIX, np.ones((2, 3), int), {}),
            (RuntimeError, MULTI_TARGET),
            (ValueError, ("targets must have shape (2,)", "got (2, 3)")),
        ),
    },
    "probabilities to nll_loss": {
        "nll_loss": Case(
            "nll_loss",
            (MATRIX, PROBABILITIES, {}),
            (RuntimeError, MULTI_TARGET),
            (TypeError, ("targets must be integers", "got float32")),
        )
    },
    "ignore_index with probabilities": {
        "cross_entropy": Case(
            "cross_entropy",
            (MATRIX, PROBABILITIES, {"ignore_index": 1}),
            (RuntimeError, "ignore_index is not supported for floating point target"),
            (ValueError, ("ignore_index applies to class indices", "got 1 with probability targets")),
        )
    },
    "label_smoothing": {
        "cross_entropy": Case(
            "cross_entropy",
            (MATRIX, INDICES, {"label_smoothing": 1.5}),
            (RuntimeError, "label_smoothing must be between 0.0 and 1.0. Got: 1.5"),
            (ValueError, ("label_smoothing must be between 0 and 1", "got 1.5")),
        )
    },
    "integer values": {
        "cross_entropy": Case(
            "cross_entropy",
            (np.ones((2, 3), int), INDICES, {}),
            (NotImplementedError, "\"log_softmax_lastdim_kernel_impl\" not implemented for 'Long'"),
            (TypeError, ("logits must be floating", "got int", "Cast with .astype(jnp.float32)")),
        ),
        "nll_loss": Case(
            "nll_loss",
            (np.ones((2, 3), int), INDICES, {}),
            (NotImplementedError, "\"nll_loss_out_frame\" not implemented for 'Long'"),
            (TypeError, ("log_probs must be floating", "got int", "Cast with .astype(jnp.float32)")),
        ),
    },
    "scalar": {
        "nll_loss": Case(
            "nll_loss",
            (np.float32(1), np.int64(0), {}),
            (ValueError, "Expected 1 or more dimensions (got 0)"),
            (ValueError, ("log_probs must have a class axis", "got a scalar")),
        )
    },
    "kl_div shapes": {
        "kl_div": Case(
            "kl_div",
            (MATRIX, np.ones((2, 4), np.float32), {"reduction": "sum"}),
            (
                RuntimeError,
                "The size of tensor a (4) must match the size of tensor b (3) at non-singleton dimension 1",
            ),
            (ValueError, ("shapes that broadcast", "(2, 3)", "(2, 4)")),
        )
    },
    "kl_div integer targets": {
        "kl_div": Case(
            "kl_div",
            (MATRIX, np.ones((2, 3), int), {"reduction": "sum"}),
            (RuntimeError, "kl_div: Integral inputs not supported."),
            (TypeError, ("targets must be floating", "got int", "Cast with")),
        )
    },
    "kl_div reduction": {
        "kl_div": Case(
            "kl_div",
            (MATRIX, PROBABILITIES, {"reduction": "avg"}),
            (ValueError, "avg is not a valid value for reduction"),
            (ValueError, ("reduction must be one of 'none', 'mean', 'sum', 'batchmean', got 'avg'",)),
        )
    },
}
CASES = [pytest.param(case, id=f"{row}-{name}") for row, cases in ROWS.items() for name, case in cases.items()]


@pytest.mark.parametrize("case", CASES)
def test_pytorch_raises(case):
    (values, targets, options), (error, text) = case.call, case.theirs
    options = {key: to_torch(value) if key == "weight" else value for key, value in options.items()}
    with pytest.raises(error) as raised:
        THEIRS[case.name](torch.tensor(values), torch.tensor(targets), **options)
    assert type(raised.value) is error
    assert str(raised.value).startswith(text)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("wrap", [lambda loss: loss, jax.jit], ids=["concrete", "jit"])
def test_jaxloss_raises_with_the_same_facts(case, wrap):
    (values, targets, options), (error, facts) = case.call, case.ours
    axis = {"axis": 1} if values.ndim > 2 else {}
    with pytest.raises(error) as raised:
        wrap(lambda values, targets: OURS[case.name](values, targets, **options, **axis))(values, targets)
    message = str(raised.value)
    assert type(raised.value) is error
    assert message.startswith(f"{case.name}: ")
    assert [fact for fact in facts if fact not in message] == [], message


# Targets out of bounds: the one text that is PyTorch's word for word


@BOTH
@REDUCTIONS
@pytest.mark.parametrize("target", [3, -1, -99, -101, 200])
@pytest.mark.parametrize("values", [LOGITS, MATRIX, ROW], ids=["N,C,d", "N,C", "C"])
def test_target_out_of_bounds(name, reduction, target, values):
    targets = np.zeros(values.shape[:1] + values.shape[2:] if values.ndim > 1 else (), int)
    targets.flat[-1] = target
    message = f"Target {target} is out of bounds."
    with pytest.raises(IndexError) as theirs:
        THEIRS[name](torch.tensor(values), torch.tensor(targets), reduction=reduction)
    assert str(theirs.value) == message
    with pytest.raises(IndexError) as ours:
        OURS[name](values, targets, reduction=reduction, axis=min(1, values.ndim - 1))
    assert str(ours.value) == message


@BOTH
@REDUCTIONS
@pytest.mark.parametrize("ignore_index", [-1, 1, 7])
def test_minus_100_is_out_of_bounds_where_ignore_index_is_another(name, reduction, ignore_index):
    targets, options = np.array([ignore_index, -100]), {"reduction": reduction, "ignore_index": ignore_index}
    for call in (
        lambda: THEIRS[name](torch.tensor(MATRIX), torch.tensor(targets), **options),
        lambda: OURS[name](MATRIX, targets, **options),
    ):
        with pytest.raises(IndexError, match=r"^Target -100 is out of bounds\.$"):
            call()


@BOTH
@REDUCTIONS
def test_no_classes_have_no_target_in_bounds(name, reduction):
    values = np.zeros((2, 0), np.float32)
    for call in (
        lambda: THEIRS[name](torch.tensor(values), torch.tensor([0, -100]), reduction=reduction),
        lambda: OURS[name](values, np.array([0, -100]), reduction=reduction),
    ):
        with pytest.raises(IndexError, match=r"^Target 0 is out of bounds\.$"):
            call()


@pytest.mark.parametrize("dtype", ["uint8", "int64"])
def test_target_out_of_bounds_of_the_dtypes_pytorch_takes(dtype):
    targets = np.array([0, 200], dtype)
    for call in (
        lambda: F.cross_entropy(torch.tensor(MATRIX), torch.tensor(targets)),
        lambda: jaxloss.cross_entropy(MATRIX, targets),
    ):
        with pytest.raises(IndexError, match=r"^Target 200 is out of bounds\.$"):
            call()


# The axis, and the dtypes log_softmax refuses


@pytest.mark.parametrize(
    ("shape", "axis", "bounds"), [((2, 3), 2, "[-2, 1]"), ((2, 3), -3, "[-2, 1]"), ((), 1, "[-1, 0]")]
)
def test_axis_out_of_range(shape, axis, bounds):
    values = np.zeros(shape, np.float32)
    with pytest.raises(IndexError) as theirs:
        F.log_softmax(torch.tensor(values), dim=axis)
    their_text = f"Dimension out of range (expected to be in range of {bounds}, but got {axis})"
    assert str(theirs.value) == their_text
    calls = {
        "log_softmax": lambda: jaxloss.log_softmax(values, axis=axis),
        "cross_entropy": lambda: jaxloss.cross_entropy(values, INDICES, axis=axis),
        "nll_loss": lambda: jaxloss.nll_loss(values, INDICES, axis=axis),
    }
    for name, call in calls.items():
        with pytest.raises(IndexError) as ours:
            call()
        assert str(ours.value) == f"{name}: axis out of range (expected to be in {bounds}, got {axis})."


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint8", "bool"])
def test_log_softmax_of_integers_without_dtype(dtype):
    values = np.ones((2, 3), dtype)
    with pytest.raises(NotImplementedError, match=r'"log_softmax_lastdim_kernel_impl" not implemented for'):
        F.log_softmax(torch.tensor(values), dim=-1)
    with pytest.raises(TypeError, match=r"^log_softmax: logits must be floating, got \w+\. .*\.astype\(jnp\.float32\)"):
        jaxloss.log_softmax(values)


def test_log_softmax_to_an_integer_dtype():
    with pytest.raises(NotImplementedError, match=r'"log_softmax_lastdim_kernel_impl" not implemented for .Int'):
        F.log_softmax(torch.tensor(MATRIX), dim=-1, dtype=torch.int32)
    with pytest.raises(TypeError, match=r"^log_softmax: dtype must be floating, got int32\.$"):
        jaxloss.log_softmax(MATRIX, dtype=np.int32)


@pytest.mark.parametrize(
    ("axis_name", "error", "message"),
    [
        ("model", ValueError, "no mesh axis 'model' here"),
        (["model"], TypeError, r"must be a mesh axis or a tuple of them, got \['model'\]"),
        (3, TypeError, "must be a mesh axis or a tuple of them, got 3"),
    ],
)
@pytest.mark.parametrize("loss", ["cross_entropy", "linear_cross_entropy", "linear_log_prob"])
def test_class_axis_name_that_is_none(loss, axis_name, error, message):
    arrays = [np.ones((2, 3))] * (1 if loss == "cross_entropy" else 2)
    with pytest.raises(error, match=f"{loss}: class_axis_name.*{message}"):
        getattr(jaxloss, loss)(*arrays, np.zeros(2, int), class_axis_name=axis_name)


def test_complex_options_are_refused_under_jit_too():
    loss = jax.jit(lambda value: jaxloss.cross_entropy(jnp.ones((2, 3)), jnp.zeros(2, int), label_smoothing=value))
    with pytest.raises(TypeError, match="label_smoothing must be a real scalar, got complex"):
        loss(1j)


@pytest.mark.parametrize("value", [np.True_, jnp.array(True), np.complex64(0.1 + 5j)], ids=repr)
def test_options_are_real_numbers_whoever_made_them(value):
    with pytest.raises(TypeError, match="label_smoothing must be a number, got"):
        jaxloss.cross_entropy(jnp.ones((2, 3)), jnp.zeros(2, int), label_smoothing=value)


def test_time_differences_are_no_labels():
    with pytest.raises(TypeError, match=r"targets must be integers \(class indices\), got timedelta64"):
        jaxloss.cross_entropy(jnp.ones((2, 3)), np.zeros(2, "m8[s]"))


def test_integers_in_the_shape_of_logits_are_no_probabilities_whatever_is_ignored():
    with pytest.raises(TypeError, match="class probabilities and must be floating, got int64"):
        jaxloss.linear_cross_entropy(jnp.ones((2, 4)), jnp.ones((3, 4)), np.zeros((2, 3), int), ignore_index=-100)


@pytest.mark.parametrize("loss", ["cross_entropy", "linear_cross_entropy"])
def test_probabilities_may_be_held_by_a_variable(loss):
    class Held:
        def __jax_array__(self) -> jax.Array:
            return jnp.full((2, 3), 1 / 3)

    arrays = [np.ones((2, 3)), np.ones((3, 3))][: 1 if loss == "cross_entropy" else 2]
    function = getattr(jaxloss, loss)
    assert function(*arrays, Held()) == function(*arrays, jnp.full((2, 3), 1 / 3))


def test_labels_may_be_known_where_the_number_of_classes_is_not():
    shape = jax.export.symbolic_shape("2, c")
    exported = jax.export.export(jax.jit(lambda z: jaxloss.cross_entropy(z, np.array([0, 3]), reduction="none")))
    call = exported(jax.ShapeDtypeStruct(shape, jnp.float32)).call
    np.testing.assert_allclose(call(jnp.ones((2, 4))), np.log([4, 4]), rtol=1e-6)
    assert np.isnan(call(jnp.ones((2, 3)))).tolist() == [False, True]


@pytest.mark.parametrize("value", [torch.tensor(0.1), np.float16(0.1), jnp.bfloat16(0.1)], ids=repr)
def test_options_may_be_any_frameworks_scalars(value):
    loss = jaxloss.cross_entropy(jnp.eye(3), jnp.arange(3), label_smoothing=value)
    assert loss == jaxloss.cross_entropy(jnp.eye(3), jnp.arange(3), label_smoothing=float(value))
