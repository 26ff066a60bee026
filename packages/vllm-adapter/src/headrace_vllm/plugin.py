"""The plug-in that every vLLM process loads: the weight-transfer engine, the watch on models, and calls that hold.

Loading it starts nothing: no thread, no socket, no device.
"""

from __future__ import annotations

import logging

from headrace.errors import BackendUnavailableError
from headrace_vllm.versions import check_version

logger = logging.getLogger(__name__)
BACKEND = "headrace"


def register() -> None:
    """Register the weight-transfer engine `headrace`, the watch on model loading, and calls that hold. Idempotent.

    In a vLLM that this adapter does not know, only the name is registered: an engine that asks for it then says why
    it cannot be had, and other engines are not disturbed.
    """
    import vllm  # noqa: PLC0415 - vLLM calls this; importing the module alone must not need it
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory  # noqa: PLC0415

    from headrace_vllm.holding import watch_core  # noqa: PLC0415
    from headrace_vllm.watch import watch_model_loading  # noqa: PLC0415

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            BACKEND, "headrace_vllm.transfer", "HeadraceTransferEngine"
        )
    try:
        check_version(vllm.__version__)
    except BackendUnavailableError as error:
        logger.info("%s", error)
    else:
        watch_model_loading()
        watch_core()
