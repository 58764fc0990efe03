"""The source notes' own numbers, in JAX beside PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from jax import lax
from torch import nn

import jaxloss
from parity_tests.gates import assert_float64_close, assert_identical
from parity_tests.losses import to_torch

pytestmark = pytest.mark.usefixtures("strict", "x64")


def test_float_labels_are_refused_and_integer_labels_agree():
    logits = np.array([[1.2, 0.5, -0.8], [-0.5, 0.8, 2.0]])
    with pytest.raises(RuntimeError, match="expected target dtype to be Long or Byte, but got Float"):
        nn.CrossEntropyLoss()(torch.tensor(logits), torch.FloatTensor([0, 2]))
    with pytest.raises(TypeError, match=r"targets must be integers .*got float32. Cast .* with .astype\(jnp.int32\)"):
        jaxloss.cross_entropy(logits, np.array([0, 2], np.float32))
    theirs = nn.CrossEntropyLoss()(torch.tensor(logits), torch.tensor([0, 2]))
    assert_float64_close(jaxloss.cross_entropy(logits, np.array([0, 2])), theirs)


def test_nll_loss_of_the_log_of_probabilities():
    probabilities, targets = np.array([[0.7, 0.2, 0.1], [0.1, 0.2, 0.7]]), np.array([0, 2])
    theirs = nn.NLLLoss()(torch.log(torch.tensor(probabilities)), torch.tensor(targets))
    assert_float64_close(jaxloss.nll_loss(jnp.log(probabilities), targets), theirs)
    assert f"{theirs:.6f}" == "0.356675"


def six_ways_in_pytorch(logits, targets):
    softmax = torch.exp(logits) / torch.exp(logits).sum(dim=1, keepdim=True)
    log_softmax, one_hot = F.log_softmax(logits, dim=1), F.one_hot(targets, 3)
    return {
        "softmax by hand": -softmax[range(2), targets].log().mean(),
        "log of softmax": F.nll_loss(torch.log(F.softmax(logits, dim=1)), targets),
        "log_softmax": -log_softmax[range(2), targets].mean(),
        "one-hot and sum": (-one_hot * log_softmax).sum(dim=1).mean(),
        "NLLLoss": nn.NLLLoss()(log_softmax, targets),
        "CrossEntropyLoss": nn.CrossEntropyLoss()(logits, targets),
    }


def six_ways_in_jax(logits, targets):
    softmax = jnp.exp(logits) / jnp.exp(logits).sum(axis=1, keepdims=True)
    log_softmax, one_hot = jaxloss.log_softmax(logits, axis=1), jax.nn.one_hot(targets, 3)
    return {
        "softmax by hand": -jnp.log(softmax[jnp.arange(2), targets]).mean(),
        "log of softmax": jaxloss.nll_loss(jnp.log(jax.nn.softmax(logits, axis=1)), targets),
        "log_softmax": -log_softmax[jnp.arange(2), targets].mean(),
        "one-hot and sum": (-one_hot * log_softmax).sum(axis=1).mean(),
        "NLLLoss": jaxloss.NLLLoss()(log_softmax, targets),
        "CrossEntropyLoss": jaxloss.CrossEntropyLoss()(logits, targets),
    }


def test_six_ways_to_the_same_loss():
    logits, targets = np.array([[10.0, 3.0, 1.0], [-1.0, 0.0, -4.0]]), np.array([1, 2])
    ours = six_ways_in_jax(jnp.asarray(logits), jnp.asarray(targets))
    theirs = six_ways_in_pytorch(torch.tensor(logits), torch.tensor(targets))
    assert_float64_close(ours, theirs)
    assert_float64_close(ours, dict.fromkeys(ours, theirs["CrossEntropyLoss"]))
    assert {f"{loss:.4f}" for loss in ours.values()} == {"5.6638"}


def nll_loss_by_hand_in_pytorch(logs, targets):
    picked = torch.zeros(len(targets), dtype=logs.dtype)
    for i in range(len(targets)):
        picked[i] = logs[i][targets[i]]
    return -picked.sum() / len(picked)


def nll_loss_by_hand_in_jax(logs, targets):
    picked = jnp.zeros(len(targets), logs.dtype)
    for i in range(len(targets)):
        picked = picked.at[i].set(logs[i][targets[i]])
    return -picked.sum() / len(picked)


def test_nll_loss_by_hand_on_ten_classes():
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(8, 10)), rng.integers(0, 10, 8)
    tensor, labels = torch.tensor(logits), torch.tensor(targets)
    theirs = {
        "by hand": nll_loss_by_hand_in_pytorch(F.log_softmax(tensor, dim=1), labels),
        "nll_loss": nn.NLLLoss()(F.log_softmax(tensor, dim=1), labels),
        "cross_entropy": nn.CrossEntropyLoss()(tensor, labels),
    }
    ours = {
        "by hand": nll_loss_by_hand_in_jax(jaxloss.log_softmax(logits), targets),
        "nll_loss": jaxloss.nll_loss(jaxloss.log_softmax(logits), targets),
        "cross_entropy": jaxloss.cross_entropy(logits, targets),
    }
    assert_float64_close(ours, theirs)
    assert_float64_close(ours["by hand"], theirs["cross_entropy"])


LABELS = np.array([2, 0, 1])
GOOD = np.array([[0.1, 0.2, 0.9], [1.1, 0.1, 0.2], [0.2, 2.1, 0.1]])
BAD = np.array([[0.8, 0.2, 0.3], [0.2, 0.3, 0.5], [0.2, 0.2, 0.5]])


def test_losses_order_a_good_and_a_bad_prediction():
    ours, theirs = {}, {}
    for kind, logits in {"good": GOOD, "bad": BAD}.items():
        tensor, labels = torch.tensor(logits), torch.tensor(LABELS)
        ours[kind] = [jaxloss.cross_entropy(logits, LABELS), jaxloss.nll_loss(jaxloss.log_softmax(logits), LABELS)]
        theirs[kind] = [nn.CrossEntropyLoss()(tensor, labels), nn.NLLLoss()(F.log_softmax(tensor, dim=1), labels)]
    assert_float64_close(ours, theirs)
    assert all(good < bad for good, bad in zip(ours["good"], ours["bad"], strict=True))


@pytest.mark.parametrize(("logits", "right"), [(GOOD, 3), (BAD, 0)], ids=["good", "bad"])
def test_category_is_the_argmax_and_max_gives_values_and_indices(logits, right):
    values, indices = torch.max(torch.tensor(logits), dim=-1)
    our_values, our_indices = lax.top_k(jnp.asarray(logits), 1)
    assert_identical(our_values.squeeze(-1), values)
    np.testing.assert_array_equal(our_indices.squeeze(-1), indices)
    np.testing.assert_array_equal(jnp.argmax(logits, axis=-1), torch.argmax(torch.tensor(logits), dim=-1))
    np.testing.assert_array_equal(jnp.argmax(jaxloss.log_softmax(logits), axis=-1), indices)
    assert int(jnp.sum(jnp.argmax(logits, axis=-1) == LABELS)) == right


SOFT = np.array([[0.1, 0.2, 0.7], [0.8, 0.1, 0.1], [0.25, 0.5, 0.25]])


@pytest.mark.parametrize("logits", [GOOD, BAD], ids=["good", "bad"])
def test_cross_entropy_between_two_distributions(logits):
    by_hand = -jnp.sum(SOFT * jaxloss.log_softmax(logits), axis=-1).mean()
    theirs = nn.CrossEntropyLoss()(torch.tensor(logits), torch.tensor(SOFT))
    assert_float64_close(jaxloss.cross_entropy(logits, SOFT), theirs)
    assert_float64_close(by_hand, theirs)


@pytest.mark.parametrize("log_target", [False, True])
def test_kl_divergence_is_cross_entropy_less_entropy(log_target):
    targets, options = np.log(SOFT) if log_target else SOFT, {"log_target": log_target, "reduction": "batchmean"}
    ours = jaxloss.kl_div(jaxloss.log_softmax(BAD), targets, **options)
    theirs = F.kl_div(F.log_softmax(torch.tensor(BAD), dim=1), torch.tensor(targets), **options)
    assert_float64_close(ours, theirs)
    entropy = -(SOFT * np.log(SOFT)).sum(axis=-1).mean()
    assert_float64_close(ours, jaxloss.cross_entropy(BAD, SOFT) - entropy)


OPTIONS = {
    "default": {},
    "weight": {"weight": np.array([0.2, 1.0, 3.0])},
    "ignore_index": {"ignore_index": 2},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "label_smoothing": {"label_smoothing": 0.1},
    "all": {"weight": np.array([0.2, 1.0, 3.0]), "ignore_index": 0, "reduction": "none", "label_smoothing": 0.3},
}
CRITERIA = {
    "CrossEntropyLoss": (jaxloss.CrossEntropyLoss, jaxloss.cross_entropy, nn.CrossEntropyLoss),
    "NLLLoss": (jaxloss.NLLLoss, jaxloss.nll_loss, nn.NLLLoss),
}


@pytest.mark.parametrize("shape", [(3, 3), (3, 3, 2)], ids=["N,C", "N,C,d"])
@pytest.mark.parametrize(
    ("criterion", "options"),
    [(name, key) for name in CRITERIA for key in OPTIONS if (name, key) != ("NLLLoss", "label_smoothing")],
)
def test_criterion_and_function_take_the_options_of_torch_nn(criterion, options, shape):
    ours, function, theirs = CRITERIA[criterion]
    options = {k: v for k, v in OPTIONS[options].items() if (criterion, k) != ("NLLLoss", "label_smoothing")}
    rng = np.random.default_rng(0)
    values, targets = rng.normal(size=shape), rng.permuted(np.resize([0, 1, 2, -100], (shape[0], *shape[2:])))
    targets = np.where(targets == -100, options.get("ignore_index", -100), targets)
    loss = ours(**options, axis=1)(values, targets)
    their_options = {key: torch.tensor(value) if key == "weight" else value for key, value in options.items()}
    assert_float64_close(loss, theirs(**their_options)(to_torch(values), to_torch(targets)))
    assert_identical(loss, function(values, targets, **options, axis=1))


def test_criterion_of_probabilities():
    theirs = nn.CrossEntropyLoss(label_smoothing=0.2)(torch.tensor(GOOD), torch.tensor(SOFT))
    assert_float64_close(jaxloss.CrossEntropyLoss(label_smoothing=0.2)(GOOD, SOFT), theirs)


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_log_softmax_object_gives_what_torch_nn_gives(axis):
    logits = np.random.default_rng(0).normal(size=(2, 3, 4))
    ours = jaxloss.LogSoftmax(axis=axis)(logits)
    assert_float64_close(ours, nn.LogSoftmax(dim=axis)(torch.tensor(logits)))
    assert_identical(ours, jaxloss.log_softmax(logits, axis=axis))
