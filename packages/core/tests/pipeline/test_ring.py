"""The ring executor: order, overlap, back-pressure, failures."""

from __future__ import annotations

import threading
import time

import pytest

from headrace.errors import ApplyError, TransferTimeoutError, TransportClosedError
from headrace.pipeline import PipelineStage, RingPipeline
from headrace.telemetry import Recorder


def _consume(pipeline: RingPipeline, num_buckets: int, seen: list[tuple[str, int, int]]) -> None:
    for bucket in range(num_buckets):
        slot = pipeline.wait_ready(bucket, 10)
        seen.append(("take", bucket, slot))
        pipeline.release(bucket)


@pytest.mark.parametrize("depth", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("num_buckets", [0, 1, 7])
def test_every_bucket_passes_every_stage_in_order(depth: int, num_buckets: int) -> None:
    slots: dict[int, str] = {}
    seen: list[tuple[str, int, int]] = []

    def fill(bucket: int, slot: int) -> None:
        assert slot not in slots, "a slot was filled before it was released"
        slots[slot] = f"filled {bucket}"

    def cast(bucket: int, slot: int) -> None:
        assert slots[slot] == f"filled {bucket}"
        slots[slot] = f"cast {bucket}"

    recorder = Recorder("test")
    stages = [PipelineStage("fill", fill), PipelineStage("cast", cast)]
    pipeline = RingPipeline(stages, num_buckets, depth, recorder, [5] * num_buckets)
    pipeline.start()
    for bucket in range(num_buckets):
        slot = pipeline.wait_ready(bucket, 10)
        assert slot == bucket % depth
        assert slots.pop(slot) == f"cast {bucket}"
        pipeline.release(bucket)
    pipeline.close()
    assert [s.name for s in recorder.spans].count("fill") == num_buckets
    assert sum(s.num_bytes for s in recorder.spans) == 10 * num_buckets
    assert not seen


def test_stages_overlap_when_there_are_slots_and_do_not_when_there_is_one() -> None:
    def run(depth: int) -> float:
        stages = [PipelineStage(name, lambda _b, _s: time.sleep(0.02)) for name in ("a", "b")]
        pipeline = RingPipeline(stages, 10, depth, Recorder("test"))
        begin = time.monotonic()
        pipeline.start()
        for bucket in range(10):
            pipeline.wait_ready(bucket, 10)
            time.sleep(0.02)
            pipeline.release(bucket)
        pipeline.close()
        return time.monotonic() - begin

    assert run(1) > 0.58
    assert run(3) < 0.5


def test_a_full_ring_waits_for_its_consumer() -> None:
    filled: list[int] = []
    pipeline = RingPipeline([PipelineStage("fill", lambda b, _s: filled.append(b))], 10, 3, Recorder("test"))
    pipeline.start()
    pipeline.wait_ready(2, 10)
    time.sleep(0.05)
    assert filled == [0, 1, 2]
    pipeline.release(0)
    pipeline.wait_ready(3, 10)
    assert filled == [0, 1, 2, 3]
    pipeline.close()


def test_a_stage_that_fails_stops_all_and_the_consumer_hears_why() -> None:
    def fail(bucket: int, _slot: int) -> None:
        if bucket == 2:
            raise ApplyError("no", name="w")

    late: list[int] = []
    stages = [PipelineStage("fail", fail), PipelineStage("late", lambda b, _s: late.append(b))]
    pipeline = RingPipeline(stages, 10, 10, Recorder("test"))
    pipeline.start()
    with pytest.raises(ApplyError, match="no"):
        pipeline.wait_ready(5, 10)
    pipeline.close()
    assert late in ([], [0], [0, 1])
    assert not [t for t in threading.enumerate() if t.name in ("headrace-fail", "headrace-late")]


def test_a_deadline_names_the_stage_that_is_late() -> None:
    gate = threading.Event()
    pipeline = RingPipeline([PipelineStage("slow", lambda _b, _s: gate.wait(10) and None)], 2, 2, Recorder("t"))
    pipeline.start()
    with pytest.raises(TransferTimeoutError, match="'slow' has done 0"):
        pipeline.wait_ready(0, 0.05)
    gate.set()
    pipeline.wait_ready(1, 10)
    pipeline.close()


def test_after_close_nothing_comes() -> None:
    pipeline = RingPipeline([PipelineStage("fill", lambda _b, _s: None)], 3, 1, Recorder("test"))
    pipeline.start()
    pipeline.wait_ready(0, 10)
    pipeline.close()
    pipeline.close()
    with pytest.raises(TransportClosedError):
        pipeline.wait_ready(1, 1)
