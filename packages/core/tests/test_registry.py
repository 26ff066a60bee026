"""Entry points: one name is loaded, and a failure says what there is and why the rest is not."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import pytest

from headrace import registry
from headrace.config import EngineTarget
from headrace.errors import BackendUnavailableError, ConfigError

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Put distributions with entry points and modules on sys.path, as pip would."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)

    def add(distribution: str, group: str, points: dict[str, str], **modules: str) -> None:
        info = tmp_path / f"{distribution.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        lines = [f"[{group}]", *(f"{name} = {value}" for name, value in points.items())]
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
        for module, text in modules.items():
            (tmp_path / f"{module}.py").write_text(text)

    yield add
    for module in set(sys.modules) - before:
        if module.startswith("acme"):
            del sys.modules[module]


def test_load_imports_only_what_was_asked_for(install: Install) -> None:
    install(
        "acme-wires",
        "headrace.transports",
        {"pigeon": "acme_pigeon:Pigeon", "smoke": "acme_smoke:Smoke"},
        acme_pigeon="class Pigeon:\n    speed = 80\n",
        acme_smoke="raise RuntimeError('no fire')\n",
    )
    assert registry.load("headrace.transports", "pigeon").speed == 80
    assert "acme_smoke" not in sys.modules


def test_a_transport_that_nobody_knows_is_refused_and_others_are_not_imported(install: Install) -> None:
    install("acme-wires", "headrace.transports", {"smoke": "acme_smoke:Smoke"}, acme_smoke="raise RuntimeError\n")
    for name in ("auto", "collective", "memory", "tcp", "mooncake", "smoke"):
        registry.check_transport(name)
    with pytest.raises(ConfigError, match=r"choose one of auto, collective, memory, mooncake, smoke, tcp\..* here too"):
        registry.check_transport("drum")
    assert "acme_smoke" not in sys.modules


def test_missing_name_lists_usable_and_broken_ones(install: Install) -> None:
    install(
        "acme-wires",
        "headrace.transports",
        {"pigeon": "acme_pigeon:Pigeon", "smoke": "acme_smoke:Smoke"},
        acme_pigeon="class Pigeon: ...\n",
        acme_smoke="import acme_matches\n",
    )
    with pytest.raises(BackendUnavailableError) as caught:
        registry.load("headrace.transports", "drum")
    message = str(caught.value)
    assert "transport 'drum' is not available" in message
    assert "pigeon" in message.split("Usable transports:")[1].split(";")[0]
    assert "smoke: import failed: ModuleNotFoundError: No module named 'acme_matches'" in message
    assert caught.value.name == "drum"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("import acme_absent", "ModuleNotFoundError: No module named 'acme_absent'"),
        ("raise RuntimeError('driver too old')", "RuntimeError: driver too old"),
        ("raise OSError('libfoo.so.1: cannot open')", "OSError: libfoo.so.1"),
        ("pass", "AttributeError"),
        ("def broken(:", "SyntaxError"),
    ],
)
def test_broken_import_is_the_cause(install: Install, body: str, expected: str) -> None:
    install("acme-engine", "headrace.engines", {"acme": "acme_engine:Control"}, acme_engine=body + "\n")
    with pytest.raises(BackendUnavailableError, match="its import failed") as caught:
        registry.load("headrace.engines", "acme")
    assert expected in str(caught.value)
    assert caught.value.__cause__ is not None
    assert expected in registry.available("headrace.engines")["acme"]


def test_two_distributions_with_one_name_are_refused(install: Install) -> None:
    for owner in ("acme-one", "acme-two"):
        module = owner.replace("-", "_")
        install(owner, "headrace.engines", {"acme": f"{module}:Control"}, **{module: "class Control: ...\n"})
    with pytest.raises(BackendUnavailableError, match="acme-one .*acme-two .*uninstall all but one"):
        registry.load("headrace.engines", "acme")


def test_known_but_absent_names_say_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if "site-packages" not in entry])
    engines, transports = registry.available("headrace.engines"), registry.available("headrace.transports")
    assert engines["vllm"] == "not installed; pip install 'headrace-vllm'"
    assert transports["mooncake"] == "not installed; pip install 'headrace[p2p]'"


@pytest.mark.parametrize("group", registry.GROUPS)
def test_known_names_are_always_listed(group: registry.Group) -> None:
    assert set(registry.KNOWN[group]) <= set(registry.available(group))


def test_every_declared_entry_point_exists() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    for group, points in project["entry-points"].items():
        assert group in registry.GROUPS
        for value in points.values():
            module, _, attribute = value.partition(":")
            assert hasattr(import_module(module), attribute), value


CONTROL = """
class Control:
    def __init__(self, url, *, headers=None, verify=True):
        self.address, self.headers, self.verify = url, headers, verify
"""


def test_engine_control_hands_over_address_headers_and_verify(install: Install) -> None:
    install("acme-engine", "headrace.engines", {"acme": "acme_engine:Control"}, acme_engine=CONTROL)
    target = EngineTarget("acme=https://host:8443/v1/", headers={"X-Key": "k"}, verify=False)
    control = registry.engine_control(target)
    assert control.address == "https://host:8443/v1"
    assert (control.headers, control.verify) == ({"X-Key": "k"}, False)  # type: ignore[attr-defined]
    assert registry.engine_control("acme=http://[::1]:8000").address == "http://[::1]:8000"


@pytest.mark.parametrize(("verify", "certificate"), [("missing.pem", None), (True, "missing.pem"), (__file__, None)])
def test_unusable_certificates_are_named(install: Install, verify: bool | str, certificate: str | None) -> None:
    install("acme-engine", "headrace.engines", {"acme": "acme_engine:Control"}, acme_engine=CONTROL)
    with pytest.raises(ConfigError, match="PEM files") as caught:
        registry.engine_control(EngineTarget("acme=https://host", {}, verify, certificate))
    assert str(certificate or verify) in str(caught.value)


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("", "no engine name"),
        ("http://host:8000", "no engine name before"),
        ("=http://host:8000", "no engine name"),
        ("http://host/?key=1", "no engine name"),
        ("torch=", "http://"),
        ("torch=host:8000", "does not begin with http"),
        ("torch=http://", "no host"),
        ("torch=http://:8000", "no host"),
        ("torch=http://host:eighty", "not a URL"),
        ("torch=http://host:99999", "not a URL"),
        ("torch=http://[::1", "not a URL"),
    ],
)
def test_bad_targets_show_examples(target: str, reason: str) -> None:
    with pytest.raises(ConfigError, match="torch=http://127.0.0.1:8000") as caught:
        registry.engine_control(target)
    assert reason in str(caught.value)
    assert caught.value.name == target


def test_unknown_engine_is_named() -> None:
    with pytest.raises(BackendUnavailableError, match="engine 'tgi' is not available"):
        registry.engine_control("tgi=http://host:8000")
