"""What a hook takes, and refuses before training begins."""

from __future__ import annotations

from typing import Any

import pytest

from headrace.config import EngineTarget
from headrace.errors import BackendUnavailableError, ConfigError
from headrace_trainers import HOOK_UPDATE, HookSettings, StepReport

URL = "torch=http://rollout:8000"


def test_one_engine_is_a_list_of_one() -> None:
    settings = HookSettings.of(URL)
    assert settings.to == [URL]
    assert settings.update is HOOK_UPDATE
    target = EngineTarget(URL, headers={"Authorization": "Bearer key"})
    assert HookSettings.of([target, URL]).to == [target, URL]


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"to": []}, "at least one engine"),
        ({"mode": "later"}, "wait, background"),
        ({"on_error": "ignore"}, "raise, warn"),
        ({"every": 0}, "the least is 1"),
        ({"evry": 2}, "no such choice: evry; there are .*every"),
        ({"to": "rollout:8000"}, "ENGINE=URL"),
        ({"to": [URL, EngineTarget("torch=rollout:8000")]}, "http://"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused_by_name(choices: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        HookSettings.of(**{"to": URL} | choices)


def test_an_engine_that_is_not_installed_is_told_of_at_once() -> None:
    with pytest.raises(BackendUnavailableError, match="nosuch"):
        HookSettings.of("nosuch=http://rollout:8000")


def test_a_report_without_an_update_has_few_metrics() -> None:
    report = StepReport(step=None, update=None, held_s=0.5, failures={URL: "not ready"})
    assert report.as_metrics() == {"headrace/held_s": 0.5, "headrace/failed_engines": 1.0}
