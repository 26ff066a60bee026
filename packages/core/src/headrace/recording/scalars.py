"""What a recorded loader gets where it asks for a number: a stand-in that may be filled in, no more."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch.overrides import TorchFunctionMode

from headrace.errors import HeadraceError


class DataNeededError(HeadraceError):
    """A loader looked at values while it was being recorded; `sources` are the ids it looked at."""

    def __init__(self, message: str, sources: Iterable[int] = ()) -> None:
        super().__init__(message, phase="record")
        self.sources = frozenset(sources)


class Followed(Protocol):
    """What a scalar mode asks of the recorder."""

    def tracked(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor depends on a source."""
        ...

    def feeds_of(self, tensor: torch.Tensor) -> set[int]:
        """Return the sources behind a tensor."""
        ...

    def refuse(self, message: str, feeds: Iterable[int]) -> DataNeededError:
        """Note that values of these sources were asked for; return what to raise."""
        ...


Refuse = Callable[[str, Iterable[int]], DataNeededError]


class StandIn(float):
    """What `.item()` of a source returns: `fill_` may consume it, everything else fails."""

    __slots__ = ("feeds", "refuse", "tensor")
    tensor: torch.Tensor
    feeds: set[int]
    refuse: Refuse


def _refuse(self: StandIn, *_: object) -> Any:  # noqa: ANN401 - stands for every number method
    raise self.refuse("the loader computes with .item() of a source", self.feeds)


_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "divmod", "pow")
_UNARY = ("neg", "pos", "abs", "bool", "int", "float", "round", "trunc", "ceil", "floor", "hash")
_COMPARE = ("eq", "ne", "lt", "le", "gt", "ge")
for _method in (*_BINARY, *(f"r{_name}" for _name in _BINARY), *_UNARY, *_COMPARE):
    setattr(StandIn, f"__{_method}__", _refuse)
for _method in ("is_integer", "as_integer_ratio", "hex", "conjugate"):
    setattr(StandIn, _method, _refuse)


class ScalarMode(TorchFunctionMode):
    """Lets `param.fill_(source.item())` be recorded as the copy that it is."""

    def __init__(self, recorder: Followed) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self,
        func: Any,  # noqa: ANN401
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        if func is torch.Tensor.item and self._recorder.tracked(args[0]):
            return self._stand_in(args[0])
        for arg in args:
            if type(arg) is StandIn:
                if func is torch.Tensor.fill_:
                    return args[0].copy_(arg.tensor)
                raise arg.refuse(f"the loader computes with .item(): {func}", arg.feeds)
        return func(*args, **(kwargs or {}))

    def _stand_in(self, tensor: torch.Tensor) -> StandIn:
        feeds = self._recorder.feeds_of(tensor)
        if tensor.numel() != 1:
            raise self._recorder.refuse("the loader takes .item() of several elements", feeds)
        value = StandIn(math.nan)
        value.tensor, value.feeds, value.refuse = tensor.reshape(()), feeds, self._recorder.refuse
        return value
