"""Our Grafana dashboards have what Grafana needs to import them, and a reader to read them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import ROOT

FILES = sorted((ROOT / "ops" / "grafana").glob("*.json"))
UNITS = {"bytes", "percent", "percentunit", "reqps", "s", "short"}
Board = dict[str, Any]


def panels(board: Board) -> list[Board]:
    return [panel for panel in board["panels"] if panel["type"] != "row"]


@pytest.fixture(params=FILES, ids=lambda path: path.name)
def board(request: pytest.FixtureRequest) -> Board:
    path: Path = request.param
    return json.loads(path.read_text())


def test_there_are_four_under_names_of_their_own() -> None:
    boards = [json.loads(path.read_text()) for path in FILES]
    assert [path.stem for path in FILES] == ["overview", "queue", "slo", "workers"]
    assert len({board["uid"] for board in boards}) == len({board["title"] for board in boards}) == 4


def test_it_takes_any_data_source_and_any_model(board: Board) -> None:
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    # Grafana 12 draws before it has chosen: what is left open then is a source that does not exist.
    assert variables["datasource"]["current"] == {"text": "default", "value": "default"}
    used = {
        name
        for panel in panels(board)
        for target in panel["targets"]
        for name in re.findall(r"\$(?!__)\{?(\w+)", target["expr"])
    }
    assert used <= variables.keys()
    for panel in panels(board):
        for source in (panel["datasource"], *(target["datasource"] for target in panel["targets"])):
            assert source == {"type": "prometheus", "uid": "${datasource}"}


def test_every_panel_says_what_it_shows_and_in_which_unit(board: Board) -> None:
    for panel in panels(board):
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
        assert panel["targets"]
        assert all(target["expr"] and target["legendFormat"] for target in panel["targets"])
        letters = [target["refId"] for target in panel["targets"]]
        assert len(set(letters)) == len(letters)


def test_panels_have_ids_of_their_own_and_do_not_overlap(board: Board) -> None:
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])
        }
        assert not cells & taken
        taken |= cells
