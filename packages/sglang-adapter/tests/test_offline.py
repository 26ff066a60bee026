"""Engine objects of one process: `attach` to an `Engine`, between calls and inside an event loop."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import checkpoints_of
from children import run_child
from oracle import Oracle
from prompts import PROMPT, RunOffline
from sglang_server import environment

from headrace.errors import ConfigError
from headrace_sglang import attach

pytestmark = pytest.mark.timeout(240)
SUPPORT = Path(__file__).parent / "support"


def test_sources_that_do_not_fit_leave_the_weights_alone(run_offline: RunOffline, tmp_path: Path) -> None:
    made = checkpoints_of("qwen3", tmp_path)
    results = run_offline([made[name] for name in ("a", "partial", "misshapen", "b")], verify="full")
    oracle = Oracle({name: made[name] for name in "ab"})
    for which, result in zip("aaab", results, strict=True):
        assert oracle.problems(PROMPT, result["answer"], [which] * 12) == []
    assert [result.get("weights_state") for result in results] == [None, "old", "old", None]
    assert [result["version"] for result in results] == [None, None, None, 1]


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["tp_size", "dp_size"])
def test_engines_of_two_schedulers(parallel: str, run_offline: RunOffline, tmp_path: Path) -> None:
    made = checkpoints_of("llama", tmp_path)
    results = run_offline([made[name] for name in "abca"], cache="keep", **{parallel: 2})
    oracle = Oracle({name: made[name] for name in "abc"})
    assert [result["version"] for result in results] == [None, 1, 2, 3]
    assert [result.get("error") for result in results] == [None] * 4
    assert oracle.problems(PROMPT, results[0]["answer"], ["a"] * 12) == []


def test_a_request_of_an_engine_in_an_event_loop_goes_on(tmp_path: Path) -> None:
    made = checkpoints_of("llama", tmp_path)
    told = {"checkpoints": [str(made["a"]), str(made["b"])], "prompt": PROMPT, "num_tokens": 450}
    result = run_child(SUPPORT / "async_child.py", told, tmp_path, environment())
    assert result["version"] == result["served"] == 1
    names = {"default": "a", "1": "b"}
    said = [(PROMPT, answer, [names[v] for v in answer["versions"]]) for answer in result["answers"]]
    assert ["a", "b"] in [list(dict.fromkeys(versions)) for _, _, versions in said]
    assert Oracle({name: made[name] for name in "ab"}).problems_of(said) == []


def test_what_is_no_engine() -> None:
    with pytest.raises(ConfigError, match="no SGLang engine"):
        attach(object())
