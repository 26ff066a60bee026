"""Engine objects of one process: `attach` to an `LLM` and to an `AsyncLLM`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from checkpoints import checkpoints_of, make_adapter, merge_adapter
from children import run_child
from oracle import Oracle
from prompts import PROMPT, RunOffline
from vllm_variables import QUIET

from headrace.errors import ConfigError
from headrace_vllm import attach

pytestmark = pytest.mark.timeout(240)
SUPPORT = Path(__file__).parent / "support"


def test_sources_that_do_not_fit_leave_the_weights_alone(run_offline: RunOffline, tmp_path: Path) -> None:
    made = checkpoints_of("qwen3", tmp_path)
    results = run_offline([made[name] for name in ("a", "partial", "misshapen", "b")])
    oracle = Oracle({name: made[name] for name in "ab"})
    for which, result in zip("aaab", results, strict=True):
        assert oracle.problems(PROMPT, result["answer"], [which] * 12) == []
    assert [result.get("weights_state") for result in results] == [None, "old", "old", None]
    assert [result["version"] for result in results] == [None, None, None, 1]


def test_what_vllm_quantises_while_loading_is_as_loaded_afresh(run_offline: RunOffline, tmp_path: Path) -> None:
    made = checkpoints_of("qwen3", tmp_path)
    start, partial, new, again = run_offline([made[n] for n in ("a", "partial", "b", "a")], quantization="rounding")
    (fresh,) = run_offline([made["b"]], quantization="rounding")
    assert (partial["weights_state"], partial["answer"]) == ("old", start["answer"])
    assert "error" not in new | again
    assert (new["answer"], again["answer"]) == (fresh["answer"], start["answer"])
    assert start["answer"]["tokens"] != fresh["answer"]["tokens"]
    assert new["opaque"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(("unpacked", "load_format"), [(False, "auto"), (True, "auto"), (True, "dummy")])
def test_adapters_stay_when_their_base_changes(
    unpacked: bool, load_format: str, run_offline: RunOffline, tmp_path: Path
) -> None:
    made = checkpoints_of("qwen3", tmp_path)
    adapter = make_adapter(made["a"], tmp_path / "adapter", seed=7)
    merged = {name: merge_adapter(made[name], adapter) for name in "abc"}
    results = run_offline(
        [made[name] for name in "abc"], unpacked=unpacked, lora=adapter, load_format=load_format,
        enable_lora=True, max_lora_rank=8, max_loras=1,
    )  # fmt: skip
    plain, adapted = Oracle({name: made[name] for name in "abc"}), Oracle(merged)
    for which, result in list(zip("abc", results, strict=True))[load_format == "dummy" :]:
        assert "error" not in result
        assert plain.problems(PROMPT, result["answer"], [which] * 12) == []
        assert adapted.problems(PROMPT, result["adapted"], [which] * 12) == []
        assert result["adapted"]["logprobs"] != result["answer"]["logprobs"]


def test_a_request_of_an_async_engine_goes_on(tmp_path: Path) -> None:
    made = checkpoints_of("llama", tmp_path)
    told = {"checkpoints": [str(made["a"]), str(made["b"])], "prompt": PROMPT, "num_tokens": 450}
    result = run_child(SUPPORT / "async_child.py", told, tmp_path, os.environ | QUIET)
    assert result["version"] == result["served"] == 1
    names = {"default": "a", "1": "b"}
    said = [(PROMPT, answer, [names[v] for v in answer["versions"]]) for answer in result["answers"]]
    assert ["a", "b"] in [list(dict.fromkeys(versions)) for _, _, versions in said]
    assert Oracle({name: made[name] for name in "ab"}).problems_of(said) == []


def test_an_async_engine_is_held(tmp_path: Path) -> None:
    """Every token is what its version makes of the KV that was kept, through the switch."""
    made = checkpoints_of("llama", tmp_path)
    told = {
        "checkpoints": [str(made["a"]), str(made["b"])],
        "prompt": PROMPT,
        "num_tokens": 450,
        "engine": {"worker_extension_cls": "nopack.Unpacked", "enable_prefix_caching": False},
        "update": {"cache": "keep", "barrier": "hold"},
    }
    path = os.pathsep.join(filter(None, (str(SUPPORT), os.environ.get("PYTHONPATH"))))
    result = run_child(SUPPORT / "async_child.py", told, tmp_path, os.environ | QUIET | {"PYTHONPATH": path})
    assert (result["version"], result["served"], result["barrier"]) == (1, 1, "hold")
    names = {"default": "a", "1": "b"}
    oracle = Oracle({name: made[name] for name in "ab"})
    said = [(answer, [names[v] for v in answer["versions"]]) for answer in result["answers"]]
    assert any(set(versions) == {"a", "b"} for _, versions in said)
    for answer, versions in said:
        assert oracle.problems_with_kept_caches(PROMPT, answer, versions) == []


def test_an_engine_that_sleeps_is_refused(tmp_path: Path) -> None:
    """Its weights are in no memory: a GPU's worker would die of the first read."""
    made = checkpoints_of("llama", tmp_path)
    told = {"checkpoints": [str(made["a"]), str(made["b"])]}
    result = run_child(SUPPORT / "sleeping_child.py", told, tmp_path, os.environ | QUIET)
    assert "wake it up first" in result["asleep"]["error"]
    assert (result["asleep"]["weights_state"], result["asleep"]["version"]) == ("old", None)
    assert (result["awake"].get("error"), result["awake"]["version"]) == (None, 1)


def test_an_engine_that_was_not_started_for_headrace() -> None:
    config = SimpleNamespace(
        weight_transfer_config=None, parallel_config=SimpleNamespace(worker_extension_cls="")
    )
    with pytest.raises(ConfigError, match="not started for Headrace"):
        attach(SimpleNamespace(vllm_config=config))
    with pytest.raises(ConfigError, match="no vLLM engine"):
        attach(object())


LOST = """
import os
from types import SimpleNamespace
from vllm.config import ParallelConfig
from headrace.errors import ConfigError
from headrace_vllm import attach

launched = ParallelConfig(distributed_executor_backend="external_launcher", tensor_parallel_size=2)
os.environ["VLLM_DP_SIZE"] = "2"
for parallel in (launched, ParallelConfig()):
    assert parallel.world_size_across_dp == 2
    config = SimpleNamespace(weight_transfer_config=SimpleNamespace(backend="headrace"), parallel_config=parallel)
    try:
        attach(SimpleNamespace(vllm_config=config, collective_rpc=print))
    except ConfigError as error:
        print(error)
"""


def test_an_object_that_reaches_only_some_of_the_workers() -> None:
    """vLLM counts those of other processes too, whose receivers nobody would call."""
    done = subprocess.run(
        [sys.executable, "-c", LOST], env=os.environ | QUIET | {"VLLM_LOGGING_LEVEL": "ERROR"},
        capture_output=True, text=True, timeout=100, check=True,
    )  # fmt: skip
    launched, one_of_two = done.stdout.splitlines()
    assert "external launcher starts this engine's 2 workers" in launched
    assert "one of 2 data-parallel engines" in one_of_two
