"""The mode under which an engine's loader runs: copies into targets are noted, nothing is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from headrace.geometry import Loop
from headrace.recording.scalars import DataNeededError, ScalarMode
from headrace.recording.surface import FILL, Content, Grid, Run, Surface, rounded_to, view_loops

aten = torch.ops.aten
META = torch.device("meta")


@dataclass(frozen=True, slots=True)
class Source:
    """One parameter of the source: a row-major tensor that has a shape and no data."""

    id: int
    dtype: torch.dtype


State = Source | Surface


_METADATA_ONLY = frozenset(
    f"aten::{name}_" for name in ("squeeze", "unsqueeze", "t", "transpose", "swapdims", "swapaxes", "detach")
)
"""In-place operations that change a view and no data."""


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's __init_subclass__
    """Follows sources through views, copies, casts and concatenations into targets.

    Enter with `recording()`. Storages are the identity of memory: a view shares its base's, so views need no
    code here. What is not understood breaks the surfaces it reaches; nothing is ever guessed.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Tell torch to call this mode as it is; its guard against compilation would import the whole compiler."""
        return False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.states: dict[int, State] = {}
        self.targets: dict[str, Surface] = {}
        self.guards: dict[str, Surface] = {}
        self.asked: set[int] = set()
        self.last_feeds: frozenset[int] = frozenset()
        self._storages: list[torch.UntypedStorage] = []
        self._handlers: dict[Any, Callable[..., Any]] = self._make_handlers()

    def add_source(self, id_: int, tensor: torch.Tensor) -> None:
        """Follow a source tensor; it must be dense and own its storage."""
        self._register(tensor, Source(id_, tensor.dtype))

    def add_target(self, name: str, tensor: torch.Tensor) -> bool:
        """Follow a destination; returns False where its memory already belongs to another one."""
        if tensor.untyped_storage()._cdata in self.states:
            return False
        self.targets[name] = Surface(tensor.dtype, Grid.of(tensor), name)
        self._register(tensor, self.targets[name])
        return True

    def guard(self, name: str, tensor: torch.Tensor) -> None:
        """Protect live memory from a loader that holds on to it: writes break the target instead."""
        if tensor.untyped_storage()._cdata not in self.states:
            self.guards[name] = Surface(tensor.dtype, None, name)
            self._register(tensor, self.guards[name])

    def state_of(self, tensor: torch.Tensor) -> State | None:
        """Return what is known of a tensor's memory."""
        return self.states.get(tensor.untyped_storage()._cdata)

    def feeds_of(self, tensor: torch.Tensor) -> set[int]:
        """Return the sources behind a tensor's memory."""
        state = self.state_of(tensor)
        if isinstance(state, Source):
            return {state.id}
        return set(state.feeds) if state else set()

    def tracked(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor's memory holds what the loader put there, or a source."""
        state = self.state_of(tensor)
        return state is not None and (isinstance(state, Source) or state.written)

    def refuse(self, message: str, feeds: Iterable[int]) -> DataNeededError:
        """Note that values of sources were asked for, even if the loader swallows the returned error."""
        self.asked.update(feeds)
        return DataNeededError(message, feeds)

    def leftovers(self) -> set[int]:
        """Return sources whose data still lies in memory that is no target: something holds on to it."""
        held: set[int] = set()
        for storage in self._storages:
            state = self.states.get(storage._cdata)
            if not isinstance(state, Surface) or self.targets.get(state.name or "") is state:
                continue
            if state.name is not None or torch._C._storage_Use_Count(storage._cdata) > 1:
                held |= state.feeds
        return held

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        handler = self._handlers.get(func)
        if handler is None:
            handler = self._handlers[func] = self._classify(func)
        return handler(func, args, kwargs or {})

    def _register(self, tensor: torch.Tensor, state: State) -> None:
        storage = tensor.untyped_storage()
        self.states[storage._cdata] = state
        self._storages.append(storage)  # keeps the address from being given to another storage

    def _make_handlers(self) -> dict[Any, Callable[..., Any]]:
        filled = {
            aten.zeros.default: 0.0, aten.zeros_like.default: 0.0, aten.new_zeros.default: 0.0,
            aten.ones.default: 1.0, aten.ones_like.default: 1.0, aten.new_ones.default: 1.0,
        }  # fmt: skip
        valued = {
            aten.full.default: 1, aten.full_like.default: 1, aten.new_full.default: 2,
            aten.scalar_tensor.default: 0,
        }  # fmt: skip
        empty = (aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default,
                 aten.empty_strided.default, aten.new_empty_strided.default)  # fmt: skip
        return {
            aten.copy_.default: self._copy_,
            aten._foreach_copy_.default: self._foreach_copy_,
            aten.fill_.Scalar: lambda _f, args, _k: self._fill(args[0], args[1]),
            aten.fill_.Tensor: lambda _f, args, _k: self._copy(args[0], args[1]),
            aten.zero_.default: lambda _f, args, _k: self._fill(args[0], 0.0),
            aten.clone.default: self._clone,
            aten._to_copy.default: self._clone,
            aten.cat.default: self._cat,
            aten.stack.default: self._stack,
            aten.constant_pad_nd.default: self._pad,
            **dict.fromkeys(filled, lambda f, a, k: self._created(f, a, k, filled[f])),
            **dict.fromkeys(valued, lambda f, a, k: self._created(f, a, k, a[valued[f]])),
            **dict.fromkeys(empty, lambda f, a, k: self._created(f, a, k, None)),
        }

    def _classify(self, func: Any) -> Callable[..., Any]:  # noqa: ANN401
        schema = func._schema
        if schema.name in _METADATA_ONLY:
            return _run
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            return self._decompose
        if any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments):
            return self._mutate
        if any(r.alias_info is not None for r in schema.returns):
            return _run
        return self._compute

    def _decompose(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:  # noqa: ANN401
        """Follow an operation made of others; in inference mode torch hands those over whole."""
        with self:
            return func.decompose(*args, **kwargs)

    def _copy_(self, _func: Any, args: Sequence[Any], _kwargs: Mapping[str, Any]) -> torch.Tensor:  # noqa: ANN401
        return self._copy(args[0], args[1])

    def _foreach_copy_(self, _func: Any, args: Sequence[Any], _kwargs: Mapping[str, Any]) -> None:  # noqa: ANN401
        for target, source in zip(args[0], args[1], strict=True):
            self._copy(target, source)

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        into, out_of = self.state_of(target), self.state_of(source)
        if isinstance(out_of, Surface) and not out_of.written:
            out_of = None
        self.last_feeds = frozenset(self.feeds_of(source))
        if out_of is None and into is None:
            if target.device != META and source.device == META:
                self._surface_of(target).breaks("a copy of memory without data", set())
                return target
            return target.copy_(source)
        into = self._surface_of(target)
        if out_of is None:
            self._copy_constant(into, target, source)
        elif not _same_bits(target, into.dtype, source, out_of.dtype):
            into.breaks("a copy between views of other dtypes", set(self.last_feeds))
        else:
            self._follow(into, target, source.expand(target.shape), out_of)
        return target

    def _copy_constant(self, into: Surface, target: torch.Tensor, source: torch.Tensor) -> None:
        value = _constant(source)
        if value is None:
            into.breaks("a copy of values that no source holds", set())
        else:
            self._fill(target, value)

    def _follow(self, into: Surface, target: torch.Tensor, source: torch.Tensor, out_of: State) -> None:
        loops = view_loops(target.shape, source.stride(), target.stride())
        begin, end = int(source.storage_offset()), int(target.storage_offset())
        if isinstance(out_of, Source):
            into.write(Run(Content(out_of.id, out_of.dtype), begin, end, loops))
            return
        runs = out_of.read(loops, begin, end)
        if runs is None:
            into.breaks(out_of.broken or "a copy of memory that is not all known", set(out_of.feeds))
        for run in runs or ():
            into.write(run)

    def _fill(self, target: torch.Tensor, value: float) -> torch.Tensor:
        into = self.state_of(target)
        if into is None and target.device != META:
            return target.fill_(value)
        into = self._surface_of(target)
        if isinstance(value, complex) or math.isnan(value):
            into.breaks(f"a fill with {value}", set())
        elif target.dtype != into.dtype and value != 0:
            into.breaks("a fill of a view of another dtype", set())
        elif target.element_size() != into.dtype.itemsize:
            into.breaks("a fill of a view of another element size", set())
        else:
            content = Content(FILL, into.dtype, False, rounded_to(value, into.dtype))
            loops = tuple(Loop(n, 0, s) for n, s in zip(target.shape, target.stride(), strict=True))
            into.write(Run(content, 0, int(target.storage_offset()), loops))
        return target

    def _surface_of(self, tensor: torch.Tensor) -> Surface:
        """Return the surface behind a tensor that is about to be written; a source becomes unknown memory."""
        state = self.state_of(tensor)
        if isinstance(state, Surface):
            return state
        storage = tensor.untyped_storage()
        length = storage.nbytes() // tensor.element_size()
        surface = Surface(tensor.dtype, Grid.flat(length))
        self._register(tensor, surface)
        if isinstance(state, Source):
            surface.breaks("the loader writes into its input", {state.id})
        elif tensor.device != META:
            whole = tensor.as_strided((length,), (1,), 0)
            value = _constant(whole)
            if value is not None:
                self._fill(whole, value)
        return surface

    def _created(
        self,
        func: Any,  # noqa: ANN401
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        value: float | None,
    ) -> torch.Tensor:
        made: torch.Tensor = func(*args, **kwargs)
        if made.device == META:
            self._register(made, Surface(made.dtype, Grid.of(made)))
            if value is not None:
                self._fill(made, value)
        return made

    def _fresh(self, like: torch.Tensor) -> torch.Tensor:
        made = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=META)
        self._register(made, Surface(made.dtype, Grid.of(made)))
        return made

    def _clone(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:  # noqa: ANN401
        source = args[0]
        if not self.tracked(source):
            return func(*args, **kwargs)  # type: ignore[no-any-return]
        options = {k: v for k, v in kwargs.items() if k in ("dtype", "memory_format")}
        shadow = torch.empty_strided(source.shape, source.stride(), dtype=source.dtype, device=META)
        made = self._fresh(func(shadow, **options))
        self._copy(made, source)
        return made

    def _cat(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:  # noqa: ANN401
        tensors, dim = args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0)
        if not any(map(self.tracked, tensors)):
            return func(*args, **kwargs)  # type: ignore[no-any-return]
        made = self._fresh(func([t.to(META) for t in tensors], dim))
        begin = 0
        for tensor in tensors:
            if tensor.shape != (0,):
                self._copy(made.narrow(dim, begin, tensor.shape[dim]), tensor)
                begin += tensor.shape[dim]
        return made

    def _stack(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:  # noqa: ANN401
        tensors, dim = args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0)
        if not any(map(self.tracked, tensors)):
            return func(*args, **kwargs)  # type: ignore[no-any-return]
        made = self._fresh(func([t.to(META) for t in tensors], dim))
        for i, tensor in enumerate(tensors):
            self._copy(made.select(dim, i), tensor)
        return made

    def _pad(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:  # noqa: ANN401
        source, pads = args[0], list(args[1])
        value = args[2] if len(args) > 2 else kwargs.get("value", 0)
        if not self.tracked(source) or min(pads) < 0:
            return self._compute(func, args, kwargs)  # type: ignore[no-any-return]
        made = self._fresh(func(source.to(META), pads, value))
        self._fill(made, value)
        inner = made
        for i in range(len(pads) // 2):
            inner = inner.narrow(-1 - i, pads[2 * i], source.shape[-1 - i])
        self._copy(inner, source)
        return made

    def _mutate(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:  # noqa: ANN401
        written = list(_written(func, args, kwargs))
        feeds = self._feeds((args, kwargs))
        if not feeds and all(self.state_of(t) is None for t in written):
            return func(*args, **kwargs)
        self.last_feeds = frozenset(feeds)
        for tensor in written:
            self._surface_of(tensor).breaks(f"{func} is not a copy", feeds)
        returned = len(func._schema.returns)
        return None if returned == 0 else written[0] if returned == 1 else tuple(written)

    def _compute(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:  # noqa: ANN401
        tensors = list(_tensors((args, kwargs)))
        if not any(map(self.tracked, tensors)):
            return func(*args, **kwargs)
        feeds = self.last_feeds = frozenset(self._feeds((args, kwargs)))
        if not any("Tensor" in str(r.type) for r in func._schema.returns):
            raise self.refuse(f"the loader looks at values through {func}", feeds)
        args, kwargs = tree_map_only(torch.Tensor, _without_data, (args, kwargs))
        made = func(*args, **kwargs)
        known = {t.untyped_storage()._cdata for t in tensors}
        for tensor in _tensors(made):
            if tensor.untyped_storage()._cdata not in known:
                self._register(tensor, Surface(tensor.dtype, None))
                self._surface_of(tensor).breaks(f"{func} is not a copy", set(feeds))
        return made

    def _feeds(self, tree: object) -> set[int]:
        return set().union(*(self.feeds_of(tensor) for tensor in _tensors(tree)))


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Record what this thread does in the body. Other threads are not affected."""
    with torch.no_grad(), ScalarMode(recorder), recorder:
        yield


def _constant(tensor: torch.Tensor) -> float | None:
    """Return the value that all elements of a tensor have, or None where they differ or have no data."""
    if tensor.device == META or tensor.numel() == 0 or tensor.is_complex():
        return None
    first = tensor[(0,) * tensor.dim()].item()
    same = tensor.numel() == 1 or bool((tensor == first).all())
    return float(first) if same and math.isfinite(first) else None


def _without_data(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.device == META:
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=META)


def _run(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:  # noqa: ANN401
    return func(*args, **kwargs)


def _same_bits(target: torch.Tensor, into: torch.dtype, source: torch.Tensor, out_of: torch.dtype) -> bool:
    """Whether copying between the views equals copying between the memories' own dtypes."""
    if (target.dtype, source.dtype) == (into, out_of):
        return True
    return into == out_of and target.dtype == source.dtype and source.element_size() == into.itemsize


def _tensors(tree: object) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from _tensors(item)
    elif isinstance(tree, Mapping):
        yield from _tensors(list(tree.values()))


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[torch.Tensor]:  # noqa: ANN401
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from _tensors(args[i] if i < len(args) else kwargs.get(argument.name))
