"""Spans and counters, recorded once; the table, the JSON report and the trace are views of them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Span:
    """One timed piece of work: `begin_s` on the host's monotonic clock (equal for all processes of a host).

    Attributes:
        name: What was done (`map`, `commit`, `digest`, ...).
        track: Who did it (`receiver a[0]`, `holder 1`, `coordinator`).
        begin_s: Start.
        duration_s: Length.
        num_bytes: Bytes that moved, 0 where none did.
    """

    name: str
    track: str
    begin_s: float
    duration_s: float
    num_bytes: int = 0


@dataclass
class Recorder:
    """Collects spans of one track; appending is safe from several threads."""

    track: str
    spans: list[Span] = field(default_factory=list)

    @contextmanager
    def span(self, name: str, num_bytes: int = 0) -> Iterator[None]:
        """Time the body, also when it raises."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self.spans.append(Span(name, self.track, begin, time.monotonic() - begin, num_bytes))

    def drain(self) -> list[Span]:
        """Return the spans so far and forget them."""
        taken, self.spans = self.spans, []
        return taken


def chrome_trace(spans: Sequence[Span]) -> dict[str, object]:
    """Return spans as Chrome trace events (opens in Perfetto); times in microseconds from the first span."""
    tracks = {track: i for i, track in enumerate(dict.fromkeys(span.track for span in spans))}
    origin = min((span.begin_s for span in spans), default=0.0)
    events: list[dict[str, object]] = [
        {"ph": "M", "name": "thread_name", "pid": os.getpid(), "tid": tid, "args": {"name": track}}
        for track, tid in tracks.items()
    ]
    events += [
        {
            "ph": "X",
            "name": span.name,
            "pid": os.getpid(),
            "tid": tracks[span.track],
            "ts": (span.begin_s - origin) * 1e6,
            "dur": span.duration_s * 1e6,
            "args": {"bytes": span.num_bytes},
        }
        for span in spans
    ]
    return {"traceEvents": events, "displayTimeUnit": "ms"}
