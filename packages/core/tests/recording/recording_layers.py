"""Small modules whose loaders do what the loaders of vLLM and SGLang do, written for these tests."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import nn

Pairs = Iterable[tuple[str, torch.Tensor]]
HEAD, HEADS, KV_HEADS, HIDDEN, INNER, VOCAB = 4, 8, 2, 16, 24, 30


@dataclass(frozen=True)
class Tp:
    size: int = 1
    rank: int = 0


def weight(*shape: int, dtype: torch.dtype = torch.bfloat16, **attributes: object) -> nn.Parameter:
    param = nn.Parameter(torch.full(shape, 7, dtype=dtype), requires_grad=False)
    for key, value in attributes.items():
        setattr(param, key, value)
    return param


def default_loader(param: torch.Tensor, loaded: torch.Tensor) -> None:
    if param.numel() == 1 and loaded.numel() == 1:
        param.data.fill_(loaded.item())
    else:
        assert param.size() == loaded.size()
        param.data.copy_(loaded)


class Column(nn.Module):
    """Several projections side by side, each cut over the ranks by rows (gate_up_proj)."""

    def __init__(self, tp: Tp, outputs: list[int], inputs: int, bias: bool = False) -> None:
        super().__init__()
        self.tp, self.outputs = tp, outputs
        total = sum(outputs) // tp.size
        self.weight = weight(total, inputs, weight_loader=self.load)
        if bias:
            self.bias = weight(total, weight_loader=self.load)

    def load(self, param: torch.Tensor, loaded: torch.Tensor, shard: int | None = None) -> None:
        if shard is None:
            begin = 0
            for i, rows in enumerate(self.outputs):
                self.load(param, loaded.narrow(0, begin, rows), i)
                begin += rows
            return
        rows = self.outputs[shard] // self.tp.size
        begin = sum(self.outputs[:shard]) // self.tp.size
        param.data.narrow(0, begin, rows).copy_(loaded.narrow(0, self.tp.rank * rows, rows))


class Qkv(nn.Module):
    """q, k, v in one matrix; KV heads are repeated where there are fewer of them than ranks."""

    def __init__(self, tp: Tp) -> None:
        super().__init__()
        self.tp = tp
        self.q_rows = HEADS // tp.size * HEAD
        self.kv_rows = max(1, KV_HEADS // tp.size) * HEAD
        self.replicas = max(1, tp.size // KV_HEADS)
        self.weight = weight(self.q_rows + 2 * self.kv_rows, HIDDEN, weight_loader=self.load)
        self.bias = weight(self.q_rows + 2 * self.kv_rows, weight_loader=self.load)

    def load(self, param: torch.Tensor, loaded: torch.Tensor, shard: str | None = None) -> None:
        if shard is None:
            sizes = (HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD)
            for name, part in zip("qkv", loaded.split(sizes), strict=True):
                self.load(param, part, name)
            return
        begin = {"q": 0, "k": self.q_rows, "v": self.q_rows + self.kv_rows}[shard]
        rows = self.q_rows if shard == "q" else self.kv_rows
        rank = self.tp.rank if shard == "q" else self.tp.rank // self.replicas
        target = param.data.narrow(0, begin, rows)
        loaded = loaded.narrow(0, rank * rows, rows)
        assert target.shape == loaded.shape
        target.copy_(loaded)


class Row(nn.Module):
    """A projection cut over the ranks by columns (o_proj, down_proj)."""

    def __init__(self, tp: Tp, outputs: int, inputs: int) -> None:
        super().__init__()
        self.tp = tp
        self.weight = weight(outputs, inputs // tp.size, weight_loader=self.load)

    def load(self, param: torch.Tensor, loaded: torch.Tensor) -> None:
        columns = param.shape[1]
        param.data.copy_(loaded.narrow(1, self.tp.rank * columns, columns))


class Embedding(nn.Module):
    """Vocabulary rows over the ranks, padded to a multiple of 16 with zeros."""

    def __init__(self, tp: Tp) -> None:
        super().__init__()
        self.tp = tp
        self.rows = -(-VOCAB // 16) * 16 // tp.size
        self.weight = weight(self.rows, HIDDEN, weight_loader=self.load)

    def load(self, param: torch.Tensor, loaded: torch.Tensor) -> None:
        begin = min(VOCAB, self.tp.rank * self.rows)
        count = min(VOCAB, begin + self.rows) - begin
        param[:count].data.copy_(loaded.narrow(0, begin, count))
        param[count:].data.fill_(0)


class Experts(nn.Module):
    """w13 and w2 of experts, of which this rank has some (EP) or a slice of each (TP)."""

    def __init__(self, tp: Tp, num: int, *, parallel: bool = False, transposed: bool = False) -> None:
        super().__init__()
        self.tp, self.parallel, self.transposed = tp, parallel, transposed
        local = num // tp.size if parallel else num
        inner = INNER if parallel else INNER // tp.size
        mapping = torch.full((num,), -1, dtype=torch.int32)
        first = tp.rank * local if parallel else 0
        mapping[first : first + local] = torch.arange(local, dtype=torch.int32)
        self.register_buffer("expert_map", mapping, persistent=False)
        shapes = ((local, 2 * inner, HIDDEN), (local, HIDDEN, inner))
        w13, w2 = ((e, b, a) for e, a, b in shapes) if transposed else shapes
        self.w13_weight = weight(*w13, weight_loader=self.load)
        self.w2_weight = weight(*w2, weight_loader=self.load)
        self.w13_scale = weight(local, 2, dtype=torch.float32, weight_loader=self.load_scale)

    def load(self, param: torch.Tensor, loaded: torch.Tensor, shard: str, expert: int) -> None:
        local = int(self.expert_map[expert].item())
        if local == -1:
            return
        data = param.data[local]
        if self.transposed:
            data = data.t()
        dim = 1 if shard == "w2" else 0
        size = data.shape[dim] if shard == "w2" else data.shape[0] // 2
        if shard != "w2":
            data = data.narrow(0, size if shard == "w3" else 0, size)
        rank = 0 if self.parallel else self.tp.rank
        data.copy_(loaded.narrow(dim, rank * size, size))

    def load_scale(self, param: torch.Tensor, loaded: torch.Tensor, shard: str, expert: int) -> None:
        local = int(self.expert_map[expert].item())
        if local != -1:
            param.data[local][0 if shard == "w1" else 1] = loaded


class Block(nn.Module):
    def __init__(self, tp: Tp, experts: int, **options: bool) -> None:
        super().__init__()
        self.qkv_proj = Qkv(tp)
        self.o_proj = Row(tp, HIDDEN, HEADS * HEAD)
        self.norm = nn.Module()
        self.norm.weight = weight(HIDDEN, dtype=torch.float32)
        if experts:
            self.experts = Experts(tp, experts, **options)
        else:
            self.gate_up_proj = Column(tp, [INNER, INNER], HIDDEN, bias=True)
            self.down_proj = Row(tp, HIDDEN, INNER)


class Decoder(nn.Module):
    """A decoder with the stacked parameter mapping that both engines use."""

    STACKED = (
        ("qkv_proj", "q_proj", "q"),
        ("qkv_proj", "k_proj", "k"),
        ("qkv_proj", "v_proj", "v"),
        ("gate_up_proj", "gate_proj", 0),
        ("gate_up_proj", "up_proj", 1),
    )
    EXPERTS = (("w13_", "gate_proj.", "w1"), ("w13_", "up_proj.", "w3"), ("w2_", "down_proj.", "w2"))

    def __init__(
        self, tp: Tp, layers: int = 2, experts: int = 0, *, tied: bool = False, **options: bool
    ) -> None:
        super().__init__()
        self.num_experts = experts
        self.embed_tokens = Embedding(tp)
        self.layers = nn.ModuleList(Block(tp, experts, **options) for _ in range(layers))
        self.lm_head = Embedding(tp)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight

    def load_weights(self, pairs: Pairs) -> set[str]:
        params = dict(self.named_parameters())
        done = set()
        for name, loaded in pairs:
            if "inv_freq" in name or name.startswith("mtp."):
                continue
            is_tied = name == "lm_head.weight" and name not in params
            done.add(self._load_one(params, "embed_tokens.weight" if is_tied else name, loaded))
        return done

    def _load_one(self, params: dict[str, nn.Parameter], name: str, loaded: torch.Tensor) -> str:
        if ".experts." in name:
            return self._load_expert(params, name, loaded)
        for stacked, own, shard in self.STACKED:
            if f".{own}." in name:
                param = params[name.replace(own, stacked)]
                param.weight_loader(param, loaded, shard)
                return name
        param = params[name]
        getattr(param, "weight_loader", default_loader)(param, loaded)
        return name

    def _load_expert(self, params: dict[str, nn.Parameter], name: str, loaded: torch.Tensor) -> str:
        head, _, rest = name.partition(".experts.")
        expert, _, leaf = rest.partition(".")
        for target, own, shard in self.EXPERTS:
            if leaf.startswith(own):
                param = params[f"{head}.experts.{target}{leaf.removeprefix(own)}"]
                param.weight_loader(param, loaded, shard, int(expert))
        return name


class PooledDecoder(Decoder):
    """Loads through a thread pool, as SGLang does for DeepSeek."""

    def load_weights(self, pairs: Pairs) -> set[str]:
        params = dict(self.named_parameters())
        with ThreadPoolExecutor() as pool:
            return {f.result() for f in [pool.submit(self._load_one, params, name, t) for name, t in pairs]}


def decoder_sources(layers: int = 2, experts: int = 0, *, extra: bool = True) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the checkpoint that a `Decoder` is loaded from."""
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (VOCAB, HIDDEN)}
    for i in range(layers):
        for proj, rows in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            shapes[f"layers.{i}.{proj}_proj.weight"] = (rows * HEAD, HIDDEN)
            shapes[f"layers.{i}.{proj}_proj.bias"] = (rows * HEAD,)
        shapes[f"layers.{i}.o_proj.weight"] = (HIDDEN, HEADS * HEAD)
        shapes[f"layers.{i}.norm.weight"] = (HIDDEN,)
        heads = [f"layers.{i}.experts.{e}" for e in range(experts)] or [f"layers.{i}"]
        for head in heads:
            for proj in ("gate_proj", "up_proj"):
                shapes[f"{head}.{proj}.weight"] = (INNER, HIDDEN)
                shapes[f"{head}.{proj}.{'scale' if experts else 'bias'}"] = () if experts else (INNER,)
            shapes[f"{head}.down_proj.weight"] = (HIDDEN, INNER)
    if extra:
        shapes |= {"layers.0.rotary.inv_freq": (HEAD,), "mtp.0.weight": (HIDDEN, HIDDEN)}
    return shapes | {"lm_head.weight": (VOCAB, HIDDEN)}
