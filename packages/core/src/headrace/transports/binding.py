"""Which program makes a table's copies: by where its destinations lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from headrace.plan import CopyTable
from headrace.transports.program import CopyProgram


class Program(Protocol):
    """Copies bound to memory. Call order: 1. `run`. 2. `finish`. Both again, as often as wished."""

    def run(self) -> None:
        """Copy everything once; on a GPU only enqueue it on the current stream."""
        ...

    def finish(self, deadline_s: float) -> None:
        """Wait until what `run` began is done.

        Raises:
            TransferTimeoutError: Not within the deadline.
        """
        ...

    def differences(self) -> list[int]:
        """Return the rows whose destination does not have the bits that `run` writes, in ascending order."""
        ...


def bind_copies(
    copies: CopyTable,
    sources: Sequence[torch.Tensor],
    destinations: Sequence[torch.Tensor],
    *,
    undisturbed: bool = False,
    gentle: bool = False,
    peers: frozenset[int] = frozenset(),
) -> Program:
    """Return a program for `copies`; see CopyProgram and CudaProgram for the arguments.

    Raises:
        PlanError: A row reaches outside its memory, or a destination has another dtype.
    """
    used = np.unique(copies.dst_block).tolist()
    device = next((destinations[i].device for i in used if destinations[i].is_cuda), None)
    if device is None:
        return CopyProgram(copies, sources, destinations, undisturbed=undisturbed)
    from headrace.transports.cuda_program import CudaProgram  # noqa: PLC0415 - hosts without a GPU do without

    return CudaProgram(copies, sources, destinations, device, gentle=gentle, peers=peers)
