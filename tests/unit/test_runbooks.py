"""The runbook has a page for each alert and one for everybody; its links lead somewhere."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.explanations import EXPLANATIONS, INSIDE
from ops.explain import RUNBOOKS, alert_pages
from tests.support.processes import ROOT

PAGES = sorted(RUNBOOKS.glob("*.md"))
RULES = ROOT / "ops" / "prometheus" / "alerts.yml"
SECTIONS = ["What it means", "Look first", "Do this", "Call somebody when"]


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_links_of_a_page_lead_to_pages(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert (page.parent / target).is_file(), target


def test_each_alert_has_its_page_and_each_page_its_alert() -> None:
    assert {rule["alert"] for rule in alerts()} == set(alert_pages())
    for alert, page in alert_pages().items():
        text = page.read_text()
        assert text.startswith(f"# {alert}: ")
        headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
        assert headings[: len(SECTIONS)] == SECTIONS
        look = text.partition("## Look first")[2].partition("## Do this")[0]
        assert re.search("^    headrace ", look, re.MULTILINE)


def test_the_page_for_everybody_lists_every_alert() -> None:
    rule = (RUNBOOKS / "operating-rule.md").read_text()
    listed = dict(re.findall(r"^\| (Headrace\w+) .*\]\((.*)\) \|$", rule, re.MULTILINE))
    assert listed == {alert: page.name for alert, page in alert_pages().items()}


def test_an_alert_says_what_is_wrong_where_to_read_and_what_to_run() -> None:
    for rule in alerts():
        says = rule["annotations"]
        page, _, anchor = says["runbook_url"].partition("#")
        assert (ROOT / page) == alert_pages()[rule["alert"]]
        assert f"## {anchor.replace('-', ' ')}" in (ROOT / page).read_text().lower()
        assert says["incident"].startswith("headrace incident ")
        assert says["explain"] == f"headrace explain {rule['alert']}"
        assert says["summary"]
        assert says["description"]
        assert rule["labels"]["severity"] in ("page", "ticket")


def test_explanations_name_pages_that_exist() -> None:
    entries = [*EXPLANATIONS.values(), *(inside.explanation for inside in INSIDE.values())]
    for entry in entries:
        assert not entry.runbook or (RUNBOOKS / f"{entry.runbook}.md").is_file(), entry.runbook
