"""The error taxonomy: every failure that Headrace raises, and the form in which it crosses a wire.

HeadraceError
├ ConfigError · BackendUnavailableError
├ CheckpointError
├ ManifestMismatchError
├ PlanError
│ ├ UncoveredRegionError
│ └ CapacityError
├ TransportError
│ ├ ConnectError
│ ├ TransferTimeoutError
│ ├ PeerLostError
│ └ TransportClosedError
├ ProtocolError
│ ├ LocalProtocolError
│ ├ RemoteProtocolError
│ └ VersionSkewError
├ ApplyError
├ IntegrityError
├ StepMissedError
└ UpdateFailedError
"""

from __future__ import annotations

import traceback as _traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

WeightsState = Literal["old", "new", "mixed"]


class HeadraceError(Exception):
    """Base of every error Headrace raises; carries where in an update it happened.

    Attributes:
        update_id: Update in which it happened, if any.
        weight_version: Version that was being put in place, if any.
        rank: Worker or holder rank that failed, if any.
        phase: Phase of the update (`stage`, `commit`, ...), if any.
        name: Parameter, file, address or setting that the error is about, if any.
        retryable: Whether the same call may succeed later without a change by the user.
        weights_state: What the engine serves now: all `old`, all `new`, or `mixed`.
        engines: What each engine of a failed update serves now, by address; told in the text where they are several.
        ended: Engines whose held workers ended themselves, as their weights may be mixed; told in the text.
    """

    def __init__(  # noqa: PLR0913 - the context of an update, all optional
        self,
        message: str,
        *,
        update_id: str | None = None,
        weight_version: int | None = None,
        rank: int | None = None,
        phase: str | None = None,
        name: str | None = None,
        retryable: bool = False,
        weights_state: WeightsState = "old",
    ) -> None:
        super().__init__(message)
        self.update_id = update_id
        self.weight_version = weight_version
        self.rank = rank
        self.phase = phase
        self.name = name
        self.retryable = retryable
        self.weights_state: WeightsState = weights_state
        self.engines: Mapping[str, WeightsState] = {}
        self.ended: Sequence[str] = ()

    def __str__(self) -> str:
        text = super().__str__()
        if self.ended:
            text += f"; workers of {', '.join(self.ended)} ended rather than serve a mixture: restart it"
        if len(self.engines) < 2:
            return text
        return f"{text} (weights now: {', '.join(f'{name} {state}' for name, state in self.engines.items())})"


class ConfigError(HeadraceError):
    """A setting is wrong; nothing was started."""


class BackendUnavailableError(HeadraceError):
    """An engine, trainer or transport that was asked for cannot be loaded."""


class CheckpointError(HeadraceError):
    """A checkpoint is damaged, incomplete or contradicts itself."""


class ManifestMismatchError(HeadraceError):
    """A source does not fit the engine's model; `differences` lists all of them."""

    def __init__(self, message: str, differences: Sequence[str] = (), **context: object) -> None:
        super().__init__(message, **context)  # type: ignore[arg-type]
        self.differences = tuple(differences)


class PlanError(HeadraceError):
    """No correct plan exists for what is needed and what is held."""


class UncoveredRegionError(PlanError):
    """Bytes that an engine needs are held by nobody."""


class CapacityError(PlanError):
    """A memory budget is too small for what was asked."""


class TransportError(HeadraceError):
    """Moving bytes failed."""


class ConnectError(TransportError):
    """A peer could not be reached."""


class TransferTimeoutError(TransportError):
    """A peer did not finish within the deadline."""


class PeerLostError(TransportError):
    """A peer broke the connection or died."""


class TransportClosedError(TransportError):
    """This side closed the transport before the call."""


class ProtocolError(HeadraceError):
    """A message did not follow the protocol."""


class LocalProtocolError(ProtocolError):
    """This side was asked for something that its state does not allow."""


class RemoteProtocolError(ProtocolError):
    """A peer sent something that is not a valid message at this point."""


class VersionSkewError(ProtocolError):
    """A peer speaks another protocol version."""


class ApplyError(HeadraceError):
    """The engine refused weights."""


class IntegrityError(HeadraceError):
    """Bytes in place differ from their source."""


@dataclass(frozen=True, slots=True)
class RemoteFailure:
    """One rank's failure as data: what crosses the wire instead of a pickled exception."""

    type_name: str
    message: str
    traceback: str = ""
    phase: str = ""
    name: str = ""
    weights_state: WeightsState = "old"
    details: tuple[str, ...] = ()
    retryable: bool = False

    @classmethod
    def of(
        cls, error: BaseException, *, phase: str = "", weights_state: WeightsState = "old"
    ) -> RemoteFailure:
        """Describe `error`; Headrace errors keep their own phase, name and type."""
        own = error if isinstance(error, HeadraceError) else None
        return cls(
            type_name=type(error).__name__,
            message=str(error) or repr(error),
            traceback="".join(_traceback.format_exception(error)),
            phase=(own.phase if own else None) or phase,
            name=(own.name if own else None) or "",
            weights_state=weights_state,
            details=tuple(getattr(own, "differences", ())),
            retryable=own.retryable if own else False,
        )

    def to_error(self) -> HeadraceError:
        """Rebuild the error as the class of the same name, or as a `HeadraceError` that names the foreign class."""
        kind = _BY_NAME.get(self.type_name)
        message = self.message if kind else f"{self.type_name}: {self.message}"
        context = {
            "phase": self.phase or None,
            "name": self.name or None,
            "weights_state": self.weights_state,
            "retryable": self.retryable,
        }
        error = (kind or HeadraceError)(message, **context)  # type: ignore[arg-type]
        if isinstance(error, ManifestMismatchError):
            error.differences = self.details
        return error


FailureKey = tuple[str, int]


class StepMissedError(HeadraceError):
    """A rank of a trainer does not hold the weights of the step it was asked for (any more); a later one may be had."""


class UpdateFailedError(HeadraceError):
    """An update failed on at least one rank; `failures` holds every one, keyed by (instance, rank)."""

    def __init__(
        self, message: str, failures: Mapping[FailureKey, RemoteFailure] | None = None, **context: object
    ) -> None:
        super().__init__(message, **context)  # type: ignore[arg-type]
        self.failures = dict(failures or {})


def _all_errors(base: type[HeadraceError]) -> dict[str, type[HeadraceError]]:
    found = {base.__name__: base}
    for sub in base.__subclasses__():
        found |= _all_errors(sub)
    return found


_BY_NAME = _all_errors(HeadraceError)
