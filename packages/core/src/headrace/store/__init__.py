"""Versions in host memory: where weights are read from, and the segments that hold them."""

from headrace.store.checkpoint import CheckpointSource, CheckpointSummary
from headrace.store.safetensors_file import SafetensorsFile, TensorEntry
from headrace.store.store import PublishedVersion, Store
from headrace.store.tensors import TensorSource

__all__ = [
    "CheckpointSource",
    "CheckpointSummary",
    "PublishedVersion",
    "SafetensorsFile",
    "Store",
    "TensorEntry",
    "TensorSource",
]
