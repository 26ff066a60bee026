"""Calls into engines of this process: deadlines, errors, event loops; and ranges of versions."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator

import pytest

from headrace.adapter.calls import await_within, call_within, running_loop, version_number
from headrace.adapter.versions import Supported
from headrace.errors import BackendUnavailableError, ConfigError, RemoteProtocolError, TransferTimeoutError


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
