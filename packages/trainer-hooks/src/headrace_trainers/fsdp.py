"""Hooks for FSDP2 (`fully_shard`), HSDP, FSDP2 with tensor parallelism, and FSDP1.

    hook = headrace_trainers.fsdp.attach(model, optimizer, to="vllm=http://rollout:8000")

Every rank lends the shards that it holds; nothing is gathered.
"""

from headrace_trainers.plain import attach

__all__ = ["attach"]
