"""Shapes of real models, recipes that a tensor-parallel engine has for them, holders of them; no weights."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from headrace.geometry import RegionTable
from headrace.manifest import HolderAddress, Manifest, SegmentDescriptor
from headrace.planner.digest_tables import param_ndims
from headrace.recipe import FillTable, LoadRecipe
from headrace.types import I64, ITEMSIZES, ParamMeta, ParamTable

VOCAB_PAD = 64
SEGMENT_ALIGN = 64


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes that decide a decoder's tensors; zero where the model has none of a kind.

    Attributes:
        dense_layers: The first so many layers have a dense MLP also in an expert model.
        kv_lora_rank: Above zero the attention is MLA and `head_dim` is its value head.
    """

    layers: int
    hidden: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    tied: bool = False
    experts: int = 0
    expert_intermediate: int = 0
    shared_experts: int = 0
    dense_layers: int = 0
    q_lora_rank: int = 0
    kv_lora_rank: int = 0
    qk_nope: int = 0
    qk_rope: int = 0
    dtype: str = "bfloat16"


QWEN3_06B = ModelShape(
    layers=28, hidden=1024, vocab=151936, heads=16, kv_heads=8, head_dim=128, intermediate=3072, tied=True
)
QWEN3_8B = ModelShape(
    layers=36, hidden=4096, vocab=151936, heads=32, kv_heads=8, head_dim=128, intermediate=12288
)
QWEN3_30B_A3B = ModelShape(
    layers=48, hidden=2048, vocab=151936, heads=32, kv_heads=4, head_dim=128, intermediate=6144,
    experts=128, expert_intermediate=768,
)  # fmt: skip
KIMI_K2 = ModelShape(
    layers=61, hidden=7168, vocab=163840, heads=64, kv_heads=64, head_dim=128, intermediate=18432,
    experts=384, expert_intermediate=2048, shared_experts=1, dense_layers=1,
    q_lora_rank=1536, kv_lora_rank=512, qk_nope=128, qk_rope=64,
)  # fmt: skip


def qwen3_06b() -> ParamTable:
    """Return the 311 parameters of Qwen3-0.6B."""
    return params_of(QWEN3_06B)


def qwen3_8b() -> ParamTable:
    """Return the 399 parameters of Qwen3-8B."""
    return params_of(QWEN3_8B)


def qwen3_30b_a3b() -> ParamTable:
    """Return the 18,867 parameters of Qwen3-30B-A3B."""
    return params_of(QWEN3_30B_A3B)


def kimi_k2() -> ParamTable:
    """Return the about 70,000 parameters of Kimi-K2 (arXiv 2507.20534), in bfloat16."""
    return params_of(KIMI_K2)


def params_of(shape: ModelShape) -> ParamTable:
    """Return a model's checkpoint parameters."""
    return ParamTable(_metas(shape))


def _metas(shape: ModelShape) -> Iterator[ParamMeta]:
    yield ParamMeta("model.embed_tokens.weight", shape.dtype, (shape.vocab, shape.hidden))
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield ParamMeta(f"{prefix}.{norm}.weight", shape.dtype, (shape.hidden,))
        attention = _mla(shape) if shape.kv_lora_rank else _gqa(shape)
        for name, dims in attention.items():
            yield ParamMeta(f"{prefix}.self_attn.{name}.weight", shape.dtype, dims)
        yield from _mlp(shape, layer, f"{prefix}.mlp")
    yield ParamMeta("model.norm.weight", shape.dtype, (shape.hidden,))
    yield ParamMeta("lm_head.weight", shape.dtype, (shape.vocab, shape.hidden))


def _gqa(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    kv = shape.kv_heads * shape.head_dim
    return {
        "q_proj": (shape.heads * shape.head_dim, shape.hidden),
        "k_proj": (kv, shape.hidden),
        "v_proj": (kv, shape.hidden),
        "o_proj": (shape.hidden, shape.heads * shape.head_dim),
        "q_norm": (shape.head_dim,),
        "k_norm": (shape.head_dim,),
    }


def _mla(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    return {
        "q_a_proj": (shape.q_lora_rank, shape.hidden),
        "q_a_layernorm": (shape.q_lora_rank,),
        "q_b_proj": (shape.heads * (shape.qk_nope + shape.qk_rope), shape.q_lora_rank),
        "kv_a_proj_with_mqa": (shape.kv_lora_rank + shape.qk_rope, shape.hidden),
        "kv_a_layernorm": (shape.kv_lora_rank,),
        "kv_b_proj": (shape.heads * (shape.qk_nope + shape.head_dim), shape.kv_lora_rank),
        "o_proj": (shape.hidden, shape.heads * shape.head_dim),
    }


def _mlp(shape: ModelShape, layer: int, prefix: str) -> Iterator[ParamMeta]:
    if not shape.experts or layer < shape.dense_layers:
        yield from _gated(shape, prefix, shape.intermediate)
        return
    yield ParamMeta(f"{prefix}.gate.weight", shape.dtype, (shape.experts, shape.hidden))
    if shape.shared_experts:
        yield ParamMeta(f"{prefix}.gate.e_score_correction_bias", "float32", (shape.experts,))
        yield from _gated(shape, f"{prefix}.shared_experts", shape.shared_experts * shape.expert_intermediate)
    for expert in range(shape.experts):
        yield from _gated(shape, f"{prefix}.experts.{expert}", shape.expert_intermediate)


def _gated(shape: ModelShape, prefix: str, intermediate: int) -> Iterator[ParamMeta]:
    yield ParamMeta(f"{prefix}.gate_proj.weight", shape.dtype, (intermediate, shape.hidden))
    yield ParamMeta(f"{prefix}.up_proj.weight", shape.dtype, (intermediate, shape.hidden))
    yield ParamMeta(f"{prefix}.down_proj.weight", shape.dtype, (shape.hidden, intermediate))


_FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj",
          "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj",
          "q_a_proj": "fused_qkv_a_proj", "kv_a_proj_with_mqa": "fused_qkv_a_proj"}  # fmt: skip
_BY_COLUMNS = {"o_proj", "down_proj"}
_REPLICATED = {"q_a_proj", "kv_a_proj_with_mqa", "gate"}
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")


@dataclass
class _Targets:
    """Live tensors as they are found: name, rows written so far, trailing shape, experts."""

    index: dict[str, int] = field(default_factory=dict)
    rows: list[int] = field(default_factory=list)
    tail: list[tuple[int, ...]] = field(default_factory=list)
    experts: list[int] = field(default_factory=list)
    dtypes: list[str] = field(default_factory=list)

    def add(self, name: str, rows: int, tail: tuple[int, ...], expert: int, dtype: str) -> tuple[int, int]:
        """Append rows to a target and return its id and the first row."""
        block = self.index.setdefault(name, len(self.index))
        if block == len(self.rows):
            self.rows.append(0)
            self.tail.append(tail)
            self.experts.append(0)
            self.dtypes.append(dtype)
        first = 0 if expert >= self.experts[block] else self.rows[block]
        self.experts[block] = max(self.experts[block], expert + 1)
        self.rows[block] = first + rows
        return block, first

    def table(self, padded: dict[str, int]) -> ParamTable:
        """Return the tensors; a stacked one has its experts in front."""
        metas = []
        for name, block in self.index.items():
            shape = (padded.get(name, self.rows[block]), *self.tail[block])
            stack = (self.experts[block],) if ".experts.w" in name else ()
            metas.append(ParamMeta(name, self.dtypes[block], (*stack, *shape)))
        return ParamTable(metas)


def tp_recipe(
    params: ParamTable, tp_size: int, rank: int, *, kv_heads: int = 0, tied: bool = False
) -> LoadRecipe:
    """Return the recipe that a tensor-parallel engine's loader would record, fused and stacked as in vLLM.

    Args:
        params: Parameters with names as in this module.
        tp_size: Ranks; must divide heads and intermediate sizes.
        rank: Which one.
        kv_heads: Number of key heads; where there are fewer than ranks, they are replicated.
        tied: Whether the engine ignores `lm_head`.
    """
    targets, rows, unused, padded = _Targets(), [], [], {}
    for i, meta in enumerate(params):
        if tied and meta.name == "lm_head.weight":
            unused.append(i)
            continue
        dim, begin, extent = _shard(meta, tp_size, rank, kv_heads)
        name, expert = _target(meta.name)
        local = tuple(extent if d == dim else n for d, n in enumerate(meta.shape))
        block, first = targets.add(name, local[0], local[1:], expert, meta.dtype)
        if _is_vocab(meta.name):
            padded[name] = -(-meta.shape[0] // VOCAB_PAD) * VOCAB_PAD // tp_size
        rows.append((i, dim, begin, extent, block, first, expert))
    table = targets.table(padded)
    regions, shape = _regions(params, table, np.array(rows, np.int64).reshape(-1, 7))
    return LoadRecipe(
        sources=params,
        targets=table,
        regions=regions.take(np.flatnonzero(shape.prod(axis=1))),
        fills=_padding(table, targets.rows),
        opaque=np.zeros(0, np.int32),
        unused=np.array(unused, np.int32),
        opaque_reasons={},
        proven=True,
    )


def _is_vocab(name: str) -> bool:
    return name in ("model.embed_tokens.weight", "lm_head.weight")


def _target(name: str) -> tuple[str, int]:
    """Return the live tensor's name and the expert, -1 where it is not stacked."""
    stacked = _EXPERT.fullmatch(name)
    if stacked:
        return f"{stacked[1]}.{'w2' if stacked[3] == 'down_proj' else 'w13'}_weight", int(stacked[2])
    *prefix, module, kind = name.split(".")
    return ".".join((*prefix, _FUSED.get(module, module), kind)), -1


def _shard(meta: ParamMeta, tp_size: int, rank: int, kv_heads: int) -> tuple[int, int, int]:
    """Return the sharded dim, the begin and the extent of one rank's part."""
    module = meta.name.split(".")[-2]
    extent = meta.shape[0]
    if _is_vocab(meta.name):
        each = -(-extent // VOCAB_PAD) * VOCAB_PAD // tp_size
        begin = min(rank * each, extent)
        return 0, begin, min(each, extent - begin)
    if len(meta.shape) == 1 or module in _REPLICATED:
        return 0, 0, extent
    if module in _BY_COLUMNS:
        return 1, rank * (meta.shape[1] // tp_size), meta.shape[1] // tp_size
    if module in ("k_proj", "v_proj") and 0 < kv_heads < tp_size:
        each = extent // kv_heads
        return 0, rank * kv_heads // tp_size * each, each
    return 0, rank * (extent // tp_size), extent // tp_size


def _regions(params: ParamTable, targets: ParamTable, rows: I64) -> tuple[RegionTable, I64]:
    source, dim, begin, extent, block, first, expert = rows.T
    shape, offsets = params.shapes[source], np.zeros((len(rows), params.max_ndim), np.int64)
    each = np.arange(len(rows))
    shape[each, dim], offsets[each, dim] = extent, begin
    item = ITEMSIZES[targets.dtype_codes[block]]
    ndim = param_ndims(targets)[block].astype(np.int64)
    last = targets.shapes[block, ndim - 1]
    matrix = params.shapes.shape[1] > 1
    strides = np.zeros_like(shape)
    flat = param_ndims(params)[source] == 1
    strides[:, 0] = np.where(flat, 1, last) * item
    if matrix:
        strides[~flat, 1] = item[~flat]
    row_bytes = np.where(flat, item, last * item)
    per_expert = targets.shapes[block, np.maximum(ndim - 2, 0)] * row_bytes
    base = first * row_bytes + np.maximum(expert, 0) * per_expert
    table = RegionTable(source.astype(np.int32), offsets, shape, block.astype(np.int32), base, strides)
    return table, shape


def _padding(targets: ParamTable, rows: list[int]) -> FillTable:
    """Return zeros for the vocabulary rows that no source has."""
    short = [i for i, meta in enumerate(targets) if _is_vocab(meta.name) and rows[i] < meta.shape[0]]
    width = targets.shapes[short, 1]
    begin = np.array([rows[i] for i in short], np.int64)
    extent = targets.shapes[short, 0] - begin
    ones = np.ones_like(width)
    return FillTable(
        np.array(short, np.int32),
        begin * width,
        np.stack([extent, width], axis=1),
        np.stack([width, ones], axis=1),
        np.zeros(len(short)),
    )


def whole_manifest(
    params: ParamTable, name: str = "holder", *, version: int = 1, num_segments: int = 1
) -> Manifest:
    """Return the manifest of a holder that has every parameter whole, in file order, over some segments."""
    offsets = np.zeros_like(params.shapes)
    return _manifest(params, name, version, (offsets, params.shapes), num_segments)


def sharded_manifests(params: ParamTable, num_holders: int, *, version: int = 1) -> list[Manifest]:
    """Return the manifests of holders that share the rows of each parameter, as FSDP2 cuts them."""
    found = []
    each = -(-params.shapes[:, 0] // num_holders)
    for rank in range(num_holders):
        shape, offsets = params.shapes.copy(), np.zeros_like(params.shapes)
        offsets[:, 0] = np.minimum(rank * each, shape[:, 0])
        shape[:, 0] = np.minimum(each, shape[:, 0] - offsets[:, 0])
        found.append(_manifest(params, f"holder-{rank}", version, (offsets, shape), 1))
    return found


def _manifest(
    params: ParamTable, name: str, version: int, boxes: tuple[I64, I64], num_segments: int
) -> Manifest:
    offsets, shape = boxes
    keep = np.flatnonzero((shape > 0).all(axis=1))
    offsets, shape = offsets[keep], shape[keep]
    item = ITEMSIZES[params.dtype_codes[keep]]
    inner = np.ones_like(shape)
    inner[:, :-1] = np.cumprod(shape[:, :0:-1], axis=1)[:, ::-1]
    padded = -(-shape.prod(axis=1) * item // SEGMENT_ALIGN) * SEGMENT_ALIGN
    end = np.cumsum(padded)
    block = np.minimum(
        (end - padded) * num_segments // max(int(end[-1]) if len(end) else 1, 1), num_segments - 1
    )
    first = np.concatenate([[0], np.cumsum(np.bincount(block, padded, num_segments).astype(np.int64))])
    regions = RegionTable(
        keep.astype(np.int32),
        offsets,
        shape,
        block.astype(np.int32),
        end - padded - first[block],
        inner * item[:, None],
    )
    segments = tuple(
        SegmentDescriptor(f"{name}/{i}", int(first[i + 1] - first[i])) for i in range(num_segments)
    )
    address = HolderAddress(name, unix_socket=f"{name}.sock", tcp_endpoint="127.0.0.1:7001")
    return Manifest(address, version, params, segments, regions)


__all__ = [
    "KIMI_K2",
    "QWEN3_06B",
    "QWEN3_8B",
    "QWEN3_30B_A3B",
    "ModelShape",
    "kimi_k2",
    "params_of",
    "qwen3_06b",
    "qwen3_8b",
    "qwen3_30b_a3b",
    "sharded_manifests",
    "tp_recipe",
    "whole_manifest",
]
