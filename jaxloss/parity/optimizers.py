"""PyTorch's optimizers and learning-rate schedulers as optax transformations that take the same steps."""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, no_type_check

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PyTree

if TYPE_CHECKING:  # not needed where there is no PyTorch object to translate
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

Options = Mapping[str, Any]  # one of PyTorch's param groups: hyperparameters by PyTorch's names
Buffers = dict[str, Any]
Rate = Callable[[Int[ArrayLike, ""]], Float[Array, ""]]  # of the number of updates made
Schedule = Callable[[Int[Array, ""]], dict[str, Any]]  # the options that change, then
Rule = Callable[[Array, Array, Buffers, Int[Array, ""], Options], tuple[Array, Buffers]]


class OptimizerState(NamedTuple):
    """State of `optimizer`'s transformation."""

    step: Int[Array, ""]  # updates so far
    buffers: dict[
        str, PyTree
    ]  # by the names of PyTorch's state ("exp_avg", "momentum_buffer", …), each like the params


def optimizer(
    torch_optimizer: "Optimizer",
    scheduler: "LRScheduler | None" = None,
    *,
    steps_per_epoch: int = 1,
    groups: PyTree[int] | None = None,
) -> optax.GradientTransformation:
    """Returns the optax transformation that takes the steps of a PyTorch optimizer.

    Every option is read from the optimizer's param groups: SGD (momentum, dampening, nesterov), Adam (weight_decay is
    L2), AdamW (decoupled), RMSprop (centered, momentum), Adagrad and Adadelta, with `amsgrad`, `maximize` and
    `weight_decay`. Optax's functions of the same names have other defaults and in places other formulas. Adam's bias
    correction 1 - βᵗ keeps its digits in float32, where optax subtracts two numbers near 1.

    Args:
        torch_optimizer: read now, and neither kept nor changed. Its moments are not taken over: the state starts
            fresh.
        scheduler: StepLR, ExponentialLR, CosineAnnealingLR or OneCycleLR of this optimizer, as if
            `scheduler.step()` followed every `optimizer.step()`. It goes on from where it is, and from the rate
            that the optimizer has now, even one that was set by hand, as PyTorch does. OneCycleLR moves the momentum,
            or Adam's first beta, as well.
        steps_per_epoch: updates between two calls of `scheduler.step()`: 1 for a schedule over batches, the number of
            batches for one over epochs.
        groups: for an optimizer with several param groups that differ: the index of each parameter's group, as a
            pytree of integers like the params or a prefix of them.

    Returns:
        The transformation. `update` needs `params` where there is weight decay. Its state names its buffers as
        PyTorch does. Past the end of OneCycleLR, where PyTorch raises, the updates are NaN.

    Raises:
        TypeError: an optimizer or scheduler of another kind.
        ValueError: the scheduler belongs to another optimizer; param groups differ and `groups` is not given.

    Examples:
        >>> import jax.numpy as jnp, torch
        >>> from jaxloss import parity
        >>> sgd = torch.optim.SGD([torch.zeros(1)], lr=0.5, momentum=0.9)
        >>> ours = parity.optimizer(sgd)
        >>> state = ours.init(jnp.zeros(1))
        >>> updates, state = ours.update(jnp.ones(1), state)
        >>> updates, state = ours.update(jnp.ones(1), state)
        >>> updates
        Array([-0.95], dtype=float32)

    References:
        https://docs.pytorch.org/docs/stable/optim.html
    """
    name = _translated(torch_optimizer, "torch.optim", _OPTIMIZERS)
    if scheduler is not None and scheduler.optimizer is not torch_optimizer:
        raise ValueError("optimizer: the scheduler belongs to another optimizer; pass the one that it was made with.")
    transformations: dict[Hashable, optax.GradientTransformation] = {
        index: _transformation(name, _options(group), _schedule(scheduler, index, steps_per_epoch))
        for index, group in enumerate(torch_optimizer.param_groups)
    }
    if groups is not None:
        return optax.partition(transformations, groups)
    if any(_options(group) != _options(torch_optimizer.param_groups[0]) for group in torch_optimizer.param_groups):
        raise ValueError(
            "optimizer: the param groups differ, so it must be known which parameter is in which: pass groups=, a "
            "pytree of group indices like the params."
        )
    return transformations[0]


@no_type_check
def optimizer_by_name(
    name: str, *, lr: float | Callable[[Int[Array, ""]], Float[ArrayLike, ""]], **options: Any
) -> optax.GradientTransformation:
    """Returns what `optimizer` gives for a PyTorch optimizer of this name, without PyTorch.

    Args:
        name: "SGD", "Adam", "AdamW", "RMSprop", "Adagrad" or "Adadelta".
        lr: learning rate, or a function of the number of updates made.
        options: PyTorch's keyword arguments; the others have PyTorch's defaults. A number may again be a function,
            but for Adagrad's `initial_accumulator_value`: `momentum=cycle.momentum` or `betas=(cycle.momentum, 0.999)`
            with the `cycle` of `one_cycle`.

    Returns:
        The transformation. `update` needs `params` where there is weight decay: AdamW has some by default.

    Raises:
        TypeError: there is no such optimizer, or it has no such option.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jaxloss import parity
        >>> adam = parity.optimizer_by_name("Adam", lr=0.5)
        >>> adam.update(jnp.array([5.0]), adam.init(jnp.zeros(1)))[0].round(2)
        Array([-0.5], dtype=float32)

    References:
        https://docs.pytorch.org/docs/stable/optim.html
    """
    if name not in _OPTIMIZERS:
        raise TypeError(f"optimizer_by_name: there is no {name!r}, only {', '.join(_OPTIMIZERS)}.")
    defaults = {**_COMMON_DEFAULTS, **_DEFAULTS[name]}
    if unknown := options.keys() - defaults.keys():
        raise TypeError(f"optimizer_by_name: {name} has no {', '.join(sorted(unknown))}.")
    values = {**defaults, **options, "lr": lr}
    moving = {key: value for key, value in values.items() if any(map(callable, jax.tree.leaves(value)))}
    return _transformation(name, values, _following(moving))


class OneCycle(NamedTuple):
    """PyTorch's OneCycleLR: two functions of the number of updates made."""

    lr: Rate
    momentum: Rate  # for SGD's momentum or Adam's first beta


@no_type_check
def one_cycle(
    max_lr: float,
    total_steps: int,
    *,
    pct_start: float = 0.3,
    anneal_strategy: Literal["cos", "linear"] = "cos",
    base_momentum: float = 0.85,
    max_momentum: float = 0.95,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
    three_phase: bool = False,
) -> OneCycle:
    """Returns PyTorch's OneCycleLR for `optimizer_by_name`, without PyTorch.

    The rate rises from max_lr / div_factor to max_lr and falls to max_lr / div_factor / final_div_factor, while the
    momentum falls and rises. Leave the momentum alone for `cycle_momentum=False`.

    Args:
        max_lr: the highest learning rate.
        total_steps: updates in the whole training, at least 1.
        pct_start: the fraction of them, in [0, 1], in which the rate rises.
        anneal_strategy: "cos" or "linear".
        base_momentum: the lowest momentum, at the highest rate.
        max_momentum: the momentum at the start and at the end.
        div_factor: max_lr over the first rate.
        final_div_factor: the first rate over the last one.
        three_phase: fall to the first rate as fast as the rate rose, and to the last one after that.

    Returns:
        The functions `lr` and `momentum`, with scalar values. Past count `total_steps`, where PyTorch raises, both
        are NaN.

    Raises:
        ValueError: an argument outside its range; or pct_start · total_steps is 1, so that the rise has no length
            (PyTorch divides by zero).

    Examples:
        >>> from jaxloss import parity
        >>> cycle = parity.one_cycle(0.1, total_steps=100)
        >>> [round(float(cycle.lr(count)), 6) for count in (0, 29, 99)]
        [0.004, 0.1, 0.0]
        >>> sgd = parity.optimizer_by_name("SGD", lr=cycle.lr, momentum=cycle.momentum)

    References:
        https://docs.pytorch.org/docs/stable/generated/torch.optim.lr_scheduler.OneCycleLR.html
    """
    if anneal_strategy not in _ANNEALS:
        raise ValueError(f"one_cycle: anneal_strategy must be one of {', '.join(_ANNEALS)}, got {anneal_strategy!r}.")
    if total_steps < 1 or not 0 <= pct_start <= 1 or pct_start * total_steps == 1:
        raise ValueError(
            "one_cycle: total_steps must be at least 1, and pct_start in [0, 1] and not 1 / total_steps, got "
            f"{total_steps} and {pct_start}."
        )
    first, rise, last = max_lr / div_factor, pct_start * total_steps - 1, total_steps - 1.0
    ends, rates, momenta = [rise, last], [first, max_lr, first / final_div_factor], [max_momentum, base_momentum]
    if three_phase:
        ends, rates = [rise, 2 * rise, last], [first, max_lr, first, first / final_div_factor]
    momenta += [max_momentum] * (len(ends) - 1)
    anneal = _ANNEALS[anneal_strategy]
    return OneCycle(_annealed(ends, rates, anneal), _annealed(ends, momenta, anneal))


def clip_grad_norm(max_norm: float, norm_type: float = 2.0) -> optax.GradientTransformation:
    """Returns PyTorch's `clip_grad_norm_` as an optax transformation, to be chained before the optimizer.

    All gradients are multiplied by min(1, max_norm / (norm + 1e-6)), the norm being that of all of them together.
    `optax.clip_by_global_norm` leaves out the 1e-6.

    Args:
        max_norm: the largest norm that is let through.
        norm_type: the p of the p-norm; `math.inf` for the largest absolute value.

    Returns:
        A transformation without state. A norm that is not finite is passed on, as with PyTorch's default
        `error_if_nonfinite=False`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jaxloss import parity
        >>> clip = parity.clip_grad_norm(1.0)
        >>> clip.update(jnp.array([3.0, 4.0]), clip.init(None))[0].round(3)
        Array([0.6, 0.8], dtype=float32)

    References:
        `PyTorch's page <https://docs.pytorch.org/docs/stable/generated/torch.nn.utils.clip_grad_norm_.html>`__
    """

    def clip(gradients: PyTree) -> PyTree:
        norms = [jnp.linalg.norm(jnp.ravel(leaf), norm_type) for leaf in jax.tree.leaves(gradients)]
        factor = jnp.minimum(1.0, max_norm / (jnp.linalg.norm(jnp.stack(norms), norm_type) + 1e-6))
        return jax.tree.map(lambda leaf: leaf * factor.astype(leaf.dtype), gradients)

    return optax.stateless(lambda gradients, _: clip(gradients))


def _transformation(name: str, options: Options, schedule: Schedule) -> optax.GradientTransformation:
    rule, buffers = _OPTIMIZERS[name]

    def init(params: PyTree) -> OptimizerState:
        fill = options.get("initial_accumulator_value", 0.0)
        return OptimizerState(
            jnp.zeros([], jnp.int32),
            {name: jax.tree.map(lambda leaf: jnp.full_like(leaf, fill), params) for name in buffers(options)},
        )

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, OptimizerState]:
        if params is None and options["weight_decay"]:
            raise ValueError("optimizer: weight decay needs the parameters: update(gradients, state, params).")
        gradients, structure = jax.tree.flatten(updates)
        weights = structure.flatten_up_to(updates if params is None else params)
        buffers = {name: structure.flatten_up_to(tree) for name, tree in state.buffers.items()}
        now, step = {**options, **schedule(state.step)}, state.step + 1
        steps, changed = [], []
        for i, (gradient, weight) in enumerate(zip(gradients, weights, strict=True)):
            own = {name: leaves[i] for name, leaves in buffers.items()}
            change, own = _step(rule, gradient, weight, own, step, now)
            steps.append(change)
            changed.append(own)
        trees = {name: structure.unflatten([own[name] for own in changed]) for name in buffers}
        return structure.unflatten(steps), OptimizerState(step, trees)

    return optax.GradientTransformation(init, update)


def _step(
    rule: Rule, gradient: Array, weight: Array, buffers: Buffers, step: Int[Array, ""], options: Options
) -> tuple[Array, Buffers]:
    """What is added to one weight, and its new buffers, in its dtype."""
    gradient = -gradient if options["maximize"] else gradient
    decay = options["weight_decay"]
    decays = not isinstance(decay, int | float) or decay != 0
    if decays and not options.get("decoupled_weight_decay"):
        gradient = gradient + decay * weight
    update, buffers = rule(gradient, weight, buffers, step, options)
    if decays and options.get("decoupled_weight_decay"):
        update = update - options["lr"] * decay * weight
    return update.astype(weight.dtype), {name: new.astype(weight.dtype) for name, new in buffers.items()}


def _sgd(gradient: Array, weight: Array, buffers: Buffers, step: Array, options: Options) -> tuple[Array, Buffers]:
    if not buffers:
        return -options["lr"] * gradient, {}
    momentum = options["momentum"]
    # The first buffer is the gradient itself, whatever the dampening.
    kept = jnp.where(step == 1, 0.0, options["dampening"])
    buffer = momentum * buffers["momentum_buffer"] + (1 - kept) * gradient
    direction = gradient + momentum * buffer if options["nesterov"] else buffer
    return -options["lr"] * direction, {"momentum_buffer": buffer}


def _adam(gradient: Array, weight: Array, buffers: Buffers, step: Array, options: Options) -> tuple[Array, Buffers]:
    beta1, beta2 = options["betas"]
    mean = buffers["exp_avg"] + (1 - beta1) * (gradient - buffers["exp_avg"])
    square = beta2 * buffers["exp_avg_sq"] + (1 - beta2) * gradient * gradient
    new = {"exp_avg": mean, "exp_avg_sq": square}
    if "max_exp_avg_sq" in buffers:
        new["max_exp_avg_sq"] = square = jnp.maximum(buffers["max_exp_avg_sq"], square)
    scale = jnp.sqrt(square) / jnp.sqrt(_one_minus_power(beta2, step)) + options["eps"]
    return -options["lr"] / _one_minus_power(beta1, step) * mean / scale, new


def _rmsprop(gradient: Array, weight: Array, buffers: Buffers, step: Array, options: Options) -> tuple[Array, Buffers]:
    alpha = options["alpha"]
    square = alpha * buffers["square_avg"] + (1 - alpha) * gradient * gradient
    new = {"square_avg": square}
    if "grad_avg" in buffers:
        new["grad_avg"] = mean = buffers["grad_avg"] + (1 - alpha) * (gradient - buffers["grad_avg"])
        square = square - mean * mean
    direction = gradient / (jnp.sqrt(square) + options["eps"])
    if "momentum_buffer" in buffers:
        new["momentum_buffer"] = direction = options["momentum"] * buffers["momentum_buffer"] + direction
    return -options["lr"] * direction, new


def _adagrad(gradient: Array, weight: Array, buffers: Buffers, step: Array, options: Options) -> tuple[Array, Buffers]:
    total = buffers["sum"] + gradient * gradient
    rate = options["lr"] / (1 + (step - 1) * options["lr_decay"])
    return -rate * gradient / (jnp.sqrt(total) + options["eps"]), {"sum": total}


def _adadelta(gradient: Array, weight: Array, buffers: Buffers, step: Array, options: Options) -> tuple[Array, Buffers]:
    rho, eps = options["rho"], options["eps"]
    square = rho * buffers["square_avg"] + (1 - rho) * gradient * gradient
    delta = jnp.sqrt(buffers["acc_delta"] + eps) / jnp.sqrt(square + eps) * gradient
    return -options["lr"] * delta, {
        "square_avg": square,
        "acc_delta": rho * buffers["acc_delta"] + (1 - rho) * delta * delta,
    }


def _adam_buffers(options: Options) -> list[str]:
    return ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if options["amsgrad"] else [])]


def _rmsprop_buffers(options: Options) -> list[str]:
    optional = {"grad_avg": options["centered"], "momentum_buffer": options["momentum"]}
    return ["square_avg", *(name for name, used in optional.items() if used)]


_OPTIMIZERS: dict[str, tuple[Rule, Callable[[Options], list[str]]]] = {
    "SGD": (_sgd, lambda options: ["momentum_buffer"] if options["momentum"] else []),
    "Adam": (_adam, _adam_buffers),
    "AdamW": (_adam, _adam_buffers),
    "RMSprop": (_rmsprop, _rmsprop_buffers),
    "Adagrad": (_adagrad, lambda options: ["sum"]),
    "Adadelta": (_adadelta, lambda options: ["square_avg", "acc_delta"]),
}
_ADAM = {"betas": (0.9, 0.999), "eps": 1e-8, "amsgrad": False}
_COMMON_DEFAULTS = {"weight_decay": 0.0, "maximize": False}
_DEFAULTS: dict[str, dict[str, Any]] = {  # a test holds them against PyTorch's
    "SGD": {"momentum": 0.0, "dampening": 0.0, "nesterov": False},
    "Adam": {**_ADAM, "decoupled_weight_decay": False},
    "AdamW": {**_ADAM, "decoupled_weight_decay": True, "weight_decay": 1e-2},
    "RMSprop": {"alpha": 0.99, "eps": 1e-8, "momentum": 0.0, "centered": False},
    "Adagrad": {"lr_decay": 0.0, "initial_accumulator_value": 0.0, "eps": 1e-10},
    "Adadelta": {"rho": 0.9, "eps": 1e-6},
}


def _translated(thing: object, module: str, known: Mapping[str, Any]) -> str:
    """The name of a PyTorch object's class, if it is one of those known and no subclass of it."""
    kind = type(thing)
    if kind.__name__ not in known or not kind.__module__.startswith(module):
        raise TypeError(f"optimizer: {kind.__name__} has no translation, only {', '.join(known)}.")
    return kind.__name__


def _one_minus_power(beta: float | Array, step: Int[Array, ""]) -> Float[Array, ""]:
    """1 - betaᵗ, without the cancellation that costs float32 four digits at beta 0.999."""
    if isinstance(beta, jax.Array):
        return -jnp.expm1(step * jnp.log(beta))
    return -jnp.expm1(step * (math.log(beta) if beta else -math.inf))


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    """The hyperparameters of a param group, as Python numbers."""

    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(plain(item) for item in value)
        return value.item() if hasattr(value, "item") else value  # a tensor

    return {name: plain(value) for name, value in group.items() if name not in ("params", "param_names")}


def _schedule(scheduler: "LRScheduler | None", index: int, steps_per_epoch: int) -> Schedule:
    """The options of a param group that change, as a function of the number of updates made."""
    if scheduler is None:
        return lambda count: {}
    name = _translated(scheduler, "torch.optim.lr_scheduler", _SCHEDULERS)
    group = {**scheduler.optimizer.param_groups[index], "base_lr": scheduler.base_lrs[index]}
    changing = _SCHEDULERS[name](scheduler, _options(group))
    start = scheduler.last_epoch
    return lambda count: changing(start + count // steps_per_epoch)


def _step_lr(scheduler: Any, group: Options) -> Schedule:
    now, gamma, size, start = group["lr"], scheduler.gamma, scheduler.step_size, scheduler.last_epoch
    return lambda epoch: {"lr": now * gamma ** (epoch // size - start // size)}


def _exponential_lr(scheduler: Any, group: Options) -> Schedule:
    now, gamma, start = group["lr"], scheduler.gamma, scheduler.last_epoch
    return lambda epoch: {"lr": now * gamma ** (epoch - start)}


def _cosine_annealing_lr(scheduler: Any, group: Options) -> Schedule:
    """Like PyTorch, multiplies the present rate up to the next minimum, and adds the base rate's curve to it there."""
    least, period, start = scheduler.eta_min, scheduler.T_max, scheduler.last_epoch
    now, base = group["lr"] - least, group["base_lr"] - least
    minimum = start + (period - start) % (2 * period)
    if start < minimum:
        height = now / math.cos(math.pi * start / period / 2) ** 2
    else:
        height, minimum = base + now / math.sin(math.pi / period / 2) ** 2, start + 2 * period

    def rate(epoch: Int[ArrayLike, ""]) -> Float[Array, ""]:
        return least + jnp.where(epoch <= minimum, height, base) * (1 + jnp.cos(math.pi * epoch / period)) / 2

    return _following({"lr": _from(start, group["lr"], rate)})


def _one_cycle_lr(scheduler: Any, group: Options) -> Schedule:
    phases = scheduler._schedule_phases  # PyTorch keeps the three_phase option nowhere else
    ends = [float(phase["end_step"]) for phase in phases]

    def along(what: str, now: float) -> Rate:
        names = [phases[0][f"start_{what}"], *(phase[f"end_{what}"] for phase in phases)]
        rate = _annealed(ends, [float(group[name]) for name in names], _ANNEALS[scheduler._anneal_func_type])
        return _from(scheduler.last_epoch, now, rate)

    moving: dict[str, Any] = {"lr": along("lr", group["lr"])}
    if scheduler.cycle_momentum and scheduler.use_beta1:
        beta1, beta2 = group["betas"]
        moving["betas"] = (along("momentum", beta1), beta2)
    elif scheduler.cycle_momentum:
        moving["momentum"] = along("momentum", group["momentum"])
    return _following(moving)


def _from(start: int, now: float, rate: Rate) -> Rate:
    """What an optimizer has now, up to the next step of its scheduler."""
    return lambda epoch: jnp.where(epoch == start, now, rate(epoch))


def _following(moving: Options) -> Schedule:
    """Calls what is a function in the options, or in a tuple among them, with the number of updates made."""
    return lambda count: jax.tree.map(lambda value: value(count) if callable(value) else value, dict(moving))


def _annealed(ends: Sequence[float], values: Sequence[float], anneal: Callable[[float, float, Array], Array]) -> Rate:
    """From each value to the next one, one phase each, between the counts that end them; NaN past the last one."""

    def at(count: Int[ArrayLike, ""]) -> Float[Array, ""]:
        count = jnp.asarray(count)
        start, value = 0.0, jnp.nan
        for i, end in enumerate(ends):
            here = anneal(values[i], values[i + 1], (count - start) / (end - start))
            value = here if i == 0 else jnp.where(count <= start, value, here)
            start = end
        return jnp.where(count > ends[-1] + 1, jnp.nan, value)

    return at


def _anneal_cosine(start: float, end: float, part: Array) -> Array:
    return end + (start - end) / 2 * (1 + jnp.cos(math.pi * part))


def _anneal_linear(start: float, end: float, part: Array) -> Array:
    return start + (end - start) * part


_ANNEALS = {"cos": _anneal_cosine, "linear": _anneal_linear}
_SCHEDULERS: dict[str, Callable[[Any, Options], Schedule]] = {
    "StepLR": _step_lr,
    "ExponentialLR": _exponential_lr,
    "CosineAnnealingLR": _cosine_annealing_lr,
    "OneCycleLR": _one_cycle_lr,
}
