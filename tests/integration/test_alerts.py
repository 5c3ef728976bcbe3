"""The rules for Prometheus by its own tool: valid, and each fires when it should and else not."""

import re
import subprocess
from pathlib import Path

import yaml

from common.failures import KINDS, Actor
from tests.support.processes import ROOT

FOLDER = ROOT / "ops" / "prometheus"
SCENARIOS = Path(__file__).parent / "prometheus" / "alerts_test.yml"


def promtool(*arguments: str) -> str:
    ended = subprocess.run(
        ["promtool", *arguments], cwd=ROOT, capture_output=True, text=True, check=False, timeout=100
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


def test_rules_and_configuration_are_valid() -> None:
    said = promtool("check", "config", str(FOLDER / "prometheus.yml"))
    assert "2 rule files found" in said
    promtool("check", "rules", str(FOLDER / "recording.yml"), str(FOLDER / "alerts.yml"))


def test_each_alert_fires_for_its_reason_and_for_no_other() -> None:
    promtool("test", "rules", str(SCENARIOS))


def test_each_alert_has_a_scenario_in_which_it_fires() -> None:
    groups = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"]
    alerts = {
        (rule["alert"], rule["labels"].get("window")) for group in groups for rule in group["rules"]
    }
    labels = re.findall(r'alertname="(\w+)"(?:, window="(\w+)")?', SCENARIOS.read_text())
    assert {(alert, window or None) for alert, window in labels} == alerts


def test_what_counts_as_failed_is_what_no_caller_has_brought_about() -> None:
    """The rules name codes; a new code of the table must be told to them."""
    ours = {kind.code for kind in KINDS.values() if kind.actor not in (Actor.CALLER, Actor.TENANT)}
    rules = (FOLDER / "recording.yml").read_text()
    named = [set(codes.split("|")) for codes in re.findall(r'code=~"([^"]*)"', rules)]
    assert len(named) == 5
    assert all(codes == ours for codes in named)
