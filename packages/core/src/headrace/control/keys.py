"""Ephemeral keys and one-time tokens: made for one process or one update, never written anywhere."""

from __future__ import annotations

import hmac
import secrets
import threading
from dataclasses import dataclass, field
from typing import Self

import zmq

from headrace.errors import ConfigError


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A CURVE key pair, Z85; `public` may travel, `secret` stays."""

    public: str
    secret: str = field(repr=False)

    @classmethod
    def new(cls) -> Self:
        """Return a fresh random pair."""
        public, secret = zmq.curve_keypair()
        return cls(public.decode(), secret.decode())


def new_token() -> str:
    """Return a fresh token that nobody can guess."""
    return secrets.token_urlsafe(32)


class TokenBook:
    """Which tokens are valid, and for how many more peers. Safe from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._uses: dict[bytes, int] = {}

    def admit(self, token: str, uses: int = 1) -> None:
        """Let `uses` more peers present `token`.

        Raises:
            ConfigError: The token is empty or `uses` is not positive.
        """
        if not token or uses < 1:
            message = f"a token must not be empty and needs at least one use, got {uses}"
            raise ConfigError(message, name="token")
        with self._lock:
            key = token.encode()
            self._uses[key] = self._uses.get(key, 0) + uses

    def revoke(self, token: str) -> None:
        """Make `token` invalid; idempotent. Peers that already presented it stay."""
        with self._lock:
            self._uses.pop(token.encode(), None)

    def spend(self, token: str) -> bool:
        """Use `token` once; return whether it was valid. Takes equally long for every wrong token."""
        given = token.encode()
        with self._lock:
            found = [known for known in self._uses if hmac.compare_digest(known, given)]
            for known in found:
                self._uses[known] -= 1
                if not self._uses[known]:
                    del self._uses[known]
        return bool(found)
