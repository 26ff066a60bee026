"""LocalEngine: an engine whose workers are backends of this process; for conformance suites and state machines."""

from __future__ import annotations

from collections.abc import Sequence

from headrace.protocols import InferenceBackend, Ticket
from headrace.receiver import Receiver
from headrace.types import CacheMode


class LocalEngine:
    """EngineControl over receivers in this process; pause and resume only count, as nothing runs.

    Attributes:
        receivers: One per backend, by rank.
        paused: Whether it is paused.
        pauses: How often it was.
    """

    def __init__(self, backends: Sequence[InferenceBackend]) -> None:
        self.receivers = [Receiver(backend) for backend in backends]
        self.paused = False
        self.pauses = 0

    @property
    def address(self) -> str:
        """A name for messages."""
        return f"local engine {self.receivers[0].backend.identity().worker.instance}"

    def wait_ready(self, deadline_s: float) -> None:
        """Return at once."""

    def expected_receivers(self, deadline_s: float) -> int:  # noqa: ARG002 - the contract's signature
        """Return the number of backends."""
        return len(self.receivers)

    def enrol(self, ticket: Ticket, deadline_s: float) -> None:  # noqa: ARG002
        """Hand the ticket to every receiver."""
        for receiver in self.receivers:
            receiver.enrol(ticket)

    def pause(self, cache: CacheMode, deadline_s: float) -> None:  # noqa: ARG002
        """Note the pause."""
        self.paused = True
        self.pauses += 1

    def confirm(self, version: int, deadline_s: float) -> None:
        """Do nothing: the workers report the version."""

    def resume(self, deadline_s: float) -> None:  # noqa: ARG002
        """Note the end of the pause."""
        self.paused = False

    def served_version(self, deadline_s: float) -> int | None:  # noqa: ARG002
        """Return the version that all receivers report."""
        versions = {receiver.served_version for receiver in self.receivers}
        return versions.pop() if len(versions) == 1 else None

    def close(self) -> None:
        """Close the receivers."""
        for receiver in self.receivers:
            receiver.close()
