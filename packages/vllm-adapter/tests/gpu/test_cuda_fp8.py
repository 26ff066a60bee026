"""FP8 on a real vLLM for CUDA: after an update every parameter is, byte for byte, what a fresh engine loads."""

from __future__ import annotations

import importlib.util
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from children import run_child
from safetensors.torch import load_file, save_file

from headrace.testing.tiny_model import TinySize, make_tiny_qwen3, make_tiny_qwen3_moe

pytestmark = [
    pytest.mark.gpu(1),
    pytest.mark.timeout(420),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM"),
]
CHILD = Path(__file__).parents[1] / "support" / "fp8_child.py"
SIZE = TinySize(num_layers=2, hidden=512, intermediate=1024, num_heads=8, num_kv_heads=4, head_dim=64)
EXPERTS = TinySize(
    num_layers=2, hidden=512, intermediate=256, num_heads=8, num_kv_heads=4, head_dim=64, num_experts=8
)
MAKERS = {"dense": (make_tiny_qwen3, SIZE), "experts": (make_tiny_qwen3_moe, EXPERTS)}
BLOCK = 128
KERNELS = {
    "keep the layout": {"VLLM_USE_DEEP_GEMM": "0"},
    "requantise": {"VLLM_USE_DEEP_GEMM": "1", "VLLM_DEEP_GEMM_WARMUP": "skip"},
}
"""What makes vLLM choose kernels that read an FP8 checkpoint as it is, or with scales that are powers of two."""
KEPT = ("embed_tokens", "lm_head", "norm", "mlp.gate.")


def quantized(folder: Path, into: Path) -> Path:
    """Write a bfloat16 checkpoint as FP8 in blocks of 128 by 128, as such checkpoints are published."""
    into.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if any(part in name for part in KEPT):
            tensors[name] = tensor
            continue
        rows, columns = (-(-n // BLOCK) for n in tensor.shape)
        wide = torch.zeros(rows * BLOCK, columns * BLOCK)
        wide[: tensor.shape[0], : tensor.shape[1]] = tensor.float()
        tiles = wide.view(rows, BLOCK, columns, BLOCK)
        scale = tiles.abs().amax(dim=(1, 3)).clamp(min=1e-12) / 448.0
        flat = (tiles / scale[:, None, :, None]).reshape(wide.shape)[: tensor.shape[0], : tensor.shape[1]]
        tensors[name] = flat.contiguous().to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale
    save_file(tensors, into / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    left = [f"model.layers.{i}.mlp.gate" for i in range(config["num_hidden_layers"])]
    config["quantization_config"] = {
        "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK], "fmt": "e4m3",
        "modules_to_not_convert": ["lm_head", *left],
    }  # fmt: skip
    (into / "config.json").write_text(json.dumps(config))
    for file in folder.iterdir():
        if not (into / file.name).exists():
            (into / file.name).write_bytes(file.read_bytes())
    return into


def run_beside(
    paths: list[list[Path]], folder: Path, engine: dict[str, Any], variables: dict[str, str]
) -> list[list[dict[str, Any]]]:
    """Run an engine for each list of checkpoints, at the same time, on the GPUs in turn; returns each one's states."""

    def run(number: int) -> list[dict[str, Any]]:
        own = folder / f"run{number}"
        own.mkdir()
        spec = {"checkpoints": list(map(str, paths[number])), "engine": engine}
        environment = os.environ | variables | {"CUDA_VISIBLE_DEVICES": str(number % torch.cuda.device_count())}
        states: list[dict[str, Any]] = run_child(CHILD, spec, own, environment, timeout_s=400)["states"]
        return states

    with ThreadPoolExecutor(len(paths)) as pool:
        return list(pool.map(run, range(len(paths))))


def check_like_fresh(state: dict[str, Any], fresh: dict[str, Any]) -> None:
    assert "error" not in state, state
    assert state["digests"] == fresh["digests"]
    assert state["tokens"] == fresh["tokens"]


@pytest.fixture(params=list(MAKERS))
def plain(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Path]:
    maker, size = MAKERS[request.param]
    return {name: maker(tmp_path / name, seed, dtype="bfloat16", size=size) for name, seed in (("a", 1), ("b", 2))}


@pytest.mark.parametrize("kernels", list(KERNELS))
def test_a_checkpoint_in_fp8(plain: dict[str, Path], tmp_path: Path, kernels: str) -> None:
    """And a bfloat16 one is refused before the pause: it has no scales, and would be cast without them."""
    a, b = (quantized(plain[name], tmp_path / f"{name}8") for name in "ab")
    updated, (fresh,) = run_beside([[a, plain["b"], b, a], [b]], tmp_path, {}, KERNELS[kernels])
    start, refused, new, again = updated
    assert refused["weights_state"] == "old"
    assert refused["digests"] == start["digests"]
    check_like_fresh(new, fresh)
    check_like_fresh(again, start)
    assert new["digests"] != start["digests"]
    straight = (new["opaque"], again["opaque"]) == (0, 0)
    assert straight == (kernels == "keep the layout")


def test_what_is_quantised_while_loading_goes_through_the_life_cycle(plain: dict[str, Path], tmp_path: Path) -> None:
    updated, (fresh,) = run_beside(
        [[plain["a"], plain["b"], plain["a"]], [plain["b"]]], tmp_path, {"quantization": "fp8"}, {}
    )
    start, new, again = updated
    check_like_fresh(new, fresh)
    check_like_fresh(again, start)
    assert new["opaque"] > 0
