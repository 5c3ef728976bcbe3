"""What changed since the last start that came up, as it stands in the log."""

from pathlib import Path

from common.settings import GatewaySettings
from ops.deploys import Deploys
from tests.support.event_schema import captured_logs

OLD = {"version": "1.0", "model_version": "m@1"}
NEW = OLD | {"model_version": "m@2"}
KEY = "a key that nobody may read"


def test_the_first_start_and_the_same_again_change_nothing(tmp_path: Path) -> None:
    with captured_logs() as lines:
        for _ in range(2):
            start(tmp_path, OLD)
    assert lines == []


def test_a_new_version_is_started_promoted_and_rolled_back(tmp_path: Path) -> None:
    """Each change names what it is, from what and to what."""
    start(tmp_path, OLD)
    with captured_logs() as lines:
        start(tmp_path, NEW)
        start(tmp_path, OLD)
        start(tmp_path, NEW)
    assert [(line["event"], line["from_version"], line["to_version"]) for line in lines] == [
        ("deploy.started", "m@1", "m@2"),
        ("deploy.promoted", "m@1", "m@2"),
        ("deploy.started", "m@2", "m@1"),
        ("deploy.rolled_back", "m@2", "m@1"),
        ("deploy.started", "m@1", "m@2"),
        ("deploy.rolled_back", "m@1", "m@2"),
    ]
    assert {line["what"] for line in lines} == {"model_version"}


def test_what_never_came_up_was_not_promoted(tmp_path: Path) -> None:
    """The next start is compared with the last one that served."""
    start(tmp_path, OLD)
    with captured_logs() as lines:
        Deploys(tmp_path, NEW, GatewaySettings()).tell_started()
        start(tmp_path, OLD)
    assert [line["event"] for line in lines] == ["deploy.started"]


def test_settings_that_differ_are_told_and_secrets_are_not(tmp_path: Path) -> None:
    """A secret that was changed is named, and neither log nor record holds it."""
    start(tmp_path, OLD, redis_url="redis://me:hidden@127.0.0.1/0")
    with captured_logs() as lines:
        start(tmp_path, OLD, redis_url="redis://me:other@127.0.0.1/1", api_key=KEY, max_best_of=3)
    [line] = lines
    assert line["event"] == "config.changed"
    assert line["diff"] == {
        "api_key": ["", "(masked)"],
        "max_best_of": [2, 3],
        "redis_url": ["redis://me:***@127.0.0.1/0", "redis://me:***@127.0.0.1/1"],
    }
    kept = (tmp_path / "run" / "last.json").read_text()
    assert not [secret for secret in (KEY, "hidden", "other") if secret in kept]


def start(data_dir: Path, versions: dict[str, str], **settings: object) -> None:
    deploys = Deploys(data_dir, versions, GatewaySettings.model_validate(settings))
    deploys.tell_started()
    deploys.tell_promoted()
