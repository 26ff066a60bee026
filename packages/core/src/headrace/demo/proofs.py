"""What the demo proves from outside: what workers hold, what clients received, what tokens should have been."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from headrace.demo.streams import StreamedRequest

TOLERANCE = 1e-3
SETTLED_S = 0.25
_MOST_REPLAYED = 12
_MOST_NAMED = 5
Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Proof:
    """One claim, whether it held, and what was looked at.

    Attributes:
        name: Key in the JSON document.
        claim: What was proven, one sentence.
        problems: What contradicts it; empty where it held.
        details: Counts of what was looked at.
    """

    name: str
    claim: str
    problems: list[str]
    details: dict[str, object] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether nothing contradicts the claim."""
        return not self.problems


@dataclass(frozen=True, slots=True)
class Window:
    """When one update ran, and which version it made."""

    version: int
    begin_s: float
    end_s: float


# ---- weights


def weight_differences(answer: Mapping[str, Any], source: Weights) -> list[str]:
    """Compare every shard of every worker with its slices of `source`, by sha256; returns what differs.

    Args:
        answer: What `/headrace/fingerprints` said.
        source: Full tensors by checkpoint name, on the CPU.
    """
    differences = []
    held: dict[str, set[tuple[tuple[int, ...], tuple[int, ...]]]] = defaultdict(set)
    for rank in answer["ranks"]:
        for tensor in rank["tensors"]:
            name = tensor["name"]
            held[name] |= {(tuple(box["offsets"]), tuple(box["shape"])) for box in tensor["boxes"]}
            if name not in source or _shard_sum(source[name], tensor) != tensor["sha256"]:
                differences.append(f"rank {rank['rank']}: {name}")
    return differences + [
        f"{name}: the workers hold {have} of {tensor.numel()} elements between them"
        for name, tensor in source.items()
        if (have := sum(_volume(shape) for _, shape in held[name])) != tensor.numel()
    ]


def _shard_sum(source: torch.Tensor, tensor: Mapping[str, Any]) -> str:
    """Return the sha256 that a worker's shard must have."""
    slices = [
        source[tuple(slice(o, o + n) for o, n in zip(box["offsets"], box["shape"], strict=True))]
        for box in tensor["boxes"]
    ]
    joined = torch.cat(slices, tensor["dim"]) if len(slices) > 1 else slices[0]
    cast = joined.to(getattr(torch, tensor["dtype"])).contiguous()
    return hashlib.sha256(cast.reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def _volume(shape: Iterable[int]) -> int:
    volume = 1
    for extent in shape:
        volume *= extent
    return volume


# ---- requests


def requests_proof(requests: Sequence[StreamedRequest]) -> Proof:
    """Check that every request got exactly the tokens it asked for and ended as asked."""
    problems = [
        f"request {number}: {problem}"
        for number, request in enumerate(requests)
        if (problem := _request_problem(request))
    ]
    details: dict[str, object] = {
        "requests": len(requests),
        "tokens": sum(len(request.tokens) for request in requests),
        "wanted_tokens": sum(request.num_wanted for request in requests),
    }
    return Proof(
        name="requests_complete",
        claim=f"{len(requests)} requests, none failed, no token lost: {details['tokens']} of "
        f"{details['wanted_tokens']} tokens came",
        problems=problems if requests else ["no request was sent"],
        details=details,
    )


def _request_problem(request: StreamedRequest) -> str:
    if request.error:
        return request.error
    if not request.done:
        return "its stream did not end"
    if len(request.tokens) != request.num_wanted:
        return f"{len(request.tokens)} tokens came, {request.num_wanted} were asked for"
    if request.finish_reason != "length":
        return f"it finished with {request.finish_reason!r}, not 'length'"
    return ""


def versions_proof(
    requests: Sequence[StreamedRequest], windows: Sequence[Window], health: Mapping[str, Any]
) -> Proof:
    """Check that every token's version is known and never falls, and that no step saw two versions."""
    problems = [
        f"request {number}: {problem}"
        for number, request in enumerate(requests)
        if (problem := _version_problem(request, windows))
    ]
    if health.get("mixed_steps") != 0:
        problems.append(f"the engine counted {health.get('mixed_steps')} steps with mixed weights")
    if health.get("status") != "ready" or health.get("paused"):
        problems.append(f"/health says {health.get('status')!r}, paused {health.get('paused')}")
    crossing = [request for request in requests if request.version_starts]
    if windows and not crossing:
        problems.append("no request ran across an update")
    return Proof(
        name="versions_in_order",
        claim=f"every token tells its version, no step saw two; {len(crossing)} requests ran across an update "
        "and show both",
        problems=problems,
        details={
            "requests_across_updates": len(crossing),
            "versions_seen": sorted({v for r in requests for v in r.versions if v is not None}),
            "mixed_steps": health.get("mixed_steps"),
            "health": health.get("status"),
        },
    )


def _version_problem(request: StreamedRequest, windows: Sequence[Window]) -> str:
    known = [version for version in request.versions if version is not None]
    if len(known) < len(request.versions):
        return f"{len(request.versions) - len(known)} tokens of unknown version"
    if known != sorted(known):
        return f"its versions fall: {[known[0], *(known[i] for i in request.version_starts)]}"
    if not known:
        return ""
    for window in windows:
        ran_before = request.times_s[0] < window.begin_s
        ran_after = request.times_s[-1] > window.end_s + SETTLED_S
        if ran_before and ran_after and not known[0] < window.version <= known[-1]:
            return (
                f"it ran across the update to version {window.version}, but shows {known[0]} to {known[-1]}"
            )
    return ""


# ---- replay


def replay_proof(requests: Sequence[StreamedRequest], weights: Mapping[int, Weights], model: Path) -> Proof:
    """Compute again, in one process from the sources, what each token's version says, and compare.

    Greedy tokens must have the greatest logit of a forward pass over everything before them with the weights of
    their own version alone: a token made by a mixture, from old KV, or after a lost one would not.

    Args:
        requests: Those that ran across an update come first; a dozen is looked at.
        weights: Full tensors by version.
        model: Folder with the configuration.
    """
    chosen = sorted(requests, key=lambda request: -len(request.version_starts))[:_MOST_REPLAYED]
    problems, worst, num_tokens = [], 0.0, 0
    for version, lacks in _replay(chosen, weights, model):
        num_tokens += len(lacks)
        worst = max(worst, *lacks)
        wrong = sum(lack > TOLERANCE for lack in lacks)
        if wrong:
            problems.append(
                f"{wrong} of {len(lacks)} tokens of version {version} are not what its weights say"
            )
    return Proof(
        name="tokens_replayed",
        claim=f"{num_tokens} tokens of {len(chosen)} requests are what their version's weights alone say, "
        "computed again by one process",
        problems=problems if num_tokens else ["there was no token to replay"],
        details={"requests": len(chosen), "tokens": num_tokens, "largest_logit_difference": worst},
    )


def _replay(
    requests: Sequence[StreamedRequest], weights: Mapping[int, Weights], folder: Path
) -> Iterable[tuple[int, list[float]]]:
    """Yield, per request and version, how much each token's logit lacks to the greatest."""
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415 - the extra `engine`

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).float().eval()
    for version in sorted(weights):
        own = [request for request in requests if version in request.versions]
        if own:
            model.load_state_dict(weights[version])
        for request in own:
            yield version, _lacks(model, request, version)


def _lacks(model: Any, request: StreamedRequest, version: int) -> list[float]:  # noqa: ANN401 - transformers' own
    whole = request.prompt.tokens + request.tokens
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([whole[:-1]])).logits[0, len(request.prompt.tokens) - 1 :]
    made = logits[torch.arange(len(request.tokens)), torch.tensor(request.tokens)]
    lacks: list[float] = (logits.max(dim=-1).values - made).tolist()
    return [lack for lack, of in zip(lacks, request.versions, strict=True) if of == version]


def named(names: Sequence[str]) -> str:
    """Return the first few of many names."""
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more
