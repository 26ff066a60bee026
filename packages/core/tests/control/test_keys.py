"""Keys and tokens."""

from __future__ import annotations

import pytest

from headrace.control.keys import KeyPair, TokenBook, new_token
from headrace.errors import ConfigError


def test_key_pairs_are_fresh_and_hide_their_secret() -> None:
    first, second = KeyPair.new(), KeyPair.new()
    assert first.public != second.public
    assert len(first.public) == len(first.secret) == 40
    assert first.secret not in repr(first)


def test_a_token_is_valid_for_as_many_peers_as_were_expected() -> None:
    book, token = TokenBook(), new_token()
    book.admit(token, uses=2)
    assert [book.spend(token) for _ in range(3)] == [True, True, False]


def test_a_revoked_or_foreign_token_is_not_valid() -> None:
    book, token = TokenBook(), new_token()
    book.admit(token)
    book.revoke(token)
    book.revoke(token)
    assert not book.spend(token)
    assert not book.spend("")
    assert not book.spend("Tökén")


@pytest.mark.parametrize(("token", "uses"), [("", 1), ("x", 0)])
def test_admitting_nothing_is_refused(token: str, uses: int) -> None:
    with pytest.raises(ConfigError):
        TokenBook().admit(token, uses)
