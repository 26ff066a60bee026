"""Fixtures for folders that tests and the servers which they start share; import them where they are wanted."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def socket_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Set the socket folder for this process and the servers that it starts."""
    folder = tmp_path_factory.mktemp("s")
    folder.chmod(0o700)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADRACE_SOCKET_DIR", str(folder))
        yield
