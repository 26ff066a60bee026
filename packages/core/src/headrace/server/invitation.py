"""Invitation: what a joiner must know of a keeper, as text to hand over and as a metas file."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from headrace.errors import ConfigError
from headrace.wire import PROTOCOL_VERSION

_KIND = "headrace-metas"
_SCHEME = "tcp://"
TOKEN_VARIABLE = "HEADRACE_TOKEN"  # noqa: S105 - the name of a variable


@dataclass(frozen=True, slots=True)
class Invitation:
    """How to reach a keeper; whoever has it may read the weights that are held there.

    Attributes:
        endpoint: ZeroMQ endpoint of the keeper's hub.
        server_key: Its CURVE public key, Z85.
        token: What members present.
    """

    endpoint: str
    server_key: str
    token: str

    @property
    def address(self) -> str:
        """`HOST:PORT`."""
        return self.endpoint.removeprefix(_SCHEME)

    @property
    def secret(self) -> str:
        """Key and token as one word without shell signs."""
        return base64.urlsafe_b64encode(f"{self.server_key} {self.token}".encode()).decode().rstrip("=")

    @classmethod
    def of(cls, address: str, secret: str) -> Invitation:
        """Put together what a keeper printed.

        Raises:
            ConfigError: It is not what a keeper prints.
        """
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise ConfigError(f"{address!r} is no keeper's address; write HOST:PORT", name="--from")
        try:
            text = base64.urlsafe_b64decode(secret.strip() + "=" * (-len(secret.strip()) % 4)).decode()
        except (binascii.Error, UnicodeDecodeError, ValueError):
            text = ""
        key, _, token = text.partition(" ")
        if len(key) != 40 or not token:
            message = "this is no token of a keeper; give the word that `headrace hold` printed after `token`"
            raise ConfigError(message, name="--token")
        return cls(f"{_SCHEME}{address}", key, token)

    def save(self, path: Path, facts: dict[str, object]) -> None:
        """Write a metas file that only its owner may read: address, token, what is held, a digest over all.

        Raises:
            ConfigError: The file cannot be written.
        """
        body: dict[str, object] = {
            "kind": _KIND,
            "protocol": PROTOCOL_VERSION,
            "address": self.address,
            "token": self.secret,
            **facts,
        }
        text = json.dumps(body | {"digest": _digest(body)}, indent=2)
        try:
            path.touch(0o600)
            path.chmod(0o600)
            path.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"metas file {path} cannot be written: {error}", name=str(path)) from error

    @classmethod
    def load(cls, path: Path) -> Invitation:
        """Read a metas file.

        Raises:
            ConfigError: It cannot be read, is of another kind or version, or was edited.
        """
        try:
            body = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise ConfigError(f"metas file {path} cannot be read: {error}", name=str(path)) from error
        if not isinstance(body, dict) or body.get("kind") != _KIND:
            raise ConfigError(
                f"{path} is no metas file of headrace; write one with `headrace hold --save-metas`"
            )
        if body.get("protocol") != PROTOCOL_VERSION:
            message = (
                f"metas file {path} is of protocol {body.get('protocol')}, this is {PROTOCOL_VERSION}; "
                "hold with the same version of headrace"
            )
            raise ConfigError(message, name=str(path))
        digest = body.pop("digest", None)
        if digest != _digest(body):
            message = f"metas file {path} was edited or is damaged: its digest differs; save it anew"
            raise ConfigError(message, name=str(path))
        return cls.of(str(body.get("address")), str(body.get("token")))


def _digest(body: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
