"""One forward and backward run of a PyTorch module, with what entered and left every layer."""

import copy
import inspect
import math
from collections import deque
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode

from jaxloss.parity._change import Change, Choice
from jaxloss.parity._changes import changes, dropped
from jaxloss.parity._layout import Shape
from jaxloss.parity._masks import Drop
from jaxloss.parity._pairs import Call
from jaxloss.parity._recording import LayerCall, Recording
from jaxloss.parity._state_dict import to_numpy


class Original:
    """A copy of a PyTorch module, in a dtype and a mode of its own."""

    def __init__(
        self, module: nn.Module, dtype: torch.dtype, *, train: bool, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        """Copies the module, and with it an optimizer of its parameters, whose state starts fresh."""
        if computed := ", ".join(_computed(module)):
            raise ValueError(
                f"parity: the PyTorch module computes {computed} from other tensors, and cannot be copied. If it is "
                "weight_norm, call torch.nn.utils.remove_weight_norm, or use torch.nn.utils.parametrizations."
            )
        copied, self.optimizer = copy.deepcopy((module, optimizer))
        self.dtype = dtype
        _keep_epsilons(copied)
        self.module = copied._apply(self._convert).train(train)  # nn.Module.to would make complex tensors real
        if self.optimizer is not None:
            self.optimizer = _fresh(self.optimizer)
        self.layers = {name: layer for name, layer in self.module.named_modules() if _is_layer(layer)}

    def cast(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copies, the floating and complex ones in the module's precision."""
        return [self._convert(t).detach().clone() for t in tensors]

    def _convert(self, tensor: Tensor) -> Tensor:
        if tensor.is_complex():
            return tensor.to(torch.complex128 if self.dtype is torch.float64 else torch.complex64)
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def run(self, inputs: Sequence[Tensor], objective: Callable[[Tensor], Tensor], seed: int) -> Recording:
        """Runs forward and backward. Dropout keeps what the seed says, whatever the dtype."""
        functions = Functions(seed)
        leaves = [t.requires_grad_() if t.is_floating_point() else t for t in self.cast(inputs)]
        before, given = [to_numpy(t) for t in leaves], [t.clone() for t in leaves]
        calls, outputs = self.forward(given, functions)
        if not outputs.requires_grad:  # all is frozen and the inputs are integers: the loss alone has a gradient
            outputs = outputs.detach().requires_grad_()
        named = dict(self.module.named_parameters())
        wanted = [*(t for t in leaves if t.requires_grad), *(t for t in named.values() if t.requires_grad)]
        with isolated(self.dtype):
            loss = objective(outputs)
            gradients = torch.autograd.grad(loss, [outputs, *wanted], allow_unused=True, materialize_grads=True)
        rest = iter(gradients[1:])
        return Recording(
            calls=calls,
            outputs=to_numpy(outputs),
            loss=to_numpy(loss),
            output_gradient=to_numpy(gradients[0]),
            input_gradients=[to_numpy(next(rest)) if t.requires_grad else None for t in leaves],
            parameter_gradients={name: to_numpy(next(rest)) for name, t in named.items() if t.requires_grad},
            buffers={name: to_numpy(buffer) for name, buffer in self.module.named_buffers() if not buffer.is_complex()},
            masks=functions.masks,
            drops=functions.drops,
            random=list(functions.random),
            rounded=list(functions.rounded) if self.dtype is torch.float64 else [],
            flattened=functions.flattened,
            mutated=[i for i, (a, b) in enumerate(zip(before, given, strict=True)) if not _same(a, to_numpy(b))],
        )

    def forward(self, inputs: Sequence[Tensor], functions: "Functions") -> tuple[list[LayerCall], Tensor]:
        """Runs the module, and records its layers."""
        calls: list[LayerCall] = []
        with isolated(self.dtype), self._recorded(calls, functions), functions:
            try:
                outputs = self.module(*inputs)
            except RuntimeError as error:
                if self.dtype is not torch.float64 or not functions.rounded:
                    raise
                raise TypeError(
                    "parity: the PyTorch module does not run in float64, where it is compared: it makes fewer digits "
                    f"by itself in {', '.join(functions.rounded)}. Take the dtype of an input or a weight there, with "
                    f"dtype=x.dtype or .to(x.dtype). ({error})"
                ) from error
        if not isinstance(outputs, Tensor):
            raise TypeError(f"parity: the PyTorch module returned a {type(outputs).__name__}, expected one tensor.")
        if outputs.is_complex():
            raise TypeError("parity: the PyTorch module returned complex numbers: have both return real ones.")
        return calls, outputs

    def backward(self, inputs: Sequence[Tensor], objective: Callable[[Tensor], Tensor], seed: int) -> list[np.ndarray]:
        """Puts gradients into the parameters, and returns what dropout kept."""
        self.module.zero_grad()
        functions = Functions(seed)
        with isolated(self.dtype):
            with functions:
                outputs = self.module(*self.cast(inputs))
            objective(outputs).backward()
        return functions.masks

    @contextmanager
    def _recorded(self, calls: list[LayerCall], functions: "Functions") -> Iterator[None]:
        """Hooks on every layer."""
        counts: dict[str, int] = {}
        names = {id(layer): name for name, layer in self.layers.items()}

        def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            name = names[id(layer)]
            index = counts[name] = counts.get(name, -1) + 1
            tensors = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor)]
            arrays = list(map(to_numpy, tensors))
            call = LayerCall(name, index, arrays, np.empty(0), [None] * len(tensors))
            functions.enter(call.key, tensors, opaque=not isinstance(layer, nn.RNNBase))
            calls.append(call)
            # Aliases, so that their gradients are what comes back through this layer alone.
            aliases = [t.view_as(t) for t in tensors]
            for i, alias in enumerate(aliases):
                if alias.requires_grad:
                    alias.register_hook(lambda g, i=i: call.input_gradients.__setitem__(i, to_numpy(g)))
            rest = iter(aliases)
            given = [next(rest) if isinstance(arg, Tensor) else arg for arg in (*args, *kwargs.values())]
            return tuple(given[: len(args)]), dict(zip(kwargs, given[len(args) :], strict=True))

        def after(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            call = next(call for call in reversed(calls) if call.name == names[id(layer)])
            real = isinstance(output, Tensor) and not output.is_complex()
            cut_out = real and not any(map(np.iscomplexobj, call.inputs))
            functions.leave(call.name, output, cut_out=cut_out)
            if not cut_out:
                calls.remove(call)  # not something to be cut out: its arithmetic belongs to the edges
                return
            call.output = to_numpy(output)
            if output.requires_grad:
                output.register_hook(lambda g: setattr(call, "output_gradient", to_numpy(g)))

        handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in self.layers.values()]
        handles += [layer.register_forward_hook(after) for layer in self.layers.values()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _keep_epsilons(module: nn.Module) -> None:
    """RMSNorm's default is another in every dtype: that of the weights that were given stays."""
    for norm in (each for each in module.modules() if isinstance(each, nn.RMSNorm) and each.eps is None):
        weight = next(norm.parameters(), next(module.parameters(), torch.empty(())))
        norm.eps = torch.finfo(weight.dtype).eps


@contextmanager
def isolated(dtype: torch.dtype) -> Iterator[None]:
    """A random state of its own, and tensors that are made without a dtype in this one."""
    before = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed GPUs too
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def _fresh(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The same optimizer with a new state, in its parameters' present dtype."""
    known = inspect.signature(type(optimizer)).parameters
    options = {name: value for name, value in optimizer.defaults.items() if name in known}
    make: Callable[..., torch.optim.Optimizer] = type(optimizer)
    return make([dict(group) for group in optimizer.param_groups], **options)


def _is_layer(module: nn.Module) -> bool:
    """Whether a module has weights of its own, and no submodule that has some."""

    def owns(module: nn.Module) -> bool:
        return any(tensor is not None for tensor in (*module._parameters.values(), *module._buffers.values()))

    children = [child for child in module.modules() if child is not module]
    return owns(module) and not any(map(owns, children))


def _computed(module: nn.Module) -> Iterator[str]:
    """Attributes that the old weight_norm and its like set: deepcopy refuses them."""
    for name, layer in module.named_modules():
        computed = (key for key, value in vars(layer).items() if isinstance(value, Tensor) and not value.is_leaf)
        yield from (f"{name}.{key}".removeprefix(".") for key in computed)


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.tobytes() == b.tobytes()


_ATTENTION: Callable[..., Tensor] = F.scaled_dot_product_attention
RECENT = 8  # layers whose inputs and outputs are kept in mind


class Functions(TorchFunctionMode):
    """Sees every PyTorch function called: sets dropout's masks, follows flattened feature maps, and can change a call.

    Layers divide a run into windows, numbered from 0; calls inside layers belong to none. In the windows that are
    watched, `alternatives` has for each call what a faulty port may do instead, and `choice` has some of it done.
    """

    def __init__(
        self, seed: int, *, windows: Container[int] = (), choice: Choice | None = None, inside: bool = False
    ) -> None:
        """With `inside`, a layer that runs alone is watched."""
        super().__init__()
        self.masks: list[np.ndarray] = []
        self.flattened: dict[Call, tuple[int, ...]] = {}
        self.drops: list[Drop] = []
        self.alternatives: list[list[Change]] = []
        self.random: dict[str, None] = {}
        self.rounded: dict[str, None] = {}  # functions that return fewer digits than float64's, given none such
        self._seed, self._windows, self._choice, self._inside = seed, windows, choice, inside
        self._window, self._in_layer = 0, False
        self._entered: Sequence[Tensor] = ()
        self._passed: deque[tuple[str, Tensor, Any]] = deque(maxlen=RECENT)
        self._feature_map: tuple[int, ...] | None = None

    def enter(self, call: Call, tensors: Sequence[Tensor], *, opaque: bool) -> None:
        """Notes that a layer begins; if it is not opaque, what it calls belongs to the window."""
        shape = tensors[0].shape if tensors else ()
        if self._feature_map and len(shape) == 2 and shape[1] == math.prod(self._feature_map):
            self.flattened[call] = self._feature_map
        self._feature_map, self._in_layer, self._entered = None, opaque, tensors

    def leave(self, name: str, output: Any, *, cut_out: bool) -> None:
        """Notes that a layer ends; one that is not cut out divides nothing."""
        self._window, self._in_layer = self._window + cut_out, False
        if self._entered:
            self._passed.append((name, self._entered[0], output))

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Called by PyTorch instead of `func`."""
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", str(func))
        if func in _WHOLE_CHANNELS:
            return self._drop(func, args, kwargs)
        if func is F.multi_head_attention_forward:
            return self._fused_attention(args, kwargs)
        if func is _ATTENTION:
            func = self._attention(*args, **kwargs)
        if func is F.hardsigmoid:
            func = _hardsigmoid
        if name in _RECURRENT and len(args) == 9 and args[4] > 1 and args[5] and args[6]:
            func = self._layer_by_layer(func, args)
        if (chosen := self._watch(func, args, kwargs)) is not None:
            result = chosen.result()
            in_place = args and name.endswith("_") and not name.endswith("__")
            return args[0].copy_(result) if in_place else result
        before = torch.get_rng_state()
        result = func(*args, **kwargs)
        if not torch.equal(before, torch.get_rng_state()):
            self.random[name] = None
        given = [*args, *kwargs.values()]
        given += [part for each in given if isinstance(each, list | tuple) for part in each]
        if _rounded(result) and not any(map(_rounded, given)):
            self.rounded[name] = None
        if isinstance(result, Tensor) and args and isinstance(args[0], Tensor):
            source = args[0].shape
            if len(source) > 2 and len(result.shape) == 2 and source[0] == result.shape[0]:
                self._feature_map = tuple(source[1:])
        return result

    def _watch(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Change | None:
        """The alternative to this call that is to be done, if it is this one's turn."""
        if not (self._inside or (self._window in self._windows and not self._in_layer)):
            return None
        try:
            alternatives = [*changes(func, args, kwargs), *self._other_terms(func, args, kwargs)]
        except Exception:  # a call in a form that its rule does not know
            alternatives = []
        self.alternatives.append(alternatives)
        if self._choice is None or self._choice.call not in (None, len(self.alternatives) - 1):
            return None
        same = [change for change in alternatives if change.meaning == self._choice.meaning]
        return next(iter(same[self._choice.nth :]), None)

    def _other_terms(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Change]:
        """Sums with what a layer before returned for what it got, or the reverse."""
        if getattr(func, "__name__", "").strip("_") not in ("add", "iadd") or len(args) != 2 or kwargs:
            return
        for layer, entered, left in self._passed:
            for theirs, ours, words in ((entered, left, ("returns", "gets")), (left, entered, ("gets", "returns"))):
                terms = [ours if arg is theirs else arg for arg in args]
                if any(arg is theirs for arg in args):
                    meaning = (
                        f"the port adds what {layer} {words[0]}, PyTorch what it {words[1]} (a residual connection?)"
                    )
                    yield Change(meaning, f"add what {layer} {words[1]}", lambda a=terms[0], b=terms[1]: a + b)

    def _drop(self, func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        bound = inspect.signature(func).bind(*args, **kwargs)
        bound.apply_defaults()
        x, p, training, inplace = (bound.arguments[name] for name in ("input", "p", "training", "inplace"))
        if not training or p == 0:
            return x
        flat = self._feature_map if x.ndim == 2 and x.shape[1] == math.prod(self._feature_map or ()) else None
        result = _kept(x, p, self._mask(x.shape, p, whole_channels=_WHOLE_CHANNELS[func], feature_map=flat))
        if (chosen := self._watch(dropped, (result, x, p), {})) is not None:
            result = chosen.result()
        return x.copy_(result) if inplace else result

    def _mask(
        self, shape: Sequence[int], rate: float, *, whole_channels: bool = False, feature_map: Shape | None = None
    ) -> Tensor:
        """What a call of dropout keeps."""
        if whole_channels:
            shape = (*shape[:2], *(1 for _ in shape[2:]))
        kept = np.random.default_rng((self._seed, len(self.masks))).random(tuple(shape)) >= rate
        self.masks.append(kept)
        self.drops.append(Drop(self._window, rate, whole_channels, feature_map))
        return torch.from_numpy(kept)

    def _attention(
        self, query: Tensor, key: Tensor, *others: Any, dropout_p: float = 0.0, **options: Any
    ) -> Callable[..., Tensor]:
        """`scaled_dot_product_attention`, with a mask of its own in place of PyTorch's random numbers, if it drops."""
        rate = others[2] if len(others) > 2 else dropout_p
        if not rate:
            return _ATTENTION
        mask = self._mask((*query.shape[:-1], key.shape[-2]), rate)

        def scaled_dot_product_attention(
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attn_mask: Tensor | None = None,
            dropout_p: float = 0.0,
            is_causal: bool = False,
            **options: Any,
        ) -> Tensor:
            if attn_mask is not None and attn_mask.dtype is torch.bool:  # what follows would add it
                attn_mask = query.new_zeros(attn_mask.shape).masked_fill(~attn_mask, -math.inf)
            _, weights = torch.ops.aten._scaled_dot_product_attention_math(
                query, key, value, attn_mask, 0.0, is_causal, **options
            )
            groups = weights.shape[-3] // value.shape[-3] if weights.ndim > 2 else 1
            values = value.repeat_interleave(groups, -3) if groups > 1 else value
            return _kept(weights, dropout_p, mask) @ values

        return scaled_dot_product_attention

    def _layer_by_layer(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Callable[..., Any]:
        """A recurrent module's function, with masks of its own in place of random numbers between its layers."""
        x, state, weights, has_biases, layers, rate, train, bidirectional, batch_first = args
        ways, size = 1 + bidirectional, len(weights) // layers
        shape = (*x.shape[:-1], ways * (state[0] if isinstance(state, tuple) else state).shape[-1])
        masks = [self._mask(shape, rate) for _ in range(layers - 1)]

        def recurrent(x: Tensor, state: Any, weights: list[Tensor], *_: Any) -> tuple[Tensor, ...]:
            states = []
            for i in range(layers):
                start = [each[i * ways : (i + 1) * ways] for each in (state if isinstance(state, tuple) else [state])]
                start = tuple(start) if isinstance(state, tuple) else start[0]
                x = _kept(x, rate, masks[i - 1]) if i else x
                own = weights[i * size : (i + 1) * size]
                x, *left = function(x, start, own, has_biases, 1, 0.0, train, bidirectional, batch_first)
                states.append(left)
            return (x, *map(torch.cat, zip(*states, strict=True)))

        recurrent.__name__ = function.__name__
        return recurrent

    def _fused_attention(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`multi_head_attention_forward`, whose dropout is this one's."""
        drop, attend = (partial(self._as_seen, function) for function in (F.dropout, _ATTENTION))
        with mock.patch.object(F, "dropout", drop), mock.patch.object(F, "scaled_dot_product_attention", attend):
            return F.multi_head_attention_forward(*args, **kwargs)

    def _as_seen(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.__torch_function__(func, (), args, kwargs)


def _kept(x: Tensor, rate: float, mask: Tensor) -> Tensor:
    """Dropout with this mask."""
    return torch.where(mask, x / (1 - rate) if rate < 1 else x, torch.zeros((), dtype=x.dtype))


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """The same in float64: PyTorch's own derivative there is 1/6 in float32 (2.13)."""
    if input.dtype is not torch.float64:
        return F.hardsigmoid(input, inplace)
    result = F.relu6(input + 3) / 6
    return input.copy_(result) if inplace else result


def _rounded(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dtype is not torch.float64


_RECURRENT = ("gru", "lstm", "rnn_relu", "rnn_tanh")
_WHOLE_CHANNELS: dict[Callable[..., Tensor], bool] = {
    F.dropout: False,
    F.dropout1d: True,
    F.dropout2d: True,
    F.dropout3d: True,
}
