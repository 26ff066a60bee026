"""Functions that spawned processes find again: by module, or by file where a test's module has no importable name."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from headrace.errors import ConfigError

Reference = tuple[str, str, str]
"""Module, file and qualified name of a module-level function; picklable."""


def reference_of(function: Callable[..., Any]) -> Reference:
    """Return by what another process finds a function or class."""
    code = getattr(function, "__code__", None)
    file = code.co_filename if code is not None else str(sys.modules[function.__module__].__file__)
    return (function.__module__, file, function.__qualname__)


def resolve(reference: Reference) -> Callable[..., Any]:
    """Return the function that `reference` names; a file is imported once.

    Raises:
        ConfigError: It is not there, as for lambdas and nested functions.
    """
    module_name, file, qualname = reference
    found = sys.modules.get(module_name)
    if found is None or not hasattr(found, qualname):
        found = _import_file(file)
    function: Callable[..., Any] | None = getattr(found, qualname, None)
    if function is None:
        message = f"{qualname} of {file} cannot be found by another process; define it at module level"
        raise ConfigError(message, name=qualname)
    return function


def _import_file(file: str) -> Any:  # noqa: ANN401 - a module
    alias = f"_spawned_{Path(file).stem}"
    found = sys.modules.get(alias)
    if found is not None:
        return found
    spec = importlib.util.spec_from_file_location(alias, file)
    if spec is None or spec.loader is None:
        message = f"{file} cannot be imported"
        raise ConfigError(message, name=file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[alias] = module
    spec.loader.exec_module(module)
    return module
