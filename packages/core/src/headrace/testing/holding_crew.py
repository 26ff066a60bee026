"""HoldingCrew: processes that each hold a part of one source, as a trainer's ranks do; and such a part, for tests."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Self

import torch

from headrace.config import host_settings
from headrace.errors import HeadraceError
from headrace.geometry import Box
from headrace.holder import Holder, HolderTicket
from headrace.protocols import SourceRegion, WeightSource
from headrace.testing.spawning import Reference, reference_of, resolve
from headrace.types import ParamMeta, ParamTable

SourceFactory = Callable[..., WeightSource]
"""Called in each process as `factory(part, parts, *args)`."""


class PartSource:
    """A WeightSource of one part: every `parts`th parameter from the `part`th on, whole, made anew at every read.

    Args:
        params: All parameters.
        part: Which part.
        parts: Number of parts.
        make: Returns a parameter's tensor as it is now.
    """

    def __init__(
        self, params: ParamTable, part: int, parts: int, make: Callable[[ParamMeta], torch.Tensor]
    ) -> None:
        self._params = params
        self._metas = {meta.name: meta for meta in list(params)[part::parts]}
        self._make = make

    def metadata(self) -> ParamTable:
        """Return all parameters."""
        return self._params

    def regions(self) -> Sequence[SourceRegion]:
        """Return this part's."""
        return [SourceRegion(meta.name, Box.whole(meta.shape)) for meta in self._metas.values()]

    def read(self, region: SourceRegion, out: memoryview) -> None:
        """Copy a parameter's bytes into `out`."""
        made = self._make(self._metas[region.name]).reshape(-1).view(torch.uint8)
        torch.frombuffer(out, dtype=torch.uint8).copy_(made)

    def close(self) -> None:
        """Nothing to release."""


class HoldingCrew:
    """Starts a process for every part but the first, which the parameter server's own process holds.

    Use as a context: `ParameterServer(source=crew.source, launch=crew)`.

    Args:
        factory: A module-level function; the processes find it by its file.
        world_size: Number of parts.
        args: Further arguments of the factory; what `multiprocessing` can hand to a new process.

    Attributes:
        source: The first part.
        world_size: Number of parts.
    """

    def __init__(self, factory: SourceFactory, world_size: int, *args: object) -> None:
        self.world_size = world_size
        self.source = factory(0, world_size, *args)
        self._spec = (reference_of(factory), world_size, args)
        self._context = multiprocessing.get_context("spawn")
        self._processes: list[BaseProcess] = []

    @property
    def pids(self) -> list[int]:
        """Process ids of the newest holders, by part, the first left out."""
        return [process.pid or 0 for process in self._processes]

    def hand_out(self, tickets: Sequence[HolderTicket]) -> None:
        """Start a holder per ticket; those of earlier tickets are ended."""
        self.close()
        for ticket in tickets:
            process = self._context.Process(target=_hold, args=(ticket, *self._spec), daemon=True)
            process.start()
            self._processes.append(process)

    def close(self) -> None:
        """End all holders, in whatever state they are; idempotent."""
        for process in self._processes:
            process.kill()
            process.join(10)
        self._processes = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _hold(ticket: HolderTicket, reference: Reference, parts: int, args: tuple[Any, ...]) -> None:
    """Be a holder until the coordinator needs none."""
    torch.set_num_threads(1)
    try:
        Holder(resolve(reference)(ticket.index, parts, *args), ticket, host_settings()).run()
    except HeadraceError:
        os._exit(1)
    os._exit(0)
