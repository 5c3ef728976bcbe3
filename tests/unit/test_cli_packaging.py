"""What is shipped: the gateway without torch, the containers, the pins."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.settings import (
    BackgroundSettings,
    ExporterSettings,
    GatewaySettings,
    WorkerSettings,
)
from ops.cli import cli
from tests.support.processes import ROOT

Tree = dict[str, Any]
MONITORING = {"prometheus", "grafana"}
"""Services of others, which need nothing of ours to start."""


@pytest.fixture
def compose() -> Tree:
    return yaml.safe_load((ROOT / "compose.yaml").read_text())


@pytest.fixture
def project() -> Tree:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def names(requirements: list[str]) -> set[str]:
    """Names of packages, normalised as the index does."""
    found = (re.split(r"[\[<>=!~; ]", requirement)[0] for requirement in requirements)
    return {re.sub(r"[-_.]+", "-", name).lower() for name in found}


@pytest.mark.parametrize("module", ["gateway.__main__", "ops.cli", "ops.up", "ops.status"])
def test_no_torch_where_nothing_computes(module: str) -> None:
    """A gateway, and the supervisor over it, start fast and small."""
    code = f"import {module}, sys; sys.exit(', '.join({{'torch', 'arq'}} & set(sys.modules)) or 0)"
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr


def test_the_base_installation_has_no_torch(project: Tree) -> None:
    assert not names(project["dependencies"]) & {"torch", "transformers", "arq", "safetensors"}


def test_everything_is_pinned(project: Tree) -> None:
    """Each requirement has its pin, torch among them, without a local version or an index."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    extras = [name for extra in project["optional-dependencies"].values() for name in extra]
    assert names(project["dependencies"] + extras) <= names(list(pins))
    assert pins["torch"] == "2.13.0"
    assert not [version for version in pins.values() if "+" in version]


def test_compose_has_the_parts_of_the_system(compose: Tree) -> None:
    """One Valkey, two gateways, one of all else in either profile; monitoring for who wants it."""
    for profile, worker in (("cpu", "worker-cpu"), ("gpu", "worker-gpu")):
        running = {
            name for name, service in compose["services"].items() if profile in service["profiles"]
        }
        assert running == {
            "valkey", "model", "gateway-1", "gateway-2", worker, "background", "exporter"
        }  # fmt: skip
    assert compose["services"].keys() >= MONITORING


def test_compose_opens_nothing_to_the_network(compose: Tree) -> None:
    published = [
        port for service in compose["services"].values() for port in service.get("ports", [])
    ]
    assert len(published) == 4
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_everything_that_stays_up_in_compose_has_a_health_check(compose: Tree) -> None:
    """And what waits for another service waits for its health."""
    for name, service in compose["services"].items():
        assert ("healthcheck" in service) == (name != "model")
        if name not in ("valkey", "model", *MONITORING):
            assert service["depends_on"] == {
                "valkey": {"condition": "service_healthy"},
                "model": {"condition": "service_completed_successfully"},
            }


def test_compose_runs_commands_that_exist(compose: Tree) -> None:
    """Commands and health checks name subcommands and settings of this version."""
    known = (GatewaySettings, WorkerSettings, BackgroundSettings, ExporterSettings)
    variables = {f"HEADRACE_{name.upper()}" for settings in known for name in settings.model_fields}
    for name, service in compose["services"].items():
        if name in ("valkey", *MONITORING):
            continue
        assert service.get("command", ["gateway"])[0] in cli.commands
        assert service["environment"].keys() <= variables
        check = service.get("healthcheck", {"test": ["CMD", "headrace", "probe"]})["test"]
        assert check[1] == "headrace"
        assert check[2] in cli.commands
        assert (ROOT / service["build"]["dockerfile"]).is_file()


def test_prometheus_in_compose_asks_whoever_has_figures(compose: Tree) -> None:
    """Each target is a service there, under its name or its alias, at the port that it has."""
    ports: dict[str, str] = {}
    for name, service in compose["services"].items():
        if name not in ("valkey", "model", *MONITORING):
            environment = service["environment"]
            default = environment.get("HEADRACE_PORT", "")
            aliases = service.get("networks", {}).get("default", {}).get("aliases", [name])
            ports |= dict.fromkeys(aliases, environment.get("HEADRACE_METRICS_PORT", default))
    groups = json.loads((ROOT / "ops" / "prometheus" / "compose-targets.json").read_text())
    assert {target for group in groups for target in group["targets"]} == {
        f"{name}:{port}" for name, port in ports.items()
    }
    assert {group["labels"]["service"] for group in groups} == {
        "gateway", "worker", "background", "exporter"
    }  # fmt: skip


def test_what_compose_mounts_is_there_and_its_images_are_pinned(compose: Tree) -> None:
    for name in MONITORING:
        service = compose["services"][name]
        assert re.search(r":v?\d+\.\d+\.\d+$", service["image"])
        mounted = [volume.split(":")[0] for volume in service["volumes"]]
        assert all((ROOT / path).exists() for path in mounted if path.startswith("."))


@pytest.mark.parametrize("image", ["gateway", "worker"])
def test_images_are_pinned_and_run_as_nobody_special(image: str) -> None:
    text = (ROOT / "ops" / "images" / f"{image}.Dockerfile").read_text()
    assert "-c constraints.txt" in text
    assert re.search(r"^USER headrace$", text, re.MULTILINE)
    copied = re.findall(r"^COPY (?!--from)(\S+)", text, re.MULTILINE)
    assert all((ROOT / path).exists() for path in copied)


def test_the_wheel_has_what_is_not_python(project: Tree) -> None:
    """The functions for Redis and the page travel as package data."""
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    for package, patterns in tool["package-data"].items():
        folder = ROOT / package.replace(".", "/")
        assert all(list(folder.glob(pattern)) for pattern in patterns)
    assert project["scripts"] == {"headrace": "ops.cli:main"}


def test_nothing_needed_is_git_ignored() -> None:
    """A file that only this working tree has would be missing in every clone."""
    for folder in ("common", "gateway", "workers", "ops"):
        listed = subprocess.run(
            ["git", "ls-files", "--others", "--ignored", "--exclude-standard", folder],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        # Byte code, and the kernels: every installation builds its own.
        assert not [path for path in listed if Path(path).suffix not in (".pyc", ".so", "")]


def test_the_race_table_names_tests_that_exist() -> None:
    """Each row of ARCHITECTURE.md points to the test that holds its promise."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    table = text[text.index("| race |") : text.index("Not in this version")]
    rows = table.strip().splitlines()[2:]
    assert len(rows) >= 25
    for row in rows:
        named = re.findall(r"`(\w+/test_\w+\.py)::(test_\w+)`", row)
        assert named, row
        for path, name in named:
            source = (ROOT / "tests" / path).read_text()
            assert re.search(rf"def {name}\(", source), f"{path}::{name}"


def test_links_in_documents_lead_somewhere() -> None:
    """Files that README, ARCHITECTURE and the others name are there."""
    for document in ROOT.glob("*.md"):
        paths = re.findall(
            r"`((?:common|gateway|workers|ops|tests)/[\w/.]*\w)/?`", document.read_text()
        )
        for path in paths:
            assert (ROOT / path).exists() or (ROOT / f"{path}.py").exists(), f"{document}: {path}"
