"""What ports do otherwise to rotary positions: which channels they turn together, and which way.

PyTorch code takes the channels apart, turns them, and joins them again, in one of several forms. A port that pairs
other channels does all of that otherwise: these changes mean the same, and are done together.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from jaxloss.parity._change import Change, Rule

HALVES, NEIGHBOURS = "one half of the channels with the other", "neighbouring channels together"
TURNS = "the port turns {}, PyTorch {} (rotary positions?)"
MIXED = "the port turns {}, by angles laid out for turning {} (rotary positions?)"
BACKWARDS = "the port turns by the negative angles (rotary positions?)"


def to_neighbours(x: Tensor) -> Tensor:
    """The halves of the channels, interleaved."""
    return torch.stack(x.chunk(2, -1), -1).flatten(-2)


def to_halves(x: Tensor) -> Tensor:
    """The reverse."""
    return torch.cat((x[..., ::2], x[..., 1::2]), -1)


def _of_halves(result: Callable[[], Any], *, angles: bool = False) -> Iterator[Change]:
    """A call of code that turns halves, as a port makes it that turns neighbours; `angles` are those turned by."""
    yield from _turned(NEIGHBOURS, HALVES, "pair channel i with channel i + d / 2", result, angles=angles)


def _of_neighbours(result: Callable[[], Any], *, angles: bool = False) -> Iterator[Change]:
    yield from _turned(HALVES, NEIGHBOURS, "pair channel 2 i with channel 2 i + 1", result, angles=angles)


def _turned(ours: str, theirs: str, fix: str, result: Callable[[], Any], *, angles: bool) -> Iterator[Change]:
    yield Change(TURNS.format(ours, theirs), f"{fix}, in the angles too", result, together=True)
    if not angles:
        yield Change(MIXED.format(ours, theirs), f"{fix}, as in the angles", result, together=True)


def _split(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Change]:
    """Channels are taken apart: told by what comes out."""
    if not args or not _has_two(args[0]):
        return
    x, *rest = args
    found = function(*args, **kwargs)
    parts = found if isinstance(found, (tuple, list)) else (found,)

    def are(pieces: tuple[Tensor, ...]) -> bool:
        return all(any(torch.equal(part, piece) for piece in pieces) for part in parts)

    if are(x.chunk(2, -1)):
        yield from _of_halves(lambda: function(to_halves(x), *rest, **kwargs))
    elif are((x[..., ::2], x[..., 1::2])):
        yield from _of_neighbours(lambda: function(to_neighbours(x), *rest, **kwargs))
    elif x.ndim > 1 and x.shape[-1] == 2 and are(x.unbind(-1)):
        yield from _of_neighbours(lambda: function(_within_pairs(to_neighbours, x), *rest, **kwargs))


def _within_pairs(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return function(x.flatten(-2)).unflatten(-1, x.shape[-2:])


def _complex(function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Change]:
    yield from _of_neighbours(lambda: function(_within_pairs(to_neighbours, args[0]).contiguous()))


def _real(function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Change]:
    yield from _of_neighbours(lambda: _within_pairs(to_halves, function(*args)))


def _joined(function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Change]:
    first, *others = kwargs.get("tensors", args[0] if args else ())
    if len(others) != 1 or others[0].shape != first.shape or not first.ndim or not first.is_floating_point():
        return
    found, second = function(*args, **kwargs), others[0]
    angles = torch.equal(first, second)
    if torch.equal(found, torch.cat((first, second), -1)):
        yield from _of_halves(lambda: to_neighbours(found), angles=angles)
    elif torch.equal(found, torch.stack((first, second), -1)):
        yield from _of_neighbours(lambda: _within_pairs(to_halves, found), angles=angles)
    else:
        return
    if not angles:
        yield Change(BACKWARDS, "turn as PyTorch does", lambda: -found)


def _factor(function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Change]:
    """A product, with a sine or a cosine or a complex number of each pair."""
    if len(args) != 2 or not all(isinstance(arg, Tensor) for arg in args):
        return
    x, factor = args
    if factor.is_complex():
        yield Change(BACKWARDS, "turn as PyTorch does", lambda: x * factor.conj())
    for angles, other in ((factor, x), (x, factor)):
        if not _has_two(angles):
            continue
        if torch.equal(*angles.chunk(2, -1)):
            yield from _of_halves(lambda a=angles, b=other: to_neighbours(a) * b, angles=True)
        elif torch.equal(angles[..., ::2], angles[..., 1::2]):
            yield from _of_neighbours(lambda a=angles, b=other: to_halves(a) * b, angles=True)


def _has_two(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.ndim > 0 and x.shape[-1] > 0 and x.shape[-1] % 2 == 0


ROTARY: dict[str, Rule] = {
    **dict.fromkeys(("getitem", "chunk", "split", "tensor_split", "narrow", "unbind"), _split),
    **dict.fromkeys(("cat", "concat", "concatenate", "stack"), _joined),
    **dict.fromkeys(("mul", "imul", "rmul"), _factor),
    "view_as_complex": _complex,
    "view_as_real": _real,
}
