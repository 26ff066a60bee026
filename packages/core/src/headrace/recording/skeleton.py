"""A module's structure without its data: what a loader is recorded on."""

from __future__ import annotations

import functools
import types
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

MAX_INDEX_ELEMENTS = 1 << 16
"""Integer and boolean buffers up to this size keep their values: loaders read them (expert maps)."""

_CONTAINERS = (list, tuple, dict, set)
_PLAIN = (str, int, float, bytes, complex, type(None))


def skeleton_of(module: nn.Module) -> nn.Module:
    """Return a twin of a module tree whose parameters and buffers are on the meta device.

    No weights are copied or moved, the module is not touched. Attributes of tensors (`weight_loader`), bound
    methods, partials, closures and objects that refer to the tree get twins too; everything else is shared.
    Ties between parameters are kept. Small integer buffers keep their values: loaders read expert maps.
    """
    twins = _Twins(module)
    twin = twins.of(module)
    twins.finish()
    return twin  # type: ignore[no-any-return]


class _Twins:
    """Copies what refers to the tree and shares the rest. Objects are known by id."""

    def __init__(self, root: nn.Module) -> None:
        self._memo: dict[int, Any] = {}
        self._storages: dict[tuple[object, ...], torch.UntypedStorage] = {}
        self._pending: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._weights = {id(t) for t in (*root.parameters(), *root.buffers())}
        self._reached = _reached(root, self._weights)
        self._referring = _referring(self._reached, self._weights)

    def of(self, value: Any) -> Any:  # noqa: ANN401
        """Return the twin of a value, or the value itself where it does not refer to the tree."""
        if id(value) in self._memo:
            return self._memo[id(value)]
        if id(value) not in self._referring:
            return value
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, _CONTAINERS):
            return self._container(value)
        if isinstance(value, types.MethodType):
            return self._note(value, types.MethodType(value.__func__, self.of(value.__self__)))
        if isinstance(value, functools.partial):
            made = functools.partial(self.of(value.func), *self.of(value.args), **self.of(value.keywords))
            return self._note(value, made)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        return self._object(value)

    def finish(self) -> None:
        """Give tensors their attributes, once every module has its twin."""
        while self._pending:
            tensor, twin = self._pending.pop()
            for key, value in tensor.__dict__.items():
                twin.__dict__[key] = self.of(value)

    def _note(self, value: Any, twin: Any) -> Any:  # noqa: ANN401
        self._memo[id(value)] = twin
        return twin

    def _tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        is_index = not tensor.is_floating_point() and not isinstance(tensor, nn.Parameter)
        if is_index and tensor.numel() <= MAX_INDEX_ELEMENTS:
            made = tensor.detach().clone()
        else:
            made = torch.empty((), dtype=tensor.dtype, device="meta")
            made.set_(self._storage(tensor), 0, tensor.shape, tensor.stride())
        twin = torch.Tensor._make_subclass(type(tensor), made, tensor.requires_grad)
        if getattr(tensor, "__dict__", None):
            self._pending.append((tensor, twin))
        self._note(tensor, twin)
        return twin

    def _storage(self, tensor: torch.Tensor) -> torch.UntypedStorage:
        """Return meta memory for a tensor; tensors that are the same memory share it."""
        key = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride())
        if key not in self._storages:
            reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
            num_bytes = reach * tensor.element_size() if tensor.numel() else 0
            self._storages[key] = torch.empty(
                num_bytes, dtype=torch.uint8, device="meta"
            ).untyped_storage()
        return self._storages[key]

    def _container(self, value: Any) -> Any:  # noqa: ANN401
        if isinstance(value, tuple):
            items = [self.of(item) for item in value]
            return self._note(value, type(value)(*items) if hasattr(value, "_fields") else type(value)(items))
        twin = self._note(value, _empty_like(value))
        if isinstance(value, dict):
            for key, item in value.items():
                twin[self.of(key)] = self.of(item)
        elif isinstance(value, list):
            list.extend(twin, [self.of(item) for item in value])
        else:
            set.update(twin, {self.of(item) for item in value})
        return twin

    def _function(self, value: types.FunctionType) -> Any:  # noqa: ANN401
        cells = tuple(types.CellType() for _ in value.__closure__ or ())
        code, names = value.__code__, value.__globals__
        twin = types.FunctionType(code, names, value.__name__, value.__defaults__, cells)
        self._note(value, twin)
        for cell, original in zip(cells, value.__closure__ or (), strict=True):
            for content in _content(original):
                cell.cell_contents = self.of(content)
        twin.__kwdefaults__ = value.__kwdefaults__
        twin.__dict__.update({k: self.of(v) for k, v in value.__dict__.items()})
        return twin

    def _object(self, value: Any) -> Any:  # noqa: ANN401
        twin = self._note(value, object.__new__(type(value)))
        for key, item in vars(value).items():
            twin.__dict__[key] = self.of(item)
        return twin


def _empty_like(value: Any) -> Any:  # noqa: ANN401
    kind: Any = type(value)
    twin = kind.__new__(kind)
    if isinstance(value, defaultdict):
        twin.default_factory = value.default_factory
    if hasattr(value, "__dict__"):
        twin.__dict__.update(value.__dict__)
    return twin


def _content(cell: types.CellType) -> list[Any]:
    try:
        return [cell.cell_contents]
    except ValueError:  # a name that is not bound yet
        return []


def _children(value: Any, weights: set[int]) -> Iterable[Any]:  # noqa: ANN401
    if isinstance(value, torch.Tensor):
        is_weight = id(value) in weights or isinstance(value, nn.Parameter)
        return list(value.__dict__.values()) if is_weight else ()
    if isinstance(value, dict):
        return (*value.keys(), *value.values())
    if isinstance(value, (list, tuple, set)):
        return tuple(value)
    if isinstance(value, types.MethodType):
        return (value.__self__,)
    if isinstance(value, functools.partial):
        return (value.func, value.args, value.keywords)
    if isinstance(value, types.FunctionType):
        return [content for cell in value.__closure__ or () for content in _content(cell)]
    attributes = getattr(value, "__dict__", None)
    return list(attributes.values()) if type(attributes) is dict and _can_be_twinned(type(value)) else ()


def _can_be_twinned(kind: type) -> bool:
    """Whether an object may exist twice: plain Python state, no finalizer."""
    if issubclass(kind, nn.Module):
        return True
    if issubclass(kind, (type, types.ModuleType)) or hasattr(kind, "__del__"):
        return False
    makers = (vars(base).get("__new__") for base in kind.__mro__[:-1])
    return not any(isinstance(maker, types.BuiltinFunctionType) for maker in makers)


def _reached(root: nn.Module, weights: set[int]) -> dict[int, tuple[object, list[object]]]:
    """Return every object reachable from `root` with what it refers to, by id."""
    reached: dict[int, tuple[object, list[object]]] = {}
    stack: list[object] = [root]
    while stack:
        value = stack.pop()
        if id(value) not in reached:
            children = [c for c in _children(value, weights) if not isinstance(c, _PLAIN)]
            reached[id(value)] = (value, children)
            stack += children
    return reached


def _referring(reached: dict[int, tuple[object, list[object]]], weights: set[int]) -> set[int]:
    """Return ids of reached objects that are, or lead to, a module or a parameter."""
    parents: dict[int, list[int]] = {}
    for id_, (_, children) in reached.items():
        for child in children:
            parents.setdefault(id(child), []).append(id_)
    kinds = (nn.Module, nn.Parameter)
    todo = [i for i, (value, _) in reached.items() if i in weights or isinstance(value, kinds)]
    found = set(todo)
    while todo:
        new = [parent for parent in parents.get(todo.pop(), ()) if parent not in found]
        found.update(new)
        todo += new
    return found
