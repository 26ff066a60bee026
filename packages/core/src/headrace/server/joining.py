"""Join: brings the version that others hold into engines of this host, read from all holders at once."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

from headrace.config import HostSettings, UpdateSettings
from headrace.errors import ConfigError, HeadraceError
from headrace.manifest import Manifest
from headrace.protocols import Transport
from headrace.registry import load
from headrace.report import UpdateReport
from headrace.segments import probe
from headrace.server.fetching import ReadSettings
from headrace.server.holders import ProgressCallback
from headrace.server.invitation import Invitation
from headrace.server.membership import Membership
from headrace.server.parameter_server import ParameterServer, Target
from headrace.server.reading import PeerSource

logger = logging.getLogger(__name__)
ATTEMPTS = 3
_PROBE_S = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class JoinSettings:
    """Choices of one join.

    Attributes:
        update: Those of the engines' update; its `version` is asked of the keeper, None for the newest.
        transport: How holders are read: `auto`, or the only transport to use.
        reads: Sizes and deadlines of reading.
    """

    update: UpdateSettings = field(default_factory=UpdateSettings)
    transport: str = "auto"
    reads: ReadSettings = field(default_factory=ReadSettings)


@dataclass(frozen=True)
class JoinReport:
    """What a join did.

    Attributes:
        update: The update of the engines.
        from_holders: Bytes that each holder gave, by its name.
        transports: Transport that was used for each holder.
        seconds: What getting the version took: `reach` holders, `read` from them and sum it up.
        attempts: How many versions were begun until one was whole.
    """

    update: UpdateReport
    from_holders: Mapping[str, int]
    transports: Mapping[str, str]
    seconds: Mapping[str, float]
    attempts: int


@dataclass
class Ways:
    """Transports of one joiner, each made once; asked from several threads.

    Attributes:
        asked: `auto`, or the one transport to use.
        host: Address and NICs of this host.
        used: Name of the transport by holder.
    """

    asked: str = "auto"
    host: HostSettings | None = None
    used: dict[str, str] = field(default_factory=dict)
    _made: dict[str, Transport] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, manifest: Manifest) -> Transport:
        """Return the transport for a holder.

        Raises:
            ConfigError: It cannot be read by the one that was asked for.
            BackendUnavailableError: That is not installed.
        """
        holder = manifest.holder
        name = self.asked if self.asked != "auto" else _best(manifest)
        if name == "mooncake" and not holder.mooncake:
            text = f"holder {holder.holder_id} runs no Mooncake helper; hold with it, or join over tcp"
            raise ConfigError(text, name=holder.holder_id)
        with self._lock:
            self.used[holder.holder_id] = name
            if name not in self._made:
                make = load("headrace.transports", name)
                self._made[name] = make(self.host) if name == "mooncake" else make()
            return self._made[name]

    def close(self) -> None:
        """Close what was made; whoever asks again gets new ones. Idempotent."""
        while self._made:
            self._made.popitem()[1].close()


def _best(manifest: Manifest) -> str:
    """Return how a holder is read: from memory on its host, by what it serves elsewhere."""
    holder = manifest.holder
    try:
        near = probe(holder.unix_socket, _PROBE_S)
    except HeadraceError as error:
        logger.debug("holder %s is not on this host: %s", holder.holder_id, error)
        near = False
    if near:
        return "memory"
    return "mooncake" if holder.mooncake else "tcp"


@contextmanager
def joined(
    invitation: Invitation,
    to: Sequence[Target],
    host: HostSettings,
    *,
    settings: JoinSettings | None = None,
    progress: ProgressCallback | None = None,
) -> Iterator[tuple[JoinReport, ParameterServer]]:
    """Bring the version that a keeper's holders have into engines; yield while this host holds it too.

    If it cannot be read to the end and the keeper offers another version by then, that is begun instead; engines
    end on one whole version, or stay as they were.

    Args:
        invitation: The keeper.
        to: Engines of this host.
        host: Sockets of this host.
        settings: Choices; None takes the defaults.
        progress: Called with (phase, bytes done, bytes in all).

    Raises:
        TransportError: The keeper cannot be reached, or no whole version could be read.
        HeadraceError: The update failed.
    """
    settings = settings or JoinSettings()
    chosen, ways = settings.update, Ways(settings.transport, host)
    names = [_name(target) for target in to]
    with Membership(invitation, f"{socket.gethostname()} {', '.join(names)}") as member, ExitStack() as stack:
        stack.callback(ways.close)
        for attempt in range(1, ATTEMPTS + 1):
            offer = member.ask(lease=True, version=chosen.version)
            source = PeerSource(offer, ways, settings.reads, partial(member.tell, offer.version))
            server = ParameterServer(source=source, host=host)
            try:
                report = server.update(to, replace(chosen, version=offer.version), progress=progress)
            except HeadraceError as error:
                server.close()
                if (
                    error.weights_state != "old"
                    or attempt == ATTEMPTS
                    or not _has_other(member, offer.version)
                ):
                    raise
                logger.warning(
                    "version %d could not be joined, the newer one is tried: %s", offer.version, error
                )
            except BaseException:
                server.close()
                raise
            else:
                break
        stack.callback(server.close)
        member.end_lease(names)
        # Not as late as the stack: what is mapped of holders on this host could not be given back while this one stays.
        ways.close()
        yield JoinReport(report, source.given, dict(ways.used), source.seconds, attempt), server


def _has_other(member: Membership, version: int) -> bool:
    """Return whether the keeper is there and offers another version by now."""
    try:
        return member.ask(lease=False).version != version
    except HeadraceError as error:
        logger.debug("keeper %s: %s", member.keeper, error)
        return False


def _name(target: Target) -> str:
    if isinstance(target, str):
        return target
    return target.address
