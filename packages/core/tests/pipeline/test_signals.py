"""Signals in shared memory, between real processes."""

from __future__ import annotations

import os
import threading

import pytest
import torch

from headrace.errors import PeerLostError, TransferTimeoutError
from headrace.pipeline import RingSignals, signal_bytes
from headrace.segments.host import HostSegment, MappedSegment


def _alive() -> None:
    pass


@pytest.fixture
def words() -> RingSignals:
    return RingSignals(torch.zeros(signal_bytes(2), dtype=torch.uint8))


def test_a_receiver_waits_until_its_bucket_is_filled(words: RingSignals) -> None:
    words.announce(2)
    words.wait_filled(2, 1.0, _alive)
    timer = threading.Timer(0.05, words.announce, (3,))
    timer.start()
    words.wait_filled(3, 5.0, _alive)
    timer.join()


def test_a_holder_waits_for_the_slowest_receiver(words: RingSignals) -> None:
    words.applied(0, 1)
    with pytest.raises(TransferTimeoutError, match="bucket 0"):
        words.wait_applied(1, 0.05, _alive)
    words.applied(1, 1)
    words.wait_applied(1, 1.0, _alive)


def test_a_cancelled_ring_ends_both_waits(words: RingSignals) -> None:
    words.cancel()
    with pytest.raises(PeerLostError, match="cancelled"):
        words.wait_filled(1, 5.0, _alive)
    words.reset()
    words.announce(1)
    words.wait_filled(1, 1.0, _alive)


def test_what_the_caller_finds_out_while_waiting_ends_the_wait(words: RingSignals) -> None:
    def gone() -> None:
        raise PeerLostError("gone")

    with pytest.raises(PeerLostError, match="gone"):
        words.wait_filled(1, 5.0, gone)


def test_two_processes_hand_buckets_over() -> None:
    with HostSegment(signal_bytes(1), "signals", peers_write=True) as segment:
        words = RingSignals(segment.tensor)
        child = os.fork()
        if child == 0:
            mapped = MappedSegment(segment.fd, segment.descriptor, writable=True)
            theirs = RingSignals(mapped.tensor)
            for bucket in range(100):
                theirs.wait_filled(bucket + 1, 10.0, _alive)
                theirs.applied(0, bucket + 1)
            os._exit(0)
        for bucket in range(100):
            words.announce(bucket + 1)
            words.wait_applied(bucket + 1, 10.0, _alive)
        assert os.waitpid(child, 0)[1] == 0
