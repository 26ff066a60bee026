"""Small models with weights and a tokenizer, made from a seed without a network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SENTENCES: tuple[str, ...] = (
    "the river turns the wheel and the wheel turns the mill",
    "fresh water comes down the channel while the turbine keeps turning",
    "a small model speaks in small words about rivers and light",
    "new weights arrive and the old words change their course",
    "nobody hears the moment in which the stream is replaced",
    "every stone in the bed of the river has its own place",
    "in the morning the keeper opens the gate and counts the boats",
    "at night the lamps along the bank are green and gold",
)
"""What the tokenizer is trained on; its tokens are words and syllables of these lines."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TinySize:
    """Extents of a tiny model; the defaults divide by two tensor-parallel ranks.

    Attributes:
        num_layers: Decoder layers.
        hidden: Width of the residual stream.
        intermediate: Width of the feed-forward part (per expert in a mixture).
        num_heads: Query heads.
        head_dim: Elements of a head; some engines' kernels need 32.
        num_kv_heads: Key and value heads.
        num_experts: Experts per layer of a mixture.
        max_positions: Longest sequence.
    """

    num_layers: int = 2
    hidden: int = 64
    intermediate: int = 96
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    num_experts: int = 4
    max_positions: int = 2048


def make_tiny_qwen3(
    folder: Path,
    seed: int,
    *,
    dtype: str = "float32",
    size: TinySize | None = None,
    tie: bool = False,
    shards: int = 1,
) -> Path:
    """Write a random Qwen3 (config, safetensors, tokenizer) into `folder` and return it.

    Equal arguments give equal bytes. Blocking; no network.

    Args:
        folder: Made if missing.
        seed: Source of every weight.
        dtype: Element type in the file.
        size: Extents.
        tie: Whether `lm_head` is the embedding; it is then absent from the file.
        shards: Least number of safetensors files.
    """
    return _make("qwen3", folder, seed, dtype, _extents("qwen3", size or TinySize()), tie, shards)


def make_tiny_llama(
    folder: Path,
    seed: int,
    *,
    dtype: str = "float32",
    size: TinySize | None = None,
    tie: bool = False,
    shards: int = 1,
) -> Path:
    """Write a random Llama; arguments as for `make_tiny_qwen3`."""
    return _make("llama", folder, seed, dtype, _extents("llama", size or TinySize()), tie, shards)


def make_tiny_qwen3_moe(
    folder: Path,
    seed: int,
    *,
    dtype: str = "float32",
    size: TinySize | None = None,
    tie: bool = False,
    shards: int = 1,
) -> Path:
    """Write a random Qwen3 mixture of experts, a tensor per expert; arguments as for `make_tiny_qwen3`."""
    return _make("qwen3_moe", folder, seed, dtype, _extents("qwen3_moe", size or TinySize()), tie, shards)


def make_tiny(
    kind: str, folder: Path, seed: int, extents: Mapping[str, Any], *, dtype: str = "float32", tie: bool = False
) -> Path:
    """Write a random model of any type that transformers knows.

    Args:
        kind: The model type of its configuration.
        folder: Made if missing.
        seed: Source of every weight.
        extents: Fields of the configuration.
        dtype: Element type in the file.
        tie: Whether `lm_head` is the embedding; it is then absent from the file.
    """
    return _make(kind, folder, seed, dtype, extents, tie, 1)


TINY_MODELS: dict[str, Callable[..., Path]] = {
    "qwen3": make_tiny_qwen3,
    "llama": make_tiny_llama,
    "qwen3_moe": make_tiny_qwen3_moe,
}
"""The makers by model type."""


def _make(  # noqa: PLR0913, PLR0917
    kind: str, folder: Path, seed: int, dtype: str, extents: Mapping[str, Any], tie: bool, shards: int
) -> Path:
    import torch  # noqa: PLC0415
    from transformers import AutoConfig  # noqa: PLC0415

    folder.mkdir(parents=True, exist_ok=True)
    loudness = torch.tensor(_save_tokenizer(folder))
    config = AutoConfig.for_model(
        kind, **extents, vocab_size=len(loudness), tie_word_embeddings=tie
    )
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 0, 1, 2
    model = _empty_model(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in _sorted_parameters(model):
            weight = _random_weight(name, tensor, generator)
            tensor.copy_(weight * loudness[:, None] if "embed" in name or "lm_head" in name else weight)
    _save(model.to(getattr(torch, dtype)), folder, shards)
    return folder


def _save(model: Any, folder: Path, shards: int) -> None:  # noqa: ANN401
    from transformers.utils import logging  # noqa: PLC0415

    num_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    had_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    model.save_pretrained(folder, max_shard_size=max(1, num_bytes // shards) if shards > 1 else "50GB")
    if had_bars:
        logging.enable_progress_bar()


def _extents(kind: str, size: TinySize) -> dict[str, Any]:
    common = {
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.num_layers,
        "num_attention_heads": size.num_heads,
        "num_key_value_heads": size.num_kv_heads,
        "head_dim": size.head_dim,
        "max_position_embeddings": size.max_positions,
    }
    if kind != "qwen3_moe":
        return common
    return common | {
        "num_experts": size.num_experts,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": size.intermediate,
        "norm_topk_prob": True,
    }


def _empty_model(config: Any) -> Any:  # noqa: ANN401 - transformers' configs have no common typed base
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    return AutoModelForCausalLM.from_config(config)


def _sorted_parameters(model: Any) -> Iterator[tuple[str, torch.Tensor]]:  # noqa: ANN401
    yield from sorted(model.named_parameters(), key=lambda pair: pair[0])


def _random_weight(name: str, like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return normals: around one for norms, elsewhere so wide that greedy text does not repeat one word."""
    import torch  # noqa: PLC0415

    noise = torch.randn(like.shape, generator=generator)
    if like.ndim == 1:
        return 1.0 + 0.1 * noise
    return noise * (0.2 if "embed" in name else 1.5 * like.shape[-1] ** -0.5)


def _save_tokenizer(folder: Path, sentences: Sequence[str] = SENTENCES) -> list[float]:
    """Train and save a byte-level BPE that AutoTokenizer loads; return how loud each token is.

    Whole words are loud, so that a random model speaks in words; the length is even, for two ranks.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: PLC0415
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer)
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    wrapped.save_pretrained(folder)
    tokens = [tokenizer.id_to_token(i) or "" for i in range(tokenizer.get_vocab_size())]
    tokens += [""] * (len(tokens) % 2)
    return [1.0 if token.startswith("\u0120") and len(token) > 3 else 0.1 for token in tokens]
