"""HoldCall: the one call to an engine that holds its workers, in a thread of its own."""

from __future__ import annotations

import threading

from headrace.errors import HeadraceError, RemoteProtocolError, TransferTimeoutError
from headrace.protocols import EngineControl, HoldingControl


class HoldCall:
    """A running `HoldingControl.hold`; the constructor starts it.

    Args:
        control: Of the engine.
        update_id: The update whose receivers let go.
        deadline_s: Limit of the call.
    """

    def __init__(self, control: EngineControl, update_id: str, deadline_s: float) -> None:
        self._address = control.address
        self._error: BaseException | None = None
        self._thread = threading.Thread(
            target=self._run, args=(control, update_id, deadline_s), name="headrace-hold", daemon=True
        )
        self._thread.start()

    def check(self) -> None:
        """Do nothing while workers stand or wait for their turn to.

        Raises:
            HeadraceError: The call has failed.
            RemoteProtocolError: It has ended and nobody stands.
        """
        if self._thread.is_alive():
            return
        self._raise()
        message = f"{self._address} went on before its workers were asked to; is another update at work?"
        raise RemoteProtocolError(message, name=self._address, phase="prepare", retryable=True)

    def wait(self, deadline_s: float) -> None:
        """Wait until the workers have gone on.

        Raises:
            HeadraceError: The call has failed.
            TransferTimeoutError: They have not within the deadline.
        """
        self._thread.join(deadline_s)
        if self._thread.is_alive():
            message = f"{self._address} did not say within {deadline_s:g} s that its workers go on"
            raise TransferTimeoutError(message, name=self._address, phase="finish")
        self._raise()

    def _raise(self) -> None:
        if isinstance(self._error, HeadraceError):
            raise self._error
        if self._error is not None:
            message = f"{self._address}: {type(self._error).__name__}: {self._error}"
            raise RemoteProtocolError(message, name=self._address) from self._error

    def _run(self, control: EngineControl, update_id: str, deadline_s: float) -> None:
        try:
            if isinstance(control, HoldingControl):
                control.hold(update_id, deadline_s)
        except Exception as error:  # noqa: BLE001 - carried to the thread that waits
            self._error = error
