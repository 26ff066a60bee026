"""Return codes of the CUDA runtime become Headrace errors, and page-locking leaves nothing behind when it fails."""

from __future__ import annotations

import pytest

from headrace.errors import BackendUnavailableError, CapacityError, HeadraceError, TransportError
from headrace.segments import pinning
from headrace.segments.cudart import CudaRuntime, cuda_runtime
from headrace.segments.pinning import PIN_CHUNK_BYTES, PinnedRange


class FakeError:
    restype: object = None

    def __call__(self, code: int) -> bytes:
        return f"error {code}".encode()


class FakeLibrary:
    """Answers as the runtime does, and fails at the chosen registration."""

    def __init__(self, code: int = 0, fail_at: int = 0) -> None:
        self.code, self.fail_at = code, fail_at
        self.registered: list[int] = []
        self.asked_last_error = 0
        self.cudaGetErrorString = FakeError()

    def cudaRuntimeGetVersion(self, version: object) -> int:  # noqa: N802 - the library's names
        return 0

    def cudaHostRegister(self, address: object, size: object, flags: object) -> int:  # noqa: N802
        if self.code and len(self.registered) == self.fail_at:
            return self.code
        self.registered.append(address.value)  # type: ignore[attr-defined]
        return 0

    def cudaHostUnregister(self, address: object) -> int:  # noqa: N802
        self.registered.remove(address.value)  # type: ignore[attr-defined]
        return 0

    def cudaGetLastError(self) -> int:  # noqa: N802
        self.asked_last_error += 1
        return self.code


@pytest.mark.parametrize(
    ("code", "kind", "way_out"),
    [
        (2, CapacityError, "ulimit -l"),
        (801, BackendUnavailableError, "update it"),
        (712, TransportError, "another mapping"),
        (1, TransportError, "report this"),
        (719, TransportError, "restart the engine"),
    ],
)
def test_codes_become_errors_with_a_way_out(code: int, kind: type[HeadraceError], way_out: str) -> None:
    library = FakeLibrary(code)
    with pytest.raises(kind, match=way_out):
        CudaRuntime(library).register(1 << 20, 4096)  # type: ignore[arg-type]
    assert library.asked_last_error == 1


def test_a_failure_unlocks_what_was_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    library = FakeLibrary(2, fail_at=2)
    runtime = CudaRuntime(library)  # type: ignore[arg-type]
    monkeypatch.setattr(pinning, "cuda_runtime", lambda: runtime)
    with pytest.raises(CapacityError):
        PinnedRange(1 << 30, 3 * PIN_CHUNK_BYTES)
    assert library.registered == []


def test_chunks_are_locked_one_by_one_and_unlocked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    library, breaths = FakeLibrary(), []
    runtime = CudaRuntime(library)  # type: ignore[arg-type]
    monkeypatch.setattr(pinning, "cuda_runtime", lambda: runtime)
    pinned = PinnedRange(1 << 30, 2 * PIN_CHUNK_BYTES + 1, lambda: breaths.append(len(library.registered)))
    assert breaths == [1, 2, 3]
    assert library.registered == [(1 << 30) + i * PIN_CHUNK_BYTES for i in range(3)]
    pinned.close()
    pinned.close()
    assert library.registered == []


def test_without_cuda_the_error_says_so() -> None:
    cuda_runtime.cache_clear()
    try:
        cuda_runtime()
    except BackendUnavailableError as error:
        assert "built for CUDA" in str(error)  # noqa: PT017 - a machine with CUDA raises nothing
