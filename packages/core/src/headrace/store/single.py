"""What stores share that hold one version at a time: its number, manifest, segments and bytes."""

from __future__ import annotations

from dataclasses import replace
from typing import Generic, Protocol, TypeVar

import torch

from headrace.errors import LocalProtocolError
from headrace.manifest import HolderAddress, Manifest, SegmentDescriptor
from headrace.store.store import PublishedVersion


class Segment(Protocol):
    """Memory that peers can find by its descriptor."""

    @property
    def descriptor(self) -> SegmentDescriptor:
        """What peers are told."""
        ...

    @property
    def tensor(self) -> torch.Tensor:
        """Its bytes, flat uint8."""
        ...


AnySegment = TypeVar("AnySegment", bound=Segment)


class SingleVersion(Generic[AnySegment]):
    """The calls of Store that ask about a version, for a store with at most one.

    Args:
        holder_name: Unique name of this holder, for messages and manifests.
    """

    def __init__(self, holder_name: str) -> None:
        self._name = holder_name
        self._segments: tuple[AnySegment, ...] = ()
        self._published: PublishedVersion | None = None

    @property
    def versions(self) -> tuple[int, ...]:
        """The version that is held, if any."""
        return () if self._published is None else (self._published.version,)

    def manifest(self, version: int, holder: HolderAddress) -> Manifest:
        """Return the manifest of the version under the holder's address.

        Raises:
            LocalProtocolError: It is not held.
        """
        return replace(self._find(version).manifest, holder=holder)

    def segments(self, version: int) -> tuple[AnySegment, ...]:
        """Return the segments, in the manifest's order; the store's to close."""
        self._find(version)
        return self._segments

    def segment(self, segment_id: str) -> AnySegment | None:
        """Return the segment of this id, or None where the version does not lie in it."""
        held = () if self._published is None else self._segments
        return next((one for one in held if one.descriptor.segment_id == segment_id), None)

    def tensors(self, version: int) -> list[torch.Tensor]:
        """Return the bytes of each segment."""
        return [segment.tensor for segment in self.segments(version)]

    def _find(self, version: int) -> PublishedVersion:
        if self._published is None or self._published.version != version:
            message = f"holder {self._name} does not hold version {version}"
            raise LocalProtocolError(message, name=self._name, weight_version=version)
        return self._published

    def _check_grows(self, version: int, newest: int) -> None:
        if version <= newest:
            message = f"version {version} does not grow; holder {self._name} has made {newest}"
            raise LocalProtocolError(message, name=self._name, weight_version=version)
