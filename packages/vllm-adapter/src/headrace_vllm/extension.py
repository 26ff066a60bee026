"""WorkerExtension: the other door for tickets, through vLLM's `collective_rpc`."""

from __future__ import annotations

from typing import Any

from headrace.protocols import Ticket


class WorkerExtension:
    """Mixed into vLLM's worker by `--worker-extension-cls headrace_vllm.WorkerExtension`."""

    vllm_config: Any
    device: Any
    model_runner: Any

    def headrace_enrol(self, update_id: str, endpoint: str, server_key: str, token: str) -> None:
        """Enrol this worker's receiver with a ticket's fields; returns at once."""
        from headrace_vllm.worker import enrol  # noqa: PLC0415 - vLLM imports this class before torch is set up

        ticket = Ticket(update_id, endpoint, server_key, token)
        enrol(self.vllm_config, self.device, self.model_runner.get_model(), ticket)
