"""The overlapped pipeline: buckets pass through stages over a ring of slots."""

from headrace.pipeline.ring import PipelineStage, RingPipeline
from headrace.pipeline.signals import RingSignals, signal_bytes

__all__ = ["PipelineStage", "RingPipeline", "RingSignals", "signal_bytes"]
