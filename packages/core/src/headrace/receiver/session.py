"""Session: one receiver's part in one update, from Hello to Finished, as a state machine over messages."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

from headrace import wire
from headrace.control.dialer import Dialer
from headrace.digests import digest
from headrace.errors import (
    ApplyError,
    HeadraceError,
    LocalProtocolError,
    PeerLostError,
    RemoteFailure,
    TransferTimeoutError,
)
from headrace.plan import MAPPED_MODES
from headrace.planner import receiver_digests
from headrace.protocols import Ticket
from headrace.receiver.blocks import Destinations, unmet_fills, write_fills
from headrace.receiver.buckets import Differences
from headrace.receiver.delivery import Delivery, DirectDelivery, RingDelivery
from headrace.receiver.feeds import broadcast_feed, tcp_feed
from headrace.receiver.hold import Hold
from headrace.recipe import FillTable, LoadRecipe
from headrace.segments.lending import probe

if TYPE_CHECKING:
    from headrace.receiver.receiver import Receiver

logger = logging.getLogger(__name__)
PROBE_DEADLINE_S = 2.0


class Session:
    """The states are the messages that may come next; anything else is refused.

    enrolled -Describe-> described -Stage-> staged -Prepare-> prepared -Commit-> committed -Finish-> (over)
    and from each of them -Abort-> (over). `Commit` may repeat.

    Attributes:
        hold: Where the worker stands still, if it is held and not paused.
    """

    def __init__(self, receiver: Receiver, ticket: Ticket) -> None:
        self.ticket = ticket
        self.alive = True
        self.hold = Hold(receiver, ticket.update_id, self._adopt)
        self._receiver = receiver
        self._backend = receiver.backend
        self._device = receiver.device
        self._dialer: Dialer | None = None
        self._state = "enrolled"
        self._version = -1
        self._metas_key = ""
        self._recipe: LoadRecipe | None = None
        self._delivery: Delivery | None = None
        self._targets: Destinations | None = None
        self._pointers: list[int] = []
        self._derived: tuple[str, ...] = ()
        self._fills = FillTable.empty()
        self._verify = "none"
        self._early: wire.AnyMessage | None = None
        self._handlers: dict[str, dict[type[wire.Message], Callable[..., wire.Message]]] = {
            "enrolled": {wire.Describe: self._describe, wire.Finish: self._finish},
            "described": {wire.Stage: self._stage},
            "staged": {wire.Prepare: self._prepare},
            "prepared": {wire.Commit: self._commit},
            "committed": {wire.Commit: self._commit, wire.Finish: self._finish},
        }

    def run(self) -> None:
        """Take part until the end, whatever happens; the body of the receiver's thread.

        An update that is over but still proves its recipe or closes its connection is waited for.
        """
        with self._receiver.turn:
            self._run()

    def _run(self) -> None:
        try:
            dialer = self._dialer = Dialer(self.ticket.endpoint, self.ticket.server_key)
        except HeadraceError as error:
            logger.warning("update %s has a ticket that is no use: %s", self.ticket.update_id, error)
            self.alive = False
            self.hold.abandon("its session never began")
            return
        try:
            # Before the hello, after which holders make memory for the next version.
            self._receiver.memory.drop_dead(PROBE_DEADLINE_S)
            dialer.send(self._receiver.hello(self.ticket.update_id, self.ticket.token))
            while self.alive:
                message, self._early = self._early or dialer.receive(None), None
                self._take(dialer, message)
        except PeerLostError as error:
            self.hold.abandon(f"the updater is gone ({error})")
            logger.warning(
                "update %s: the updater is gone (%s); %s", self.ticket.update_id, error, self._aftermath()
            )
        except HeadraceError as error:
            logger.warning("update %s could not enrol: %s", self.ticket.update_id, error)
        finally:
            self.hold.abandon("its session ended")
            # First the last word: what is waiting for it keeps an engine paused.
            dialer.close(linger_s=2.0)
            self._forget()
            self.alive = False

    def leave(self) -> None:
        """Break off; the coordinator sees this receiver as lost."""
        self.alive = False
        if self._dialer is not None:
            self._dialer.close(linger_s=0.0)

    def _take(self, dialer: Dialer, message: wire.AnyMessage) -> None:
        """Answer one message; what fails goes to the coordinator as data: this is the rank boundary."""
        if isinstance(message, wire.Abort):
            if message.spoiled and self._state == "committed":
                self._receiver.weights_state = "mixed"
            self.alive = False
            state = self.hold.abort(message.reason)
            self._forget()
            dialer.send(wire.Aborted(weights_state=state))
            return
        phase = type(message).__name__.lower()
        try:
            handler = self._handlers[self._state].get(type(message))
            if handler is None:
                text = f"{type(message).__name__} has no place in state {self._state!r}"
                raise LocalProtocolError(text)
            with self._device.scope(), torch.inference_mode():
                reply = handler(message)
                self._device.settle()
        except Exception as error:  # noqa: BLE001 - the rank boundary
            logger.warning("update %s failed in %s: %s", self.ticket.update_id, phase, error)
            state = self._receiver.weights_state
            reply = wire.Failed(failure=RemoteFailure.of(error, phase=phase, weights_state=state))
        if isinstance(reply, wire.Finished):
            self.alive = False
        dialer.send(reply)
        if isinstance(reply, wire.Finished):
            # A proof may take long, and a broadcast ends when its last slot is given back.
            self._end_delivery()
            self._prove()

    def _describe(self, message: wire.Describe) -> wire.Message:
        book, recorder = self._receiver.recipes, self._receiver.recorder
        entry = book.known(message.metas_key)
        if entry is None:
            if message.metas is None:
                return wire.NeedMetas()
            entry = book.entry(message.metas)
        self._recipe, self._metas_key = entry.recipe, message.metas_key
        reachable = tuple(
            h.holder_id for h in message.holders if h.unix_socket and probe(h.unix_socket, PROBE_DEADLINE_S)
        )
        self._state = "described"
        known = entry.recipe.key in message.known_recipes
        return wire.Described(
            recipe_key=entry.recipe.key,
            recipe=None if known else entry.recipe,
            reachable=reachable,
            budget_bytes=self._backend.free_memory_bytes(),
            reserved_bytes=self._receiver.staging.reserved_bytes,
            first=entry.unproven is not None or message.metas is not None,
            spans=tuple(recorder.drain()),
        )

    def _stage(self, message: wire.Stage) -> wire.Message:
        recipe = self._known_recipe()
        self._version, self._verify = message.version, message.verify
        device = self._backend.identity().device
        targets = self._targets = Destinations.of(recipe, message.plan, self._backend.live_tensors(), device)
        self._pointers = targets.pointers()
        # Looked up while the engine serves: a walk over all modules, and over all padding.
        self._derived = tuple(self._backend.derived())
        self._fills = unmet_fills(recipe.fills, targets.targets)
        self._delivery = self._deliver(message, targets.blocks(), [meta.name for meta in recipe.targets])
        self._delivery.stage(message.deadline_s)
        memory = self._receiver.memory
        # Only before a first version: nobody is served yet who could be held up.
        pin = self._device.is_cuda and self._receiver.served_version is None
        targets.put(memory.lent(message.plan, recipe, message.holders, PROBE_DEADLINE_S, pin=pin))
        memory.keep(message.plan)
        self._state = "staged"
        return wire.Staged(spans=tuple(self._receiver.recorder.drain()))

    def _deliver(self, message: wire.Stage, blocks: list[torch.Tensor], names: list[str]) -> Delivery:
        plan, recorder = message.plan, self._receiver.recorder
        differences = Differences(plan, names)
        if plan.ring.mode in MAPPED_MODES:
            memory = self._receiver.memory
            return DirectDelivery(plan, message.holders, memory, blocks, differences, recorder)
        on_gpu, limit_s = self._device.is_cuda, message.deadline_s
        if message.ring is not None:
            feed = broadcast_feed(plan, message.ring, limit_s, PROBE_DEADLINE_S, pinned=on_gpu)
        else:
            feed = tcp_feed(plan, message.holders, self._receiver.transport(plan.transport), limit_s, pinned=on_gpu)
        return RingDelivery(plan, feed, blocks, differences, recorder, self._check_alive)

    def _prepare(self, message: wire.Prepare) -> wire.Message:
        """Vote: the engine is paused or held, and live tensors lie where the copies were built for."""
        if message.hold_s is not None:
            self.hold.wait_stood(message.hold_s, self._check_alive)
        targets = self._targets
        if targets is None or targets.pointers() != self._pointers:
            text = "the engine moved its parameters between stage and commit"
            raise ApplyError(text, phase="prepare", retryable=True)
        if message.hold_s is not None:
            self.hold.vote()
        self._state = "prepared"
        return wire.Prepared()

    def _commit(self, message: wire.Commit) -> wire.Message:
        recipe, targets, delivery = self._known_recipe(), self._targets, self._delivery
        if targets is None or delivery is None:
            raise LocalProtocolError("a commit needs a stage first", phase="commit")
        receiver, recorder = self._receiver, self._receiver.recorder
        begin = time.monotonic()
        with self.hold.standing():
            with recorder.span("commit"), self._backend.commit_scope():
                delivery.commit(message.deadline_s, self._writing, compare=self._verify == "full")
                write_fills(self._fills, targets.targets)
                self._reload(targets)
                self._backend.rederive(self._derived)
                self._device.settle()
            sums = np.zeros(0, np.uint64)
            if self._verify == "digest":
                with recorder.span("verify"):
                    sums = self._digests(recipe, targets)
            receiver.weights_state, receiver.pending_version = "new", self._version
            self._state = "committed"
        logger.info("version %d is in place after %.3f s", self._version, time.monotonic() - begin)
        return wire.Committed(digests=sums, spans=tuple(recorder.drain()))

    def _writing(self) -> None:
        """From here on live tensors are neither old nor new, until the commit has ended."""
        self._receiver.weights_state = "mixed"
        self._receiver.recipes.touched()

    def _digests(self, recipe: LoadRecipe, targets: Destinations) -> np.ndarray:
        blocks = targets.blocks()
        return digest(receiver_digests(recipe), blocks, num_groups=len(blocks))

    def _reload(self, targets: Destinations) -> None:
        """Give opaque sources to the engine's own loader, inside its reload life cycle."""
        if not targets.opaque:
            return
        with self._receiver.recorder.span("load"):
            self._writing()
            try:
                self._backend.begin_reload()
                self._backend.load(targets.opaque.items())
                self._backend.end_reload()
            except HeadraceError:
                raise
            except Exception as error:
                message = f"the engine's loader refused the weights: {type(error).__name__}: {error}"
                raise ApplyError(message, phase="commit", weights_state="mixed") from error

    def _finish(self, message: wire.Finish) -> wire.Message:
        receiver = self._receiver
        if receiver.pending_version != message.version:
            text = f"version {message.version} was not committed here; pending is {receiver.pending_version}"
            raise LocalProtocolError(text, phase="finish")
        with self.hold.standing():
            held_s = self.hold.finish(self._adopt())
        return wire.Finished(spans=tuple(receiver.recorder.drain()), held_s=held_s)

    def _adopt(self) -> int:
        """Make what is committed here the version that is served, and return it."""
        receiver, version = self._receiver, self._receiver.pending_version
        if version is None:
            raise LocalProtocolError("nothing was committed here", phase="finish")
        self._backend.set_version(version)
        receiver.served_version, receiver.pending_version, receiver.weights_state = version, None, "old"
        return version

    def _prove(self) -> None:
        """After a first update through the loader: what it made is the proof of the recorded recipe."""
        targets, metas_key = self._targets, self._metas_key
        if targets is None or not targets.opaque:
            return
        try:
            with self._device.scope(), torch.inference_mode():
                self._receiver.recipes.prove_with(metas_key, targets.opaque)
        except HeadraceError as error:
            logger.warning("the recorded recipe could not be proven, updates stay with the loader: %s", error)

    def _known_recipe(self) -> LoadRecipe:
        if self._recipe is None:
            raise LocalProtocolError("a receiver is described before it is asked for more")
        return self._recipe

    def _check_alive(self) -> None:
        """Break a wait off when the coordinator has more to say, which can only be `Abort`, or is gone."""
        if not self.alive or self._dialer is None:
            raise PeerLostError("the session ended")
        try:
            self._early = self._dialer.receive(0)
        except TransferTimeoutError:
            return
        raise PeerLostError("the coordinator ended the update", phase="stage")

    def _aftermath(self) -> str:
        state = self._receiver.weights_state
        if self.hold.version is not None:
            return f"version {self.hold.version} is whole in this only worker, and served"
        return {
            "old": "the old weights serve on",
            "new": f"version {self._version} is in place and waits for a guardian or the next update",
            "mixed": "the weights are mixed, the engine must stay paused until the next good update",
        }[state]

    def _end_delivery(self) -> None:
        delivery, self._delivery = self._delivery, None
        if delivery is not None:
            delivery.close()

    def _forget(self) -> None:
        self._end_delivery()
        self._targets = None
        self._receiver.memory.unlend()
