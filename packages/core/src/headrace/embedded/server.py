"""Serving an embedded engine over HTTP until a signal ends it."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING

from headrace.embedded.engine import EmbeddedEngine
from headrace.embedded.text import LazyTokenizer
from headrace.errors import BackendUnavailableError, ConfigError, HeadraceError

if TYPE_CHECKING:
    import uvicorn

    from headrace.embedded.settings import EngineSettings

_logger = logging.getLogger(__name__)


def serve(settings: EngineSettings, announce: Callable[[str], None] | None = None) -> None:
    """Start an engine and answer HTTP until SIGTERM or SIGINT; no process is left behind. Blocking.

    Args:
        settings: The engine's settings.
        announce: Called with the base URL as soon as the port is open; the model may still be loading then.

    Raises:
        BackendUnavailableError: The extra `headrace[engine]` is not installed.
        ConfigError: The port cannot be opened.
        HeadraceError: The model could not be loaded.
    """
    engine = EmbeddedEngine(settings)
    tokenizer = LazyTokenizer(settings.model)
    failures: list[HeadraceError] = []
    server = _http_server(engine, tokenizer)
    with contextlib.closing(_listen(settings)) as listener, _signals(server, engine):
        try:
            engine.start()
            threading.Thread(
                target=_watch_start, args=(server, engine, tokenizer, failures), daemon=True
            ).start()
            host, port = listener.getsockname()[:2]
            _logger.info("serving %s at http://%s:%d", settings.name, host, port)
            if announce is not None:
                announce(f"http://{host}:{port}")
            server.run(sockets=[listener])
        finally:
            engine.stop()
    if failures:
        raise failures[0]


def _http_server(engine: EmbeddedEngine, tokenizer: LazyTokenizer) -> uvicorn.Server:
    try:
        import uvicorn  # noqa: PLC0415 - the extra `engine`

        from headrace.embedded.web import make_app  # noqa: PLC0415
    except ImportError as error:
        message = f"the embedded engine cannot serve: {error}; install headrace[engine]"
        raise BackendUnavailableError(message, name=error.name) from error

    class Server(uvicorn.Server):
        """uvicorn without signal handlers of its own, which would end the process before the workers."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    config = uvicorn.Config(
        make_app(engine, tokenizer),
        log_level="warning",
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=5,
    )
    return Server(config)


def _listen(settings: EngineSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listener = socket.create_server((settings.host, settings.port), family=family)
    except OSError as error:
        message = f"cannot listen on {settings.host}:{settings.port}: {error.strerror}; choose another --host or --port"
        raise ConfigError(message, name="port") from error
    # asyncio sees no TCP in a socket made elsewhere, and Nagle would hold every answer's body back for 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


@contextlib.contextmanager
def _signals(server: uvicorn.Server, engine: EmbeddedEngine) -> Iterator[None]:
    """End cleanly on the first SIGTERM or SIGINT, at once on the second; needs the main thread."""

    def end(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the signal module's contract
        server.force_exit = server.should_exit
        server.should_exit = True
        threading.Thread(target=engine.stop, daemon=True, name="stop").start()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch_start(
    server: uvicorn.Server, engine: EmbeddedEngine, tokenizer: LazyTokenizer, failures: list[HeadraceError]
) -> None:
    """Load the tokenizer while the workers load the model; note why either fails, and end the server."""
    try:
        tokenizer.get()
        engine.wait_ready(engine.settings.start_s + 60.0)
    except HeadraceError as error:
        if engine.health()["status"] != "stopped":
            failures.append(error)
        server.should_exit = True
