"""The taxonomy, the settings, versions: small promises that other modules rely on."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import headrace
from headrace import errors
from headrace.config import Deadlines, UpdateSettings, cpu_set, host_settings
from headrace.control.hub import Hub
from headrace.errors import ConfigError, HeadraceError, LocalProtocolError
from headrace.server.versions import next_version
from headrace.telemetry import Recorder, chrome_trace
from headrace.transports.tcp_server import TcpServer
from headrace.types import ParamMeta, ParamTable


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    assert errors.__doc__ is not None
    named = {word for word in errors.__doc__.replace("│", " ").split() if word.endswith("Error")}
    real = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, HeadraceError)
    }
    assert named == real


def test_importing_headrace_is_light() -> None:
    code = "import sys, headrace; print([m for m in ('torch', 'zmq', 'transformers') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"


def test_public_names_exist() -> None:
    assert all(hasattr(headrace, name) for name in headrace.__all__)
    with pytest.raises(AttributeError):
        _ = headrace.Nothing  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "wrong",
    [
        {"route": "fast"},
        {"cache": "x"},
        {"verify": "yes"},
        {"version": -1},
        {"bucket_bytes": 1},
        {"budget_bytes": -1},
    ],
)
def test_a_bad_setting_is_named(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as caught:
        UpdateSettings(**wrong)  # type: ignore[arg-type]
    assert caught.value.name in wrong


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf")])
def test_a_deadline_is_a_number_of_seconds(seconds: float) -> None:
    with pytest.raises(ConfigError, match="ready_s is .*; give seconds") as caught:
        Deadlines(ready_s=seconds)
    assert caught.value.name == "ready_s"


def test_the_environment_is_read_in_one_place() -> None:
    host = host_settings(
        {"HEADRACE_SOCKET_DIR": "/x", "HEADRACE_PERMITTED_UIDS": "5, 6", "HEADRACE_BIND": "0.0.0.0"}
    )
    assert str(host.socket_dir) == "/x"
    assert {5, 6} <= host.permitted_uids
    assert host.bind_host == "0.0.0.0"
    with pytest.raises(ConfigError, match="HEADRACE_PERMITTED_UIDS"):
        host_settings({"HEADRACE_PERMITTED_UIDS": "root"})
    assert host.mooncake_cpus is None
    cpu = min(os.sched_getaffinity(0))
    assert host_settings({"HEADRACE_MOONCAKE_CPUS": f"{cpu}-{cpu + 2},77"}).mooncake_cpus == {cpu, cpu + 1, cpu + 2, 77}
    for wrong in ("", "a", "1-", "100000"):
        with pytest.raises(ConfigError, match="--mooncake-cpus"):
            cpu_set(wrong, "--mooncake-cpus")


@pytest.mark.parametrize(
    ("environ", "told"),
    [
        ({}, "127.0.0.1"),
        ({"HEADRACE_BIND": "10.0.0.5"}, "10.0.0.5"),
        ({"HEADRACE_BIND": "0.0.0.0", "HEADRACE_ADVERTISE": "10.0.0.5"}, "10.0.0.5"),
        ({"HEADRACE_BIND": "0.0.0.0"}, None),
        ({"HEADRACE_BIND": "::", "HEADRACE_ADVERTISE": ""}, None),
    ],
)
def test_who_listens_on_every_address_must_say_which_to_dial(environ: dict[str, str], told: str | None) -> None:
    """An engine reads the same variables and listens nowhere, so that reading them is no error."""
    host = host_settings(environ)
    if told is not None:
        assert host.require_advertised() == told
        return
    for listen in (Hub, lambda host: TcpServer(lambda _: None, b"s" * 32, host)):
        with pytest.raises(ConfigError, match="HEADRACE_ADVERTISE"):
            listen(host)


@pytest.mark.parametrize(
    ("served", "wished", "made"),
    [
        ([None, None], None, 1),
        ([0, 0], None, 1),
        ([4, 7], None, 8),
        ([4, 7], 20, 20),
        ([None], 0, 0),
    ],
)
def test_versions_grow(served: list[int | None], wished: int | None, made: int) -> None:
    assert next_version(served, wished) == made


@pytest.mark.parametrize("wished", [0, 6, 7])
def test_a_version_that_does_not_grow_is_refused(wished: int) -> None:
    with pytest.raises(LocalProtocolError, match="an engine serves 7; give at least 8"):
        next_version([7, 3], wished)


def test_a_name_that_occurs_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="occur twice: a"):
        ParamTable([ParamMeta("a", "int8", (1,)), ParamMeta("a", "int8", (2,))])


def test_tables_with_equal_content_have_equal_keys() -> None:
    one, two = (ParamTable([ParamMeta("a", "int8", (1,))]) for _ in range(2))
    assert one.key == two.key
    assert one.key != ParamTable([ParamMeta("a", "int8", (2,))]).key


def test_spans_become_a_trace_that_a_viewer_reads() -> None:
    recorder = Recorder("worker")
    with pytest.raises(ValueError, match="x"), recorder.span("copy", 10):
        raise ValueError("x")
    trace = json.loads(json.dumps(chrome_trace(recorder.drain())))
    names = {event["name"]: event for event in trace["traceEvents"]}
    assert names["copy"]["args"] == {"bytes": 10}
    assert names["thread_name"]["args"] == {"name": "worker"}
    assert recorder.spans == []


@pytest.mark.parametrize("text", ["-1", "much", "nan", "inf"])
def test_reserved_memory_is_a_number_of_gib(text: str) -> None:
    assert host_settings({"HEADRACE_STAGING_GIB": "1.5"}).staging_bytes == 3 << 29
    with pytest.raises(ConfigError, match="HEADRACE_STAGING_GIB"):
        host_settings({"HEADRACE_STAGING_GIB": text})


def test_a_failure_crosses_the_wire_whole() -> None:
    error = LocalProtocolError("busy", phase="stage", name="x", retryable=True)
    rebuilt = errors.RemoteFailure.of(error).to_error()
    assert type(rebuilt) is LocalProtocolError
    for name in ("phase", "name", "retryable"):
        assert getattr(rebuilt, name) == getattr(error, name)
