"""The `headrace` command: its help, where its values come from, what it says when it refuses."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from pydantic import ValidationError

from common.models.simulated import SIMULATED_MODEL
from common.settings import BackgroundSettings, GatewaySettings, Settings, WorkerSettings
from ops import cli as command
from ops import processes as processes_module
from ops.options import build, options_of
from ops.probe import without_password
from ops.processes import Processes, UpSettings
from tests.support.processes import ROOT, free_port

SETTINGS = {
    "up": UpSettings,
    "gateway": GatewaySettings,
    "worker": WorkerSettings,
    "background": BackgroundSettings,
    "status": Settings,
}


def headrace(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run the command in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["headrace", *arguments])
    with pytest.raises(SystemExit) as ending:
        command.main()
    assert isinstance(ending.value.code, int)
    return ending.value.code


@pytest.fixture(autouse=True)
def without_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for settings in SETTINGS.values():
        for name in settings.model_fields:
            monkeypatch.delenv(f"HEADRACE_{name.upper()}", raising=False)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_option_is_explained_and_names_its_variable(name: str) -> None:
    """Help is made of the settings: no field without a sentence, none without its variable."""
    text = CliRunner().invoke(command.cli, [name, "--help"], terminal_width=1000).output
    for field, info in SETTINGS[name].model_fields.items():
        assert f"--{field.replace('_', '-')}" in text
        assert f"HEADRACE_{field.upper()}]" in text
        assert info.description, f"{field} has no docstring"


def test_every_command_says_what_it_does() -> None:
    def walk(group: click.Group) -> list[click.Command]:
        context = click.Context(group)
        commands = [group.get_command(context, name) for name in group.list_commands(context)]
        found = [command for command in commands if command is not None]
        assert len(found) == len(commands)
        inner = [walk(command) for command in found if isinstance(command, click.Group)]
        return [*found, *(command for commands in inner for command in commands)]

    assert all(found.help for found in walk(command.cli))


def test_an_option_beats_the_environment_which_beats_the_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert build(GatewaySettings, {"port": None}).port == 8080
    monkeypatch.setenv("HEADRACE_PORT", "8081")
    assert build(GatewaySettings, {"port": None}).port == 8081
    assert build(GatewaySettings, {"port": "8082"}).port == 8082


def test_a_flag_needs_no_value(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    @options_of(GatewaySettings)
    def show(**given: Any) -> None:
        click.echo(str(build(GatewaySettings, given).allow_anonymous))

    def said(*arguments: str) -> str:
        return CliRunner().invoke(show, arguments).output.strip()

    assert (said(), said("--allow-anonymous")) == ("False", "True")
    monkeypatch.setenv("HEADRACE_ALLOW_ANONYMOUS", "true")
    assert said() == "True"


def test_a_redis_on_another_host_needs_a_password_or_a_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert headrace(monkeypatch, "worker", "--redis-url", "redis://10.0.0.7") == 2
    assert "redis_url (HEADRACE_REDIS_URL)" in capsys.readouterr().err
    given = {"redis_url": "redis://10.0.0.7", "allow_open_redis": True}
    assert build(UpSettings, given).redis_url == "redis://10.0.0.7"


def test_an_option_may_be_given_several_times() -> None:
    """As one is for each origin of CORS."""
    settings = build(GatewaySettings, {"cors_allow_origin": ("https://a", "https://b")})
    assert settings.cors_allow_origin == ("https://a", "https://b")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["up", "--prot", "1"], "--prot"),
        (["upp"], "upp"),
        (["up", "--port", "abc"], "HEADRACE_PORT"),
        (["up", "--gateways", "0"], "HEADRACE_GATEWAYS"),
        (["background", "--storage-url", "ftp://host/x"], "HEADRACE_STORAGE_URL"),
        (["worker", "--engine", "magic"], "HEADRACE_ENGINE"),
        (["status", "--redis-url", "localhost"], "redis://"),
    ],
)
def test_a_wrong_word_is_one_line_and_a_failure(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    """The line names the option, and no traceback follows."""
    assert headrace(monkeypatch, *arguments) != 0
    error = capsys.readouterr().err
    assert error.startswith("headrace: ")
    assert error.count("\n") == 1
    assert said in error


def test_a_wrong_variable_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HEADRACE_MAX_BATCH_SIZE", "many")
    assert headrace(monkeypatch, "worker") == 2
    assert "HEADRACE_MAX_BATCH_SIZE" in capsys.readouterr().err


def test_a_data_directory_that_cannot_be_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    data_dir = str(tmp_path / "file" / "data")
    assert headrace(monkeypatch, "up", "--engine", "simulated", "--data-dir", data_dir) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert data_dir in error


def test_up_refuses_a_wrong_setting_of_its_processes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What a worker would refuse is refused before anything starts."""
    monkeypatch.setenv("HEADRACE_MAX_BATCH_SIZE", "many")
    processes = Processes(
        settings=UpSettings(),
        redis_url="redis://localhost",
        data_dir=tmp_path,
        log_dir=tmp_path,
        ports=[8080],
    )
    with pytest.raises(ValidationError, match="max_batch_size"):
        processes.specs()


def test_gateways_and_background_workers_keep_files_in_one_place(tmp_path: Path) -> None:
    processes = Processes(
        settings=UpSettings(storage_url="s3://bucket/files"),
        redis_url="redis://localhost",
        data_dir=tmp_path,
        log_dir=tmp_path,
        ports=[8080, 8081],
    )
    places = {
        spec.env["HEADRACE_STORAGE_URL"] for spec in processes.specs() if spec.role != "worker"
    }
    assert places == {"s3://bucket/files"}


@pytest.mark.parametrize("role", ["gateway", "worker", "background", "exporter"])
def test_a_redis_that_is_not_there_is_one_line(role: str, tmp_path: Path) -> None:
    """Each process says so on standard error and ends with a failure."""
    (tmp_path / "models").mkdir()
    arguments = ["--data-dir", str(tmp_path), "--model", SIMULATED_MODEL]
    arguments += ["--redis-url", f"redis://127.0.0.1:{free_port()}/0"]
    add = [sys.executable, "-m", "ops.cli", "model", "add", SIMULATED_MODEL]
    subprocess.run([*add, "--data-dir", str(tmp_path)], cwd=ROOT, check=True, capture_output=True)

    ended = subprocess.run(
        [sys.executable, "-m", "ops.cli", role, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert ended.returncode not in (0, -15)
    assert ended.stderr.count("\n") == 1
    assert "Redis cannot be reached" in ended.stderr


def test_a_missing_extra_is_one_line() -> None:
    """Whoever installed the gateway alone learns what a background worker needs."""
    code = (
        "import sys; sys.modules['arq'] = None; sys.argv = ['headrace', 'background'];"
        "from ops.cli import main; main()"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1
    assert ended.stderr == "headrace: this needs arq: pip install 'headrace[worker]'\n"


def test_the_simulated_engine_needs_no_download() -> None:
    """Unless a model is named, it serves the one that is built in."""
    assert UpSettings(engine="simulated").model == SIMULATED_MODEL
    assert UpSettings(engine="simulated", model="mine").model == "mine"
    assert UpSettings().model != SIMULATED_MODEL


def test_several_workers_share_the_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Torch would give every worker all of them."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def threads(workers: int) -> list[str | None]:
        processes = Processes(
            settings=UpSettings(workers=workers),
            redis_url="redis://localhost",
            data_dir=tmp_path,
            log_dir=tmp_path,
            ports=[8080],
        )
        specs = [spec for spec in processes.specs() if spec.role == "worker"]
        return [spec.env.get("OMP_NUM_THREADS") for spec in specs]

    assert threads(1) == [None]
    assert threads(500 // 10)[0] == "1"


def test_several_workers_take_different_gpus(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In the order of those that they may use at all; who shares one shares its memory."""

    def environments(workers: int, **settings: Any) -> list[Mapping[str, str]]:
        processes = Processes(
            settings=UpSettings(workers=workers, **settings),
            redis_url="unix:///s",
            data_dir=tmp_path,
            log_dir=tmp_path,
            ports=[8080],
        )
        specs = [spec for spec in processes.specs() if spec.role == "worker"]
        numbers = {spec.env["HEADRACE_TENSOR_PARALLEL"] for spec in specs}
        assert numbers == {str(settings.get("tensor_parallel", 1))}
        return [spec.env for spec in specs]

    def gpus(workers: int, **settings: Any) -> list[str | None]:
        return [env.get("CUDA_VISIBLE_DEVICES") for env in environments(workers, **settings)]

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(processes_module, "_GPUS", tmp_path / "gpus")
    assert gpus(2) == [None, None]
    assert gpus(1, tensor_parallel=2) == [None]
    assert gpus(2, tensor_parallel=2) == ["0,1", "2,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert gpus(2, tensor_parallel=2) == ["4,5", "6,7"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    for name in ("0000:00:04.0", "0000:00:05.0"):
        (tmp_path / "gpus" / name).mkdir(parents=True)
    assert gpus(1) == [None]
    assert gpus(3) == ["0", "1", "0"]
    shares = [env["HEADRACE_CUDA_MEMORY_SHARE"] for env in environments(3)]
    assert shares == ["0.4250", "0.8500", "0.4250"]
    monkeypatch.setenv("HEADRACE_DEVICE", "cpu")
    assert gpus(3) == [None] * 3


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://localhost:6379/0", "redis://localhost:6379/0"),
        ("redis://:secret@host/0", "redis://:***@host/0"),
        ("rediss://me:secret@host/0", "rediss://me:***@host/0"),
        ("unix:///run/redis.sock", "unix:///run/redis.sock"),
    ],
)
def test_a_password_is_never_shown(url: str, shown: str) -> None:
    assert without_password(url) == shown
