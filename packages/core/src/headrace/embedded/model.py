"""Loading a causal language model into one worker, whole or as this rank's tensor-parallel part."""

from __future__ import annotations

import os
import re
import warnings
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.utils import logging as transformers_logging

from headrace.embedded.weights import local_tensor
from headrace.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from headrace.embedded.messages import Startup


def torch_device(startup: Startup) -> torch.device:
    """Return this worker's device and make it current."""
    if startup.device != "cuda":
        return torch.device("cpu")
    if startup.rank >= torch.cuda.device_count():
        message = (
            f"worker {startup.rank} has no GPU: torch sees {torch.cuda.device_count()} "
            f"for {startup.world_size} workers; lower --tp or take --device cpu"
        )
        raise ConfigError(message, name="device")
    torch.cuda.set_device(startup.rank)
    return torch.device("cuda", startup.rank)


def join_group(startup: Startup) -> None:
    """Meet the other ranks of this instance; collective, a no-op for one worker."""
    os.environ |= {
        "RANK": str(startup.rank),
        "LOCAL_RANK": str(startup.rank),
        "WORLD_SIZE": str(startup.world_size),
        "LOCAL_WORLD_SIZE": str(startup.world_size),
    }
    if startup.world_size == 1:
        return
    dist.init_process_group(
        "nccl" if startup.device == "cuda" else "gloo",
        init_method=f"file://{startup.rendezvous}",
        rank=startup.rank,
        world_size=startup.world_size,
        timeout=timedelta(seconds=startup.start_s),
    )


def load_model(startup: Startup, device: torch.device) -> PreTrainedModel:
    """Load the model for inference: its checkpoint, or random weights for a dummy start. Collective.

    Raises:
        ConfigError: The model cannot be split over this many workers.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(startup.model)
    _check_divisible(config, startup.world_size)
    options: dict[str, Any] = {"config": config, "dtype": _dtype(startup.dtype, config)}
    if startup.world_size > 1:
        options["distributed_config"] = DistributedConfig(tp_size=startup.world_size)
    if startup.load_format == "dummy":
        model_class = AutoModelForCausalLM._model_mapping[type(config)]
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", UserWarning
            )  # that random numbers differ between ranks is no matter here
            model = model_class.from_pretrained(None, state_dict={}, **options)
    else:
        model = AutoModelForCausalLM.from_pretrained(startup.model, **options)
    if startup.world_size == 1:
        model = model.to(device)
    model.requires_grad_(False).eval()
    return model


def _dtype(name: str, config: Any) -> torch.dtype:  # noqa: ANN401 - every model has its own config class
    if name == "auto":
        return getattr(config, "dtype", None) or torch.float32
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(
            f"dtype is {name!r}; give auto or a torch element type such as bfloat16", name="dtype"
        )
    return dtype


def _check_divisible(config: Any, world_size: int) -> None:  # noqa: ANN401
    for field in ("num_attention_heads", "num_key_value_heads"):
        count = getattr(config, field, None)
        if count is not None and count % world_size:
            raise ConfigError(
                f"{field} of the model is {count}; it does not divide by {world_size} workers", name="tp"
            )


def stop_tokens(model: PreTrainedModel) -> list[int]:
    """Return the tokens that end a text."""
    ends = model.generation_config.eos_token_id if model.generation_config else None
    if ends is None:
        return []
    return list(ends) if isinstance(ends, list) else [ends]


def own_memory(model: torch.nn.Module) -> int:
    """Move weights that lie in a mapped checkpoint file into memory of their own; return how many.

    Until then first writes cost page faults, and a file overwritten in place would change the model.
    """
    mapped = _mapped_ranges()
    moved = 0
    for tensor in (*model.parameters(), *model.buffers()):
        local = local_tensor(tensor)
        address = local.data_ptr()
        if local.device.type == "cpu" and any(begin <= address < end for begin, end in mapped):
            tensor.data = tensor.data.clone()
            moved += 1
    return moved


def _mapped_ranges() -> list[tuple[int, int]]:
    """Return the address ranges of this process that map files."""
    ranges = []
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        found = re.match(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \S+\s+/", line)
        if found:
            ranges.append((int(found.group(1), 16), int(found.group(2), 16)))
    return ranges
