"""The reference InferenceBackend: one worker of a transformers model, whole or split by its own plan."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers

from headrace.embedded.messages import Fingerprint, Seen, ShardBox
from headrace.embedded.naming import CheckpointNaming
from headrace.embedded.weights import ShardLoader, loadable_tensors, local_tensor, shard_layout
from headrace.protocols import Skeleton, WorkerIdentity
from headrace.segments.cuda import uuid_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from headrace.protocols import NamedTensors
    from headrace.types import WorkerId


class TorchBackend:
    """InferenceBackend over a transformers model in this process.

    Weights keep their loader's layout, so there is no reload life cycle, and nothing is derived from them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        worker: WorkerId,
        *,
        world_size: int = 1,
        source: str | None = None,
        version: int | None = None,
    ) -> None:
        whole = dict(loadable_tensors(model))
        self._model = model
        self._layouts = {name: shard_layout(tensor) for name, tensor in whole.items()}
        self._live = {name: local_tensor(tensor) for name, tensor in whole.items()}
        self._naming = CheckpointNaming(model)
        self._identity = _identity(model, worker, world_size)
        self._source = source
        self._version = version
        self._epoch = 0

    @property
    def seen(self) -> Seen:
        """Version and commit epoch of the weights at this moment."""
        return Seen(self._version, self._epoch)

    def identity(self) -> WorkerIdentity:
        """Return who this worker is."""
        return self._identity

    def live_tensors(self) -> Mapping[str, torch.Tensor]:
        """Return this rank's parameters and persistent buffers, tied ones under their first name."""
        return self._live

    def skeleton(self) -> Skeleton:
        """Return the shards on the meta device, with the loader bound to them."""
        tensors = {name: torch.empty_like(tensor, device="meta") for name, tensor in self._live.items()}
        return Skeleton(tensors, ShardLoader(self._naming, self._layouts, tensors).load)

    def loaded_from(self) -> str | None:
        """Return the checkpoint folder, until the first commit."""
        return self._source

    def load(self, pairs: NamedTensors) -> None:
        """Copy full checkpoint tensors into this rank's shards.

        Raises:
            ApplyError: A tensor does not fit; names both.
        """
        ShardLoader(self._naming, self._layouts, self._live).load(pairs)

    def begin_reload(self) -> None:
        """Do nothing: weights keep their loader's layout."""

    def end_reload(self) -> None:
        """Do nothing: weights keep their loader's layout."""

    def reload_unit(self, name: str) -> str:
        """Return the path of the module that owns the tensor."""
        return name.rpartition(".")[0] or name

    def optional(self, name: str) -> bool:  # noqa: ARG002 - the contract's signature
        """Return False: every tensor must be filled."""
        return False

    def derived(self) -> Mapping[str, Sequence[str]]:
        """Return nothing: no tensor is computed from weights after loading."""
        return {}

    def rederive(self, names: Sequence[str]) -> bool:
        """Return whether there is nothing to compute."""
        return not names

    def free_memory_bytes(self) -> int:
        """Return this worker's share of half the free memory."""
        if self._identity.device == "cpu":
            return _available_bytes() // (2 * self._identity.world_size)
        return torch.cuda.mem_get_info(self._identity.device)[0] // 2

    @contextmanager
    def commit_scope(self) -> Iterator[None]:
        """Mark the weights as changing, so that a forward step in between is noticed."""
        self._epoch += 1
        self._source = None
        try:
            with torch.inference_mode(False), torch.no_grad():
                self._synchronize()
                yield
                self._synchronize()
        finally:
            self._epoch += 1

    def set_version(self, version: int) -> None:
        """Report `version` from the next token on."""
        self._version = version

    def fingerprints(self) -> list[Fingerprint]:
        """Return sha256 sums of all live shards, with the boxes each holds; reads all weights."""
        return [self._fingerprint(name, tensor) for name, tensor in self._live.items()]

    def _fingerprint(self, name: str, tensor: torch.Tensor) -> Fingerprint:
        layout = self._layouts[name]
        flat = tensor.detach().contiguous().reshape(-1).cpu().view(torch.uint8)
        return Fingerprint(
            name=name,
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=list(layout.shape),
            local_shape=list(tensor.shape),
            boxes=[ShardBox(list(p.box.offsets), list(p.box.shape)) for p in layout.pieces],
            dim=layout.dim,
            sha256=hashlib.sha256(flat.numpy().data).hexdigest(),
        )

    def _synchronize(self) -> None:
        if self._identity.device != "cpu":
            torch.cuda.synchronize(self._identity.device)


def _identity(model: PreTrainedModel, worker: WorkerId, world_size: int) -> WorkerIdentity:
    device = next(iter(model.parameters())).device
    config = json.dumps(model.config.to_dict(), sort_keys=True, default=str)
    layout = (
        f"torch {type(model).__name__} {hashlib.sha256(config.encode()).hexdigest()[:16]} {model.dtype} "
        f"tp {worker.rank}/{world_size} transformers {transformers.__version__}"
    )
    if device.type == "cpu":
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return WorkerIdentity(worker, world_size, "cpu", f"cpu-{boot_id}", layout)
    uuid = uuid_of(device)
    return WorkerIdentity(worker, world_size, str(device), uuid, layout)


def _available_bytes() -> int:
    """Return MemAvailable of this host."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0
