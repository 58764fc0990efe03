"""What ports do otherwise between layers: where they add, multiply, join, mask, resize or attend to tensors."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from jaxloss.parity._change import Change, Rule

EPSILONS = 1e-6, 1e-5, 1e-3, 0.0, 1e-8, 1e-12  # the commonest first: of large numbers several do
AROUND_SUMS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}


def of_terms(activation: str) -> list[str]:
    """That it is applied to a term in the port: a change to the sum, and to the activation after it."""
    return [f"the port applies {activation} to a sum's {term} term, PyTorch to the sum" for term in ("first", "second")]


def _sum(function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Change]:
    a, b = args[:2]
    if isinstance(b, float) and 0 < b <= max(EPSILONS):
        for other in (epsilon for epsilon in EPSILONS if epsilon != b):
            meaning = f"the port adds {f'an epsilon of {other:g}' if other else 'no epsilon'}, PyTorch one of {b:g}"
            yield Change(meaning, f"pass epsilon={b:g}", lambda other=other: a + other)
    for kept in (a, b):
        if isinstance(kept, Tensor):
            yield Change(
                "one of two summands is missing (a residual connection?)",
                "add both",
                lambda kept=kept: kept.expand_as(a + b),
            )
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        yield Change("the port subtracts what PyTorch adds", "add", lambda: a - b)
        for name, apply in AROUND_SUMS.items():
            first, second = of_terms(name)
            yield Change(first, f"apply {name} to the sum", lambda f=apply: f(a) + b, together=True)
            yield Change(second, f"apply {name} to the sum", lambda f=apply: a + f(b), together=True)


def _difference(function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Change]:
    yield Change("the port adds what PyTorch subtracts", "subtract", lambda: args[0] + args[1])
    yield Change("a difference is taken the other way round", "swap its terms", lambda: -function(*args, **kwargs))


def _negative(function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Change]:
    yield Change("a minus sign is missing", "negate as PyTorch does", lambda: args[0].clone())


def _factor(function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Change]:
    x, factor = args[:2]
    if not isinstance(x, Tensor):
        return
    divides = "div" in function.__name__
    if isinstance(factor, Tensor) and factor.ndim:
        meaning = f"a {'division' if divides else 'factor'} is missing (a gate, or a layer's scale?)"
        shape = torch.broadcast_shapes(x.shape, factor.shape)
        for kept in (x,) if divides else (x, factor):
            yield Change(meaning, "apply it as PyTorch does", lambda kept=kept: kept.expand(shape).clone())
        return
    words, fix = f"a {'division by' if divides else 'factor of'} {float(factor):.4g} is", "scale as PyTorch does"
    yield Change(f"{words} missing (attention's 1/sqrt(d)?)", fix, lambda: x.clone())
    yield Change(f"{words} applied twice (1/d for 1/sqrt(d)?)", fix, lambda: function(function(x, factor), factor))


def _product(function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Change]:
    a, b = args[:2]
    if min(a.ndim, b.ndim) > 1 and a.shape[-2] == b.shape[-1]:
        meaning = "a matrix product is the transpose of PyTorch's (queries and keys swapped?)"
        yield Change(meaning, "swap its operands", lambda: function(*args, **kwargs).transpose(-1, -2))
    meaning = f"the port divides a product by sqrt({a.shape[-1]}) once more than PyTorch (attention's 1/sqrt(d)?)"
    yield Change(meaning, "scale as PyTorch does", lambda: function(*args, **kwargs) / a.shape[-1] ** 0.5)


def _joined(function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Change]:
    given = dict(zip(("tensors", "dim"), args, strict=False)) | kwargs
    other = given | {"tensors": list(reversed(given["tensors"]))}
    meaning, fix = "the port concatenates in the reverse order", "concatenate in PyTorch's order"
    yield Change(meaning, fix, lambda: function(**other))


def _gated(function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Change]:
    given = dict(zip(("input", "dim"), args, strict=False)) | kwargs

    def swapped() -> Tensor:
        gate, x = given["input"].chunk(2, given.get("dim", -1))
        return x * gate.sigmoid()

    yield Change("the port gates by the first half, PyTorch by the second", "swap the halves", swapped)


def _repeated(function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Change]:
    given = dict(zip(("input", "repeats", "dim"), args, strict=False)) | kwargs
    x, repeats, dim = (given.get(name) for name in ("input", "repeats", "dim"))
    if isinstance(x, Tensor) and isinstance(repeats, int) and isinstance(dim, int):
        meaning = "the port repeats all together, PyTorch each by itself (grouped heads?)"
        yield Change(meaning, "use jnp.repeat, not jnp.tile", lambda: torch.cat([x] * repeats, dim))


def _mean(function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Change]:
    for name, other in {"sum": torch.sum, "maximum": torch.amax}.items():
        yield Change(
            f"the port takes the {name}, PyTorch the mean", "take the mean", lambda f=other: f(*args, **kwargs)
        )
    given = dict(zip(("input", "dim", "keepdim"), args, strict=False)) | kwargs
    if isinstance(axis := given.get("dim"), int) and not given.get("keepdim"):
        for name, index in ENDS.items():
            meaning = f"the port takes the {name} element, PyTorch the mean (a class token?)"
            yield Change(meaning, "take the mean", lambda index=index: given["input"].select(axis, index))


ENDS = {"first": 0, "last": -1}


def _element(function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Change]:
    """One element along an axis that is not the batch's."""
    x, index = args
    entries = index if isinstance(index, tuple) else (index,)
    axes = [axis for axis, entry in enumerate(entries) if isinstance(entry, int)]
    if not all(isinstance(entry, (int, slice)) for entry in entries) or len(axes) != 1 or axes == [0]:
        return
    (axis,) = axes

    def along(entry: Any) -> Tensor:
        return x[(*entries[:axis], entry, *entries[axis + 1 :])]

    fix = f"take element {entries[axis]}"
    meaning = f"the port takes the mean, PyTorch element {entries[axis]} (a class token?)"
    yield Change(meaning, fix, lambda: along(slice(None)).mean(axis))
    for name, end in ENDS.items():
        meaning = f"the port takes the {name} element, PyTorch element {entries[axis]}"
        yield Change(meaning, fix, lambda end=end: along(end))


def _flatten(function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Change]:
    x = args[0]
    if isinstance(x, Tensor) and x.ndim > 2:
        fix = "transpose to (channels, height, width) first, or permute the next kernel's rows (flatten=)"
        yield Change(
            "the port flattens (height, width, channels), PyTorch (channels, height, width)",
            fix,
            lambda: function(x.movedim(1, -1).contiguous(), *args[1:], **kwargs),
        )


def _transposed(function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Change]:
    meaning = "a transposition is missing (heads merged before they are moved?)"
    yield Change(meaning, "transpose as PyTorch does", lambda: args[0].contiguous())


def _spread(function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Change]:
    x, *rest = args
    axis, keep = kwargs.get("dim", rest[0] if rest else None), kwargs.get("keepdim", False)
    for correction in (0, 1):
        word = "unbiased (divided by n - 1)" if correction else "biased (divided by n)"
        yield Change(
            f"the port's {function.__name__} is {word}",
            f"pass ddof={1 - correction}",
            lambda c=correction: function(x, dim=axis, correction=c, keepdim=keep),
        )


def _masked(function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Change]:
    masked = next((arg for arg in args if isinstance(arg, Tensor) and arg.dtype is not torch.bool), args[0])

    def inverted() -> Tensor:
        if function.__name__.strip("_") in ("tril", "triu"):
            kept = function(torch.ones_like(args[0], dtype=torch.bool), *args[1:], **kwargs)
            return args[0].masked_fill(kept, 0)
        return function(*map(_inverted, args), **{name: _inverted(value) for name, value in kwargs.items()})

    yield Change("the port leaves out a mask", "mask as PyTorch does", lambda: masked.clone())
    yield Change("the port's mask is the inverse of PyTorch's", "invert the mask", inverted)


def _inverted(value: Any) -> Any:
    return ~value if isinstance(value, Tensor) and value.dtype is torch.bool else value


def _filled(function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Change]:
    yield from _masked(function, args, kwargs)
    given = dict(zip(("input", "mask", "value"), args, strict=False)) | kwargs
    if float(given["value"]) < 0:  # of scores, before a softmax
        meaning = f"the port fills masked places with 0, PyTorch with {float(given['value']):g}"
        yield Change(meaning, "fill with -jnp.inf", lambda: given["input"].masked_fill(given["mask"], 0.0))


def _attention(function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Change]:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = dict(zip(names, args, strict=False)) | kwargs
    query, key, mask, causal = given["query"], given["key"], given.get("attn_mask"), given.get("is_causal", False)

    def again(**other: Any) -> Callable[[], Tensor]:
        return lambda: function(**{**given, **other})

    yield Change(
        "the port attends to later positions" if causal else "the port masks later positions",
        f"{'mask' if causal else 'do not mask'} later positions",
        again(is_causal=not causal),
    )
    if causal:
        kept = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool)
        for other, meaning in {
            kept.triu(): "the port masks earlier positions, PyTorch later ones",
            kept.tril(1): "the port lets each position see the next",
        }.items():
            yield Change(meaning, "keep jnp.tri(length)", again(is_causal=False, attn_mask=other))
    fix = "divide the scores by sqrt(d)"
    yield Change("the port does not divide the scores by sqrt(d)", fix, again(scale=1.0))
    yield Change("the port divides the scores by d, PyTorch by sqrt(d)", fix, again(scale=1 / query.shape[-1]))
    yield Change("the port swaps queries and keys", "pass queries first", again(query=key, key=query))
    yield Change("the port leaves out the attention mask", "pass the mask", again(attn_mask=None))
    meaning = "the port's attention mask is the inverse of PyTorch's"
    yield Change(meaning, "invert the mask", again(attn_mask=_inverted(mask)))


def _resized(function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Change]:
    names = ("input", "size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias")
    given = dict(zip(names, args, strict=False)) | kwargs
    mode, corners = given.get("mode", "nearest"), bool(given.get("align_corners"))
    smooth = given.get("antialias", False)

    def again(**other: Any) -> Callable[[], Tensor]:
        return lambda: function(**{**given, **other})

    if "nearest" in mode:
        exact = mode == "nearest-exact"
        each = "the pixel at or before each place", "the pixel nearest to its centre"
        ours, theirs = each if exact else each[::-1]
        fix = "use jax.image.resize" if exact else "index with jnp.arange(new) * old // new, not with jax.image.resize"
        other = again(mode="nearest" if exact else "nearest-exact")
        yield Change(f"the port takes {ours}, PyTorch {theirs}", fix, other)
    else:
        each = "the edges of the image", "the centres of its outer pixels"
        ours, theirs = each if corners else each[::-1]
        fix = "interpolate at jnp.linspace(0, old - 1, new)" if corners else "use jax.image.resize"
        meaning = f"the port lines up {ours}, PyTorch {theirs} (align_corners={corners})"
        yield Change(meaning, fix, again(align_corners=not corners))
        meaning = f"the port {'does not smooth' if smooth else 'smooths'} before it shrinks"
        yield Change(meaning, f"pass antialias={smooth} to jax.image.resize", again(antialias=not smooth))
    for other in ("nearest", "bilinear", "bicubic"):
        if other not in mode:
            options = {"align_corners": None, "antialias": False} if other == "nearest" else {"align_corners": corners}
            meaning, fix = f"the port interpolates by {other}, PyTorch by {mode}", f"interpolate by {mode}"
            yield Change(meaning, fix, again(mode=other, **options))


def _of_operands(rule: Rule) -> Rule:
    """The rule, for calls that name operands too, as `torch.bmm(a, mat2=b)` does."""

    def positional(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Change]:
        named = [kwargs[name] for name in ("input", "other", "mat2") if name in kwargs]
        others = {name: value for name, value in kwargs.items() if name not in ("input", "other", "mat2")}
        return rule(function, (*args, *named), others)

    return positional


BETWEEN_LAYERS: dict[str, Rule] = {
    **dict.fromkeys(("add", "iadd", "radd"), _of_operands(_sum)),
    **dict.fromkeys(("sub", "isub", "rsub"), _of_operands(_difference)),
    "neg": _of_operands(_negative),
    **dict.fromkeys(("mul", "imul", "rmul", "div", "truediv", "true_divide"), _of_operands(_factor)),
    **dict.fromkeys(("matmul", "bmm"), _of_operands(_product)),
    **dict.fromkeys(("cat", "concat", "concatenate"), _joined),
    "glu": _gated,
    "repeat_interleave": _repeated,
    "mean": _mean,
    "getitem": _element,
    **dict.fromkeys(("flatten", "view", "reshape"), _flatten),
    **dict.fromkeys(("transpose", "swapaxes", "permute"), _transposed),
    **dict.fromkeys(("std", "var"), _spread),
    "masked_fill": _filled,
    **dict.fromkeys(("where", "tril", "triu"), _masked),
    "scaled_dot_product_attention": _attention,
    "interpolate": _resized,
}
