"""`serve` in a process of its own, over real HTTP: completions, control, and that nothing is left behind."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors import safe_open

from headrace.embedded.control import TorchControl
from headrace.embedded.server import serve
from headrace.embedded.settings import EngineSettings
from headrace.errors import ConfigError, ConnectError, HeadraceError, PeerLostError
from headrace.protocols import EngineControl, Ticket
from headrace.testing.leaks import children

_SERVE = """
import sys, json
from pathlib import Path
from headrace.embedded.server import serve
from headrace.embedded.settings import EngineSettings
options = json.loads(sys.argv[2])
serve(EngineSettings(model=Path(sys.argv[1]), port=0, **options), announce=lambda url: print(url, flush=True))
"""
KEY = {"Authorization": "Bearer secret"}
ENDLESS = {"prompt": "the river", "max_tokens": 2000, "temperature": 0, "stream": True, "ignore_eos": True}


@contextmanager
def serving(model: Path, **options: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVE, str(model), json.dumps(options)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    assert process.stdout is not None
    try:
        yield process, process.stdout.readline().strip()
    finally:
        process.terminate()
        try:
            process.wait(15)
        finally:
            process.kill()
            process.stdout.close()


@pytest.fixture(scope="module")
def server(checkpoints: dict[str, Path]) -> Iterator[str]:
    with serving(checkpoints["qwen3"], tp=2, api_key="secret", served_name="tiny") as (_, url):
        control = TorchControl(url, KEY)
        control.wait_ready(60.0)
        control.close()
        yield url


@pytest.fixture
def client(server: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server, headers=KEY, timeout=30, trust_env=False) as client:
        yield client


@pytest.fixture
def control(server: str) -> Iterator[TorchControl]:
    control = TorchControl(server, KEY)
    yield control
    control.close()


def events_of(response: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in response.iter_lines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


def workers_of(url: str, headers: dict[str, str] | None = None) -> list[int]:
    status = httpx.get(f"{url}/headrace/status", headers=headers, timeout=30, trust_env=False).json()
    return [rank["pid"] for rank in status["ranks"]]


def wait_gone(pids: list[int], deadline_s: float = 10.0) -> None:
    end = time.monotonic() + deadline_s
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < end, f"processes {pids} are still there"
        time.sleep(0.02)


def test_streamed_and_whole_answers_agree(client: httpx.Client) -> None:
    body = {"model": "tiny", "prompt": "the river", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    whole = client.post("/v1/completions", json=body).json()
    choice = whole["choices"][0]
    assert choice["weight_versions"] == [[0, 0, 12]]
    assert (choice["finish_reason"], len(choice["token_ids"])) == ("length", 12)
    assert whole["usage"]["total_tokens"] == whole["usage"]["prompt_tokens"] + 12
    with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        chunks = [event["choices"][0] for event in events_of(response)]
    assert "".join(chunk["text"] for chunk in chunks) == choice["text"]
    assert [token for chunk in chunks for token in chunk["token_ids"]] == choice["token_ids"]
    assert {chunk["weight_version"] for chunk in chunks} == {0}
    assert [chunk["finish_reason"] for chunk in chunks] == [None] * 12 + ["length"]
    assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"n": 2}, "n=2"),
        ({"top_p": 0.5}, "top_p"),
        ({"model": "gpt"}, "tiny"),
        ({"prompt": None}, "not a completion request"),
        ({"prompt": []}, "empty"),
        ({"prompt": [99999]}, "vocabulary"),
        ({"max_tokens": 99999}, "positions"),
    ],
)
def test_requests_that_cannot_be_served_are_refused(
    client: httpx.Client, change: dict[str, Any], text: str
) -> None:
    response = client.post("/v1/completions", json={"prompt": "the river"} | change)
    assert response.status_code == 400
    assert text in response.json()["error"]["message"]


def test_control_pauses_and_resumes_a_stream(client: httpx.Client, control: TorchControl) -> None:
    assert isinstance(control, EngineControl)
    control.wait_ready(10.0)
    assert control.expected_receivers(10.0) == 2
    assert control.served_version(10.0) == 0
    assert client.get("/headrace/status").json()["paused"] is False
    control.pause("keep", 10.0)
    control.pause("recompute", 10.0)
    with client.stream("POST", "/v1/completions", json=ENDLESS | {"max_tokens": 5}) as response:
        assert client.get("/health").json()["paused"] is True
        control.resume(10.0)
        control.resume(10.0)
        assert sum(len(event["choices"][0]["token_ids"]) for event in events_of(response)) == 5
    assert client.get("/health").json()["mixed_steps"] == 0


def test_a_client_that_leaves_is_forgotten(client: httpx.Client) -> None:
    with client.stream("POST", "/v1/completions", json=ENDLESS) as response:
        next(events_of(response))
    end = time.monotonic() + 10
    while client.get("/health").json()["num_requests"]:
        assert time.monotonic() < end, "the request is still there"
        time.sleep(0.02)


def test_bad_calls_name_what_is_wrong(client: httpx.Client, server: str) -> None:
    assert client.post("/pause?cache=maybe").status_code == 400
    assert client.post("/pause?timeout_s=nan").status_code == 400
    assert client.post("/headrace/enrol", content=b"{}").json()["error"]["type"] == "ConfigError"
    stranger = TorchControl(server, {"Authorization": "Bearer wrong"})
    with pytest.raises(ConfigError, match="API key"):
        stranger.pause("keep", 5.0)
    stranger.close()


def test_a_ticket_reaches_every_receiver(server: str, control: TorchControl) -> None:
    with socket.create_server(("127.0.0.1", 0)) as coordinator:
        endpoint = f"tcp://127.0.0.1:{coordinator.getsockname()[1]}"
        ticket = Ticket("update", endpoint, "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7", "token")
        control.enrol(ticket, 30.0)
        coordinator.settimeout(20)
        for _ in range(2):
            coordinator.accept()[0].close()


@pytest.mark.parametrize("rank", [0, 1])
def test_fingerprints_are_those_of_the_file(
    client: httpx.Client, checkpoints: dict[str, Path], rank: int
) -> None:
    prints = client.get("/headrace/fingerprints").json()["ranks"][rank]["tensors"]
    with safe_open(checkpoints["qwen3"] / "model.safetensors", "pt") as reader:
        names = set(reader.keys())
        for entry in prints:
            (box,) = entry["boxes"]
            index = tuple(slice(o, o + n) for o, n in zip(box["offsets"], box["shape"], strict=True))
            shard = reader.get_tensor(entry["name"])[index].contiguous()
            assert hashlib.sha256(shard.view(-1).view(torch.uint8).numpy()).hexdigest() == entry["sha256"]
            assert list(shard.shape) == entry["local_shape"]
    assert {entry["name"] for entry in prints} == names


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1", "http://no-such-host.invalid", "ftp://127.0.0.1", "not a url"]
)
def test_a_wrong_address_is_an_error_with_the_address(url: str) -> None:
    control = TorchControl(url)
    begin = time.monotonic()
    with pytest.raises(ConnectError) as caught:
        control.wait_ready(0.5)
    assert time.monotonic() - begin < 5
    assert url in str(caught.value)
    assert "health" in str(caught.value)
    with pytest.raises(HeadraceError, match="reached"):
        control.resume(0.5)
    control.close()


def test_a_dead_worker_shows_in_health_and_streams(checkpoints: dict[str, Path]) -> None:
    with (
        serving(checkpoints["qwen3"]) as (_, url),
        httpx.Client(base_url=url, timeout=20, trust_env=False) as client,
    ):
        control = TorchControl(url)
        control.wait_ready(60.0)
        with client.stream("POST", "/v1/completions", json=ENDLESS) as response:
            events = events_of(response)
            next(events)
            os.kill(workers_of(url)[0], signal.SIGKILL)
            *_, last = events
        assert last["error"]["type"] == "PeerLostError"
        health = client.get("/health")
        assert health.status_code == 503
        assert "SIGKILL" in health.json()["reason"]
        assert client.post("/v1/completions", json={"prompt": "the"}).status_code == 503
        with pytest.raises(ConnectError, match="SIGKILL"):
            control.wait_ready(30.0)
        with pytest.raises(PeerLostError):
            control.pause("keep", 5.0)
        control.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_the_front(checkpoints: dict[str, Path], number: signal.Signals) -> None:
    with serving(checkpoints["qwen3"], tp=2) as (process, url):
        control = TorchControl(url)
        control.wait_ready(60.0)
        control.close()
        pids = workers_of(url)
        address = f"{url}/v1/completions"
        with httpx.stream("POST", address, json=ENDLESS, timeout=20, trust_env=False) as response:
            events = events_of(response)
            next(events)
            process.send_signal(number)
            if number == signal.SIGTERM:
                *_, last = events
                assert "stopped" in last["error"]["message"]
        assert process.wait(10) == (0 if number == signal.SIGTERM else -signal.SIGKILL)
        wait_gone(pids)


def test_ctrl_c_while_the_workers_load_ends_them_at_once(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """And without a word of theirs: a terminal sends it to the whole process group, and the front decides."""
    command = [sys.executable, "-m", "headrace", "engine", "--model", str(checkpoints["qwen3"]), "--port", "0"]
    with (tmp_path / "log").open("w+") as log, subprocess.Popen(command, stderr=log, start_new_session=True) as front:
        end = time.monotonic() + 60
        while not (pids := children(front.pid)):
            assert time.monotonic() < end
            time.sleep(0.02)
        time.sleep(0.3)
        os.killpg(front.pid, signal.SIGINT)
        begin = time.monotonic()
        assert front.wait(30) == 0
        assert time.monotonic() - begin < 5.0, "not as long as it waits for workers that serve"
        wait_gone(pids)
        log.seek(0)
        assert log.read() == ""


def test_a_start_that_fails_ends_the_server(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    (tmp_path / "config.json").write_bytes((checkpoints["qwen3"] / "config.json").read_bytes())
    with pytest.raises(ConfigError, match="tokenizer"):
        serve(EngineSettings(model=tmp_path, port=0))
    for file in checkpoints["qwen3"].glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(HeadraceError, match=r"worker 0: .*safetensors"):
        serve(EngineSettings(model=tmp_path, port=0))
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match="port"):
        serve(EngineSettings(model=tmp_path, port=taken.getsockname()[1]))
