"""Describing: what every receiver of an update needs, which holders it can map and what memory it may take."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from headrace import wire
from headrace.config import UpdateSettings
from headrace.errors import FailureKey, HeadraceError, RemoteProtocolError
from headrace.manifest import HolderAddress
from headrace.planner import ReceiverNeeds
from headrace.recipe import LoadRecipe
from headrace.server.broadcast import RingHost
from headrace.server.switchboard import Peer, failed
from headrace.types import ParamTable


class Descriptions:
    """Asks the receivers of one update what they need, while the engines serve. Lives in the updater.

    Args:
        recipes: Recipes by key, which receivers need not send again; new ones are added.
        rings: Rings that holders keep in GPU memory.
        settings: The update's choices.
        metas: Returns the source's parameters.

    Attributes:
        first: Whether a receiver met this source for the first time.
    """

    def __init__(
        self,
        recipes: dict[str, LoadRecipe],
        rings: RingHost,
        settings: UpdateSettings,
        metas: Callable[[], ParamTable],
    ) -> None:
        self.first = False
        self._recipes = recipes
        self._rings = rings
        self._settings = settings
        self._metas = metas
        self._needs: dict[FailureKey, ReceiverNeeds] = {}
        self._errors: dict[FailureKey, HeadraceError] = {}
        self._asked = False

    def ask(self, peers: Sequence[Peer], holders: Sequence[HolderAddress]) -> None:
        """Ask all, without waiting; `collect` need not ask any more."""
        self._ask(peers, holders, None)
        self._asked = True

    def collect(
        self, peers: Sequence[Peer], holders: Sequence[HolderAddress]
    ) -> dict[FailureKey, ReceiverNeeds]:
        """Return what every receiver needs, by its key; those that do not know the source are told of it first.

        Args:
            peers: The receivers.
            holders: Whose memory they may map, in the order of the plan.

        Raises:
            UpdateFailedError: At least one could not say; holds the failure of every one.
        """
        if not self._asked:
            self.ask(peers, holders)
        strangers = self._take(peers, holders)
        self._ask(strangers, holders, self._metas())
        for peer in self._take(strangers, holders):
            text = f"{peer.key} asks for the source's parameters again, which it was told"
            self._errors[peer.key] = RemoteProtocolError(text, phase="describe", rank=peer.key[1])
        if self._errors:
            raise failed(self._errors, "describe")
        return self._needs

    def _ask(
        self, peers: Sequence[Peer], holders: Sequence[HolderAddress], metas: ParamTable | None
    ) -> None:
        key, known = (metas or self._metas()).key, tuple(self._recipes)
        message = wire.Describe(metas_key=key, metas=metas, holders=tuple(holders), known_recipes=known)
        for peer in peers:
            peer.send(message)

    def _take(self, peers: Sequence[Peer], holders: Sequence[HolderAddress]) -> list[Peer]:
        """Wait for an answer of each, within one deadline; returns who asks for the source's parameters first."""
        limit = time.monotonic() + self._settings.deadlines.describe_s
        strangers = []
        for peer in peers:
            try:
                answer = peer.expect(wire.Message, limit - time.monotonic(), "describe")
                if isinstance(answer, wire.NeedMetas):
                    strangers.append(peer)
                else:
                    self._needs[peer.key] = self._needs_of(peer, answer, holders)
            except HeadraceError as error:
                self._errors[peer.key] = error
        return strangers

    def _needs_of(self, peer: Peer, answer: wire.Message, holders: Sequence[HolderAddress]) -> ReceiverNeeds:
        """Return what an answer says.

        Raises:
            RemoteProtocolError: It is none, or names what was never sent.
        """
        if not isinstance(answer, wire.Described):
            text = f"{peer.key} answered Describe with {type(answer).__name__}"
            raise RemoteProtocolError(text, phase="describe", rank=peer.key[1])
        self.first |= answer.first
        index = {holder.holder_id: i for i, holder in enumerate(holders)}
        if not index.keys() >= set(answer.reachable):
            text = f"{peer.key} says that it can map holders {answer.reachable}; known are {tuple(index)}"
            raise RemoteProtocolError(text, phase="describe", rank=peer.key[1])
        budget, hello = self._settings.budget_bytes, peer.receiver
        return ReceiverNeeds(
            worker=hello.worker,
            recipe=self._recipe(peer, answer),
            reachable=frozenset(index[name] for name in answer.reachable),
            budget_bytes=self._free_bytes(hello, answer) if budget is None else budget,
            reserved_bytes=answer.reserved_bytes if budget is None else min(answer.reserved_bytes, budget),
            device=hello.device,
            device_uuid=hello.device_uuid,
        )

    def _recipe(self, peer: Peer, answer: wire.Described) -> LoadRecipe:
        """Return what a receiver sent, or named as known; it is kept for those that need the same."""
        recipe = self._recipes.get(answer.recipe_key) if answer.recipe is None else answer.recipe
        if recipe is None:
            text = f"{peer.key} names recipe {answer.recipe_key}, which nobody sent"
            raise RemoteProtocolError(text, phase="describe", rank=peer.key[1])
        self._recipes[answer.recipe_key] = recipe
        return recipe

    def _free_bytes(self, hello: wire.ReceiverHello, answer: wire.Described) -> int:
        """Return a worker's budget where none is set; a ring that a holder keeps on its GPU serves broadcasts again."""
        if self._settings.route == "direct":
            return _steady(answer.budget_bytes)
        return _steady(self._rings.budget_bytes(hello.device_uuid, answer.budget_bytes))


def _steady(num_bytes: int) -> int:
    """Round down to three significant bits: free memory flutters, and a plan holds for one budget."""
    shift = max(0, num_bytes.bit_length() - 3)
    return num_bytes >> shift << shift
