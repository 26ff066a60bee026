"""How commands name engines: headers, files of headers, certificates."""

from __future__ import annotations

from pathlib import Path

import pytest

from headrace.cli.options import engine_targets
from headrace.errors import ConfigError


def test_every_engine_gets_the_same_headers_and_certificates(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("Authorization: Bearer a:b\n\n")
    found = engine_targets(["vllm=http://a", "torch=http://b"], ["X-One: 1", f"@{keys}"], Path("ca"), Path("me"), False)
    assert [target.address for target in found] == ["vllm=http://a", "torch=http://b"]
    for target in found:
        assert target.headers == {"X-One": "1", "Authorization": "Bearer a:b"}
        assert (target.verify, target.certificate) == ("ca", "me")
        assert "Bearer" not in repr(target)


@pytest.mark.parametrize("header", ["Authorization", ": value", "Name:", "@/nowhere/keys", "Name: \xe9"])
def test_a_header_that_is_none_is_refused_without_its_value(header: str) -> None:
    with pytest.raises(ConfigError, match="--header"):
        engine_targets(["vllm=http://a"], [header], None, None, False)


def test_unchecked_certificates() -> None:
    assert engine_targets(["vllm=https://a"], None, None, None, True)[0].verify is False
    with pytest.raises(ConfigError, match="contradict"):
        engine_targets(["vllm=https://a"], None, Path("ca"), None, True)
