"""Which versions of an engine an adapter works with."""

from __future__ import annotations

import re
from dataclasses import dataclass

from headrace.errors import BackendUnavailableError


@dataclass(frozen=True, slots=True)
class Supported:
    """A range of engine versions, both ends included, compared by as many numbers as they have.

    Attributes:
        engine: As its people write it.
        distribution: The adapter's own.
        oldest: Such as `(0, 26)`.
        newest: Such as `(0, 32)`: every patch release of it.
    """

    engine: str
    distribution: str
    oldest: tuple[int, ...]
    newest: tuple[int, ...]

    def __str__(self) -> str:
        """Return the range for people, such as `0.26.0 to 0.32.x`."""
        first, last = (".".join(map(str, ends)) for ends in (self.oldest, self.newest))
        return f"{first}{'.0' * (3 - len(self.oldest))} to {last}{'.x' * (3 - len(self.newest))}"

    def check(self, version: str) -> None:
        """Refuse a version out of range; builds without a version number (`dev`) pass.

        Raises:
            BackendUnavailableError: Names the version and those that work.
        """
        found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version)
        number = tuple(int(part or 0) for part in found.groups()) if found else (0, 0, 0)
        if number == (0, 0, 0) or (self.oldest <= number and number[: len(self.newest)] <= self.newest):
            return
        if number < self.oldest:
            way_out = f"upgrade {self.engine}"
        else:
            way_out = f"upgrade {self.distribution}, or take an older {self.engine}"
        message = f"{self.distribution} works with {self.engine} {self}; installed is {version}; {way_out}"
        raise BackendUnavailableError(message, name=self.engine.lower())
