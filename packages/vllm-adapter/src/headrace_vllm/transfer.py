"""HeadraceTransferEngine: vLLM's weight-transfer protocol as a door for tickets; weights move beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import vllm
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from headrace.errors import LocalProtocolError
from headrace.protocols import Ticket
from headrace_vllm.versions import check_version
from headrace_vllm.worker import enrol, leave

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import nn


@dataclass
class HeadraceInitInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """A Ticket's fields: where this worker's receiver dials, and how it proves that it was asked to."""

    update_id: str
    endpoint: str
    server_key: str
    token: str


@dataclass
class HeadraceUpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """Nothing: what to copy comes over the receiver's own connection."""


class HeadraceTransferEngine(WeightTransferEngine[HeadraceInitInfo, HeadraceUpdateInfo]):  # type: ignore[misc]
    """The weight-transfer engine `headrace`. Lives in every worker; making it starts nothing.

    vLLM calls 1. `init_transfer_engine` once per update, with a ticket. Start and finish only carry the version.
    """

    init_info_cls = HeadraceInitInfo
    update_info_cls = HeadraceUpdateInfo

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: nn.Module) -> None:  # noqa: ANN401
        check_version(vllm.__version__)
        super().__init__(config, vllm_config, device, model)
        self._own_model = model

    def init_transfer_engine(self, init_info: HeadraceInitInfo) -> None:
        """Enrol this worker's receiver; returns at once."""
        ticket = Ticket(init_info.update_id, init_info.endpoint, init_info.server_key, init_info.token)
        enrol(self.vllm_config, self.device, self._own_model, ticket)

    def start_weight_update(self) -> None:
        """Do nothing: the receiver enters vLLM's reload life cycle itself where it must."""

    def receive_weights(self, update_info: HeadraceUpdateInfo) -> None:  # noqa: ARG002 - vLLM's signature
        """Refuse: weights do not come through this call.

        Raises:
            LocalProtocolError: Always.
        """
        message = (
            "weights come through Headrace, not through /update_weights; run `headrace update --to vllm=URL`"
        )
        raise LocalProtocolError(message)

    def finish_weight_update(self) -> None:
        """Do nothing: bytes are in place before the version is told."""

    @staticmethod
    def trainer_send_weights(iterator: Iterator[Any], trainer_args: Any) -> None:  # noqa: ANN401, ARG004 - vLLM's
        """Refuse: trainers send by `headrace_trainers`. vLLM before 0.27 asks every engine for this method.

        Raises:
            LocalProtocolError: Always.
        """
        raise LocalProtocolError("a trainer's weights come through headrace_trainers, not through this engine")

    def shutdown(self) -> None:
        """End the receiver; a running update fails."""
        leave(self._own_model)
