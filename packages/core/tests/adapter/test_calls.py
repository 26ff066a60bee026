"""Calls into engines of this process: deadlines, errors, event loops; and ranges of versions."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from headrace.adapter.calls import await_within, call_within, check_thread, running_loop, version_number
from headrace.adapter.versions import Supported
from headrace.config import Deadlines
from headrace.errors import BackendUnavailableError, ConfigError, RemoteProtocolError, TransferTimeoutError
from headrace.protocols import Ticket
from headrace.server.parameter_server import ParameterServer
from headrace.testing.local_engine import LocalEngine
from headrace.testing.recipe_backend import RecipeBackend
from headrace.testing.shapes import ModelShape, params_of, tp_recipe
from headrace.types import WorkerId

PARAMS = params_of(ModelShape(layers=1, hidden=16, vocab=70, heads=2, kv_heads=1, head_dim=8, intermediate=24))


@pytest.fixture(params=["running", "standing"])
def loop(request: pytest.FixtureRequest) -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop in a thread of its own, and one that stands still."""
    made = asyncio.new_event_loop()
    if request.param == "standing":
        yield made
    else:
        thread = threading.Thread(target=made.run_forever)
        thread.start()
        yield made
        made.call_soon_threadsafe(made.stop)
        thread.join(10)
    made.close()


async def answer(value: int, after_s: float = 0.0) -> int:
    await asyncio.sleep(after_s)
    if value < 0:
        raise KeyError(value)
    return value


def test_a_coroutine_answers_fails_or_is_late(loop: asyncio.AbstractEventLoop) -> None:
    assert await_within("engine", 10, answer(7), loop) == 7
    with pytest.raises(RemoteProtocolError, match="engine: KeyError: -1"):
        await_within("engine", 10, answer(-1), loop)
    with pytest.raises(TransferTimeoutError, match="engine did not answer within 0.05 s"):
        await_within("engine", 0.05, answer(7, 30), loop)
    assert await_within("engine", 10, answer(8), loop) == 8


def test_a_timeout_of_the_engine_is_not_the_deadline(loop: asyncio.AbstractEventLoop) -> None:
    async def give_up() -> None:
        raise TimeoutError("the scheduler is silent")

    with pytest.raises(RemoteProtocolError, match="engine: TimeoutError: the scheduler is silent"):
        await_within("engine", 10, give_up(), loop)


def test_a_loop_is_not_made_to_wait_for_itself() -> None:
    async def forgetful() -> int:
        loop = asyncio.get_running_loop()
        with pytest.raises(ConfigError, match=r"await asyncio\.to_thread\(server\.update, control\)"):
            await_within("engine", 0.5, answer(7), loop)
        return await asyncio.to_thread(await_within, "engine", 10, answer(8), loop)

    assert asyncio.run(forgetful()) == 8


class LoopedEngine(LocalEngine):
    """Does its calls in an event loop, as engine objects that serve in one do."""

    def __init__(self, name: str, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__([RecipeBackend(tp_recipe(PARAMS, 1, 0, kv_heads=1), WorkerId(name, 0), 1)])
        self._loop = loop

    def check_thread(self) -> None:
        check_thread(self.address, self._loop)

    def enrol(self, ticket: Ticket, deadline_s: float) -> None:
        async def hand_out() -> None:
            LocalEngine.enrol(self, ticket, deadline_s)

        await_within(self.address, deadline_s, hand_out(), self._loop)


@pytest.mark.usefixtures("socket_dir")
def test_an_update_of_several_engines_does_not_block_their_loop() -> None:
    """Calls to several are made in other threads, which see nothing of the loop that waits for them."""

    async def forgetful() -> int:
        engines = [LoopedEngine(name, asyncio.get_running_loop()) for name in ("a", "b")]
        tensors = {m.name: torch.zeros(m.shape, dtype=torch.bfloat16) for m in PARAMS}
        try:
            with ParameterServer(tensors=tensors) as server:
                with pytest.raises(ConfigError, match=r"await asyncio\.to_thread\(server\.update, control\)"):
                    server.update(engines, deadlines=Deadlines(enrol_s=2.0))
                return (await asyncio.to_thread(server.update, engines)).version
        finally:
            for engine in engines:
                engine.close()

    assert asyncio.run(forgetful()) == 1


def test_a_call_answers_fails_or_is_late() -> None:
    assert call_within("engine", 10, lambda: None) is None
    with pytest.raises(ConfigError, match="own words"):
        call_within("engine", 10, refuse)
    with pytest.raises(TransferTimeoutError, match="engine did not answer"):
        call_within("engine", 0.05, lambda: time.sleep(2))


def refuse() -> None:
    raise ConfigError("own words")


def test_there_is_a_loop_or_a_word_about_it() -> None:
    with pytest.raises(ConfigError, match="attach an engine inside its event loop"):
        running_loop("an engine")

    async def inside() -> bool:
        return running_loop("an engine") is asyncio.get_running_loop()

    assert asyncio.run(inside())


@pytest.mark.parametrize(("said", "number"), [("7", 7), ("default", None), (None, None), (3, None)])
def test_versions_as_engines_spell_them(said: object, number: int | None) -> None:
    assert version_number(said) == number


def test_ranges_of_versions() -> None:
    known = Supported("Engine", "headrace-engine", oldest=(0, 26), newest=(0, 32))
    assert str(known) == "0.26.0 to 0.32.x"
    for version in ("0.26.0", "0.32.9rc1", "0.0.0.dev7", "dev"):
        known.check(version)
    with pytest.raises(BackendUnavailableError, match="upgrade Engine"):
        known.check("0.25.9")
    with pytest.raises(BackendUnavailableError, match="upgrade headrace-engine"):
        known.check("0.33.0")
