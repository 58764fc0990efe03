"""PyTorch's optimizers and schedulers against their optax translations: 200 steps in float64."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch.optim import SGD, Adadelta, Adagrad, Adam, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LinearLR, OneCycleLR, StepLR

from jaxloss import parity
from jaxloss.parity import one_cycle, optimizer_by_name
from parity_tests.gates import assert_float64_close, assert_identical, relative_l2

STEPS = 200
SHAPES = {"kernel": (3, 4), "bias": (4,)}

MakeOptimizer = Callable[[Any], Optimizer]
OPTIMIZERS: dict[str, MakeOptimizer] = {
    "sgd": lambda params: SGD(params, lr=0.1),
    "sgd-momentum": lambda params: SGD(params, lr=0.1, momentum=0.9),
    "sgd-dampening": lambda params: SGD(params, lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.01),
    "sgd-nesterov": lambda params: SGD(params, lr=0.1, momentum=0.9, nesterov=True),
    "sgd-maximize": lambda params: SGD(params, lr=1e-3, momentum=0.5, maximize=True, weight_decay=0.1),
    "adam": lambda params: Adam(params, lr=0.01),
    "adam-l2": lambda params: Adam(params, lr=0.01, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1),
    "adam-decoupled": lambda params: Adam(params, lr=0.01, weight_decay=0.1, decoupled_weight_decay=True),
    "adam-amsgrad": lambda params: Adam(params, lr=0.01, amsgrad=True),
    "adam-without-momentum": lambda params: Adam(params, lr=0.01, betas=(0.0, 0.9)),
    "adamw": lambda params: AdamW(params, lr=0.01),
    "adamw-amsgrad": lambda params: AdamW(params, lr=torch.tensor(0.01).double(), amsgrad=True, maximize=True),
    "rmsprop": lambda params: RMSprop(params, lr=0.01),
    "rmsprop-centered": lambda params: RMSprop(params, lr=0.01, centered=True, momentum=0.9, weight_decay=0.1),
    "adagrad": lambda params: Adagrad(params, lr=0.1),
    "adagrad-decay": lambda params: Adagrad(params, lr_decay=0.1, initial_accumulator_value=0.5, weight_decay=0.1),
    "adadelta": lambda params: Adadelta(params),
    "adadelta-decay": lambda params: Adadelta(params, lr=0.5, rho=0.8, eps=1e-4, weight_decay=0.1),
}
SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "step": lambda optimizer: StepLR(optimizer, 30, gamma=0.5),
    "exponential": lambda optimizer: ExponentialLR(optimizer, 0.97),
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, 250, eta_min=1e-3),
    "cosine-many-periods": lambda optimizer: CosineAnnealingLR(optimizer, 30, eta_min=1e-3),
    "one-cycle": lambda optimizer: OneCycleLR(optimizer, 0.1, total_steps=STEPS),
    "one-cycle-linear": lambda optimizer: OneCycleLR(
        optimizer, 0.1, total_steps=STEPS, anneal_strategy="linear", three_phase=True
    ),
    "one-cycle-without-momentum": lambda optimizer: OneCycleLR(
        optimizer, 0.1, total_steps=STEPS + 50, cycle_momentum=False
    ),
}


def initial_weights() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {name: random.normal(size=shape) for name, shape in SHAPES.items()}


def run_torch(
    make: MakeOptimizer,
    schedule: Callable[[Optimizer], Any] | None = None,
    *,
    clip: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> dict[str, np.ndarray]:
    """The weights after every step on ½‖w - target‖², with a target that moves."""
    params = {name: torch.tensor(w, dtype=dtype, requires_grad=True) for name, w in initial_weights().items()}
    optimizer = make(params.values())
    scheduler = schedule(optimizer) if schedule else None
    random, history = np.random.default_rng(1), []
    for _ in range(STEPS):
        for name, param in params.items():
            param.grad = (param - torch.tensor(random.normal(size=SHAPES[name]), dtype=dtype)).detach()
        if clip:
            torch.nn.utils.clip_grad_norm_(params.values(), clip)
        optimizer.step()
        if scheduler:
            scheduler.step()
        history.append({name: param.detach().numpy().copy() for name, param in params.items()})
    return {name: np.stack([weights[name] for weights in history]) for name in params}


def run_optax(transformation: optax.GradientTransformation) -> dict[str, jax.Array]:
    params = {name: jnp.array(weight) for name, weight in initial_weights().items()}
    random = np.random.default_rng(1)
    targets = [{name: random.normal(size=shape) for name, shape in SHAPES.items()} for _ in range(STEPS)]

    def step(carry, targets):
        params, state = carry
        updates, state = transformation.update(jax.tree.map(jnp.subtract, params, targets), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    stacked = jax.tree.map(lambda *leaves: jnp.array(leaves), *targets)
    return jax.jit(partial(jax.lax.scan, step))((params, transformation.init(params)), stacked)[1]


def translate(make: MakeOptimizer, schedule: Callable[[Optimizer], Any] | None = None) -> optax.GradientTransformation:
    optimizer = make([torch.zeros(1)])
    return parity.optimizer(optimizer, schedule(optimizer) if schedule else None)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_takes_torchs_steps(name):
    assert_float64_close(run_optax(translate(OPTIMIZERS[name])), run_torch(OPTIMIZERS[name]), tolerance=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("optimizer", ["sgd-momentum", "adamw"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler_takes_torchs_steps(name, optimizer):
    make, schedule = OPTIMIZERS[optimizer], SCHEDULERS[name]
    assert_float64_close(run_optax(translate(make, schedule)), run_torch(make, schedule), tolerance=1e-12)


MUTANTS = {
    "momentum without dampening": ("sgd-dampening", "sgd-momentum"),
    "plain momentum for nesterov": ("sgd-nesterov", "sgd-momentum"),
    "decoupled for L2": ("adam-l2", "adam-decoupled"),
    "centered": ("rmsprop-centered", "rmsprop"),
    "amsgrad": ("adam-amsgrad", "adam"),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", MUTANTS)
def test_other_optimizers_are_caught(name):
    right, wrong = (OPTIMIZERS[optimizer] for optimizer in MUTANTS[name])
    with pytest.raises(AssertionError):
        assert_float64_close(run_optax(translate(wrong)), run_torch(right), tolerance=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("adamw", optax.adamw(0.01)),  # weight decay 1e-4
        ("rmsprop", optax.rmsprop(0.01, decay=0.99)),  # eps inside the root
        ("adagrad", optax.adagrad(0.1)),  # starts from 0.1
        ("adam-l2", optax.adamw(0.01, b1=0.8, b2=0.95, eps=1e-3, weight_decay=0.1)),  # decoupled
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_optax_by_the_same_name_differs(name, theirs):
    """What the translation is for."""
    assert relative_l2(run_optax(theirs)["kernel"], run_torch(OPTIMIZERS[name])["kernel"]) > 1e-8


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
def test_clip_grad_norm_is_torchs(norm_type):
    def run(max_norm):
        gradients = {name: torch.tensor(weight, requires_grad=True) for name, weight in initial_weights().items()}
        for tensor in gradients.values():
            tensor.grad = tensor.detach().clone()
        torch.nn.utils.clip_grad_norm_(gradients.values(), max_norm, norm_type)
        clip = parity.clip_grad_norm(max_norm, norm_type)
        ours, _ = clip.update(jax.tree.map(jnp.array, initial_weights()), clip.init(None))
        return ours, {name: tensor.grad for name, tensor in gradients.items()}

    for max_norm in (0.5, 100.0):
        assert_float64_close(*run(max_norm))


@pytest.mark.usefixtures("x64")
def test_clipped_steps_are_torchs():
    make = OPTIMIZERS["adamw"]
    ours = run_optax(optax.chain(parity.clip_grad_norm(0.5), translate(make)))
    theirs = run_torch(make, clip=0.5)
    assert_float64_close(ours, theirs, tolerance=1e-12)
    assert relative_l2(ours["kernel"], run_torch(make)["kernel"]) > 1e-4


@pytest.mark.usefixtures("x64")
def test_schedule_goes_on_from_where_it_is_and_can_count_epochs():
    optimizer = SGD([torch.zeros(1)], lr=1.0)
    scheduler = ExponentialLR(optimizer, 0.5)
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    ours = parity.optimizer(optimizer, scheduler, steps_per_epoch=2)
    state, rates = ours.init(jnp.zeros([])), []
    for _ in range(5):
        update, state = ours.update(jnp.ones([]), state)
        rates.append(-float(update))
    assert rates == [0.125, 0.125, 0.0625, 0.0625, 0.03125]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("optimizer", ["sgd-momentum", "adamw"])
@pytest.mark.parametrize("epochs", [0, 29, 30])  # the cosine's minimum is at 30
@pytest.mark.parametrize("name", ["step", "exponential", "cosine", "cosine-many-periods", "one-cycle-long"])
def test_schedule_goes_on_from_a_rate_set_by_hand_and_after_another_scheduler(name, epochs, optimizer):
    schedulers = SCHEDULERS | {"one-cycle-long": lambda optimizer: OneCycleLR(optimizer, 0.1, total_steps=STEPS + 50)}

    def schedule(optimizer):
        StepLR(optimizer, 1000)
        optimizer.param_groups[0]["lr"] = 0.02
        scheduler = schedulers[name](optimizer)
        for _ in range(epochs):
            optimizer.step()
            scheduler.step()
        group = optimizer.param_groups[0]
        group |= {"lr": 0.3 * group["lr"]} | ({"momentum": 0.5} if "momentum" in group else {"betas": (0.5, 0.999)})
        return scheduler

    make = OPTIMIZERS[optimizer]
    ours = run_optax(translate(make, schedule))
    assert_float64_close(ours, run_torch(make, schedule), tolerance=1e-12)
    with pytest.raises(AssertionError):
        assert_float64_close(ours, run_torch(make, schedulers[name]), tolerance=1e-12)


def test_one_cycle_past_its_end_is_nan():
    optimizer = SGD([torch.zeros(1)], lr=1.0)
    ours = parity.optimizer(optimizer, OneCycleLR(optimizer, 1.0, total_steps=3, cycle_momentum=False))
    state, updates = ours.init(jnp.zeros([])), []
    for _ in range(5):
        update, state = ours.update(jnp.ones([]), state)
        updates.append(float(update))
    assert np.isnan(updates).tolist() == [False, False, False, False, True]


@pytest.mark.usefixtures("x64")
def test_param_groups_are_told_apart():
    def make(params):
        kernel, bias = params
        return AdamW([{"params": [kernel], "weight_decay": 0.5}, {"params": [bias], "lr": 0.1, "weight_decay": 0.0}])

    optimizer = make([torch.zeros(1), torch.zeros(1)])
    with pytest.raises(ValueError, match="param groups differ"):
        parity.optimizer(optimizer)
    ours = parity.optimizer(optimizer, groups={"kernel": 0, "bias": 1})
    assert_float64_close(run_optax(ours), run_torch(make), tolerance=1e-12)


def test_float32_bias_correction_keeps_its_digits(monkeypatch):
    """As near to float64 as PyTorch, whose corrections are Python floats; optax's 1 - βᵗ is float32."""
    monkeypatch.setitem(SHAPES, "kernel", (100, 100))  # of few weights the rounding that a CPU chooses would decide
    make, exact = OPTIMIZERS["adam"], run_torch(OPTIMIZERS["adam"])
    runs = {
        "torch": run_torch(make, dtype=torch.float32),
        "ours": run_optax(translate(make)),
        "optax": run_optax(optax.adam(0.01)),
    }
    errors = {name: max(map(relative_l2, run["kernel"], exact["kernel"])) for name, run in runs.items()}
    assert errors["ours"] < 1.2 * errors["torch"]
    assert errors["optax"] > 2 * errors["torch"]


def test_state_has_torchs_buffers_and_the_weights_dtype():
    ours = translate(OPTIMIZERS["rmsprop-centered"])
    params = {"w": jnp.ones(2, jnp.bfloat16)}
    updates, state = ours.update(params, ours.init(params), params)
    assert set(state.buffers) == {"square_avg", "grad_avg", "momentum_buffer"}
    assert {leaf.dtype for leaf in jax.tree.leaves((updates, state.buffers))} == {jnp.dtype(jnp.bfloat16)}


def test_what_has_no_translation_is_refused():
    params = [torch.zeros(1)]
    with pytest.raises(TypeError, match=r"RAdam has no translation, only SGD, Adam"):
        parity.optimizer(torch.optim.RAdam(params))
    optimizer = SGD(params)
    with pytest.raises(TypeError, match="LinearLR has no translation, only StepLR"):
        parity.optimizer(optimizer, LinearLR(optimizer))
    with pytest.raises(ValueError, match="belongs to another optimizer"):
        parity.optimizer(SGD(params), StepLR(optimizer, 1))
    with pytest.raises(ValueError, match="needs the parameters"):
        translate(OPTIMIZERS["adamw"]).update(jnp.ones(1), translate(OPTIMIZERS["adamw"]).init(jnp.ones(1)))


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "Adadelta"])
def test_optimizer_by_name_takes_the_steps_of_pytorchs_defaults(name, x64):
    random = np.random.default_rng(0)
    theirs = torch.tensor(random.normal(size=7), requires_grad=True)
    torch_optimizer = getattr(torch.optim, name)([theirs], lr=0.03)
    ours, translated = (optimizer_by_name(name, lr=0.03), parity.optimizer(torch_optimizer))
    results = []
    for transformation in (ours, translated):
        weights = jnp.array(theirs.detach().numpy())
        state = transformation.init(weights)
        for _ in range(5):
            updates, state = transformation.update(jnp.sin(weights), state, weights)
            weights = weights + updates
        results.append(weights)
    assert_identical(*results)


def test_optimizer_by_name_follows_a_schedule_and_refuses_what_there_is_not(x64):
    sgd = optimizer_by_name("SGD", lr=lambda count: 0.5**count)
    state = sgd.init(jnp.zeros(1))
    first, state = sgd.update(jnp.ones(1), state)
    second, _ = sgd.update(jnp.ones(1), state)
    assert (first.item(), second.item()) == (-1.0, -0.5)
    with pytest.raises(TypeError, match="no 'sgd', only SGD, Adam"):
        optimizer_by_name("sgd", lr=0.1)
    with pytest.raises(TypeError, match="Adam has no momentum"):
        optimizer_by_name("Adam", lr=0.1, momentum=0.9)


CYCLES: dict[str, dict[str, Any]] = {
    "defaults": {"total_steps": STEPS},
    "one step": {"total_steps": 1},
    "four steps": {"total_steps": 4},
    "linear": {"total_steps": 51, "anneal_strategy": "linear", "pct_start": 0.1},
    "three phases": {"total_steps": 51, "three_phase": True},
    "linear, three phases": {"total_steps": 50, "anneal_strategy": "linear", "three_phase": True, "pct_start": 0.45},
    "own numbers": {"total_steps": 20, "div_factor": 3.0, "final_div_factor": 7.0, "base_momentum": 0.2},
    "momentum's top": {"total_steps": 20, "max_momentum": 0.5, "base_momentum": 0.0},
    "no rise": {"total_steps": 20, "pct_start": 0.0},
    "no fall": {"total_steps": 20, "pct_start": 1.0},
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("options", CYCLES.values(), ids=CYCLES)
def test_one_cycle_has_torchs_rate_and_momentum_at_every_step(options):
    optimizer = SGD([torch.zeros(1)], lr=1.0, momentum=0.9)
    scheduler, theirs = OneCycleLR(optimizer, 0.3, **options), []
    for count in range(options["total_steps"]):
        theirs.append([optimizer.param_groups[0][name] for name in ("lr", "momentum")])
        optimizer.step()
        if count < options["total_steps"] - 1:
            scheduler.step()
    cycle = one_cycle(0.3, **options)
    ours = [[cycle.lr(count).item(), cycle.momentum(count).item()] for count in range(len(theirs))]
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    ends = [options["total_steps"] + 1, options["total_steps"] + 100]
    assert np.isnan([[cycle.lr(count), cycle.momentum(count)] for count in ends]).all()


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["sgd-momentum", "adamw", "rmsprop-centered"])
def test_one_cycle_by_name_takes_torchs_steps(name):
    cycle, options = one_cycle(0.1, STEPS), {}
    if name == "adamw":
        options["betas"] = (cycle.momentum, 0.999)
    else:
        options["momentum"] = cycle.momentum
    if name == "rmsprop-centered":
        options |= {"centered": True, "weight_decay": 0.1}
    kind = {"sgd-momentum": "SGD", "adamw": "AdamW", "rmsprop-centered": "RMSprop"}[name]
    ours = run_optax(optimizer_by_name(kind, lr=cycle.lr, **options))
    make = OPTIMIZERS[name]
    assert_float64_close(ours, run_torch(make, SCHEDULERS["one-cycle"]), tolerance=1e-12)
    still = run_optax(optimizer_by_name(kind, lr=cycle.lr, **({"momentum": 0.95} if kind != "AdamW" else {})))
    assert relative_l2(still["kernel"], ours["kernel"]) > 1e-6, "the momentum moves"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": 0}, "total_steps must be at least 1"),
        ({"total_steps": 9, "pct_start": 1.5}, r"pct_start in \[0, 1\]"),
        ({"total_steps": 10, "pct_start": 0.1}, "not 1 / total_steps, got 10 and 0.1"),
        ({"total_steps": 9, "anneal_strategy": "cosine"}, "one of cos, linear, got 'cosine'"),
    ],
)
def test_one_cycle_refuses_what_torch_refuses(options, message):
    optimizer = SGD([torch.zeros(1)], lr=1.0, momentum=0.9)
    with pytest.raises((ValueError, ZeroDivisionError)):
        OneCycleLR(optimizer, 0.3, **options)
    with pytest.raises(ValueError, match=message):
        one_cycle(0.3, **options)
