"""What the command leaves on disk and reads from it: the lock, the state, the logs of others."""

import json
from contextlib import closing
from pathlib import Path

import click
import pytest

from common.settings import WorkerSettings
from ops import runfile
from ops.bench.latency import Answer, summarise
from ops.embedded import remove_socket, server_spec, socket_path
from ops.tail import LogTail


def state(*names: str) -> runfile.RunState:
    processes = [runfile.ProcessState(role="worker", name=name, state="ready") for name in names]
    return runfile.RunState(pid=1, started="", redis_url="redis://", model="m", processes=processes)


def test_a_data_directory_has_one_holder(tmp_path: Path) -> None:
    """The second is told who has it; when the first lets go, the next may."""
    with (
        runfile.lock(tmp_path),
        pytest.raises(click.ClickException, match="in use by another"),
        runfile.lock(tmp_path),
    ):
        pass
    with runfile.lock(tmp_path):
        pass


def test_the_state_of_a_dead_supervisor_is_history(tmp_path: Path) -> None:
    """Without the lock nobody runs what the file says."""
    with runfile.lock(tmp_path):
        runfile.write_state(tmp_path, state("worker 1"))
        assert runfile.read_state(tmp_path) == state("worker 1")
    assert runfile.read_state(tmp_path) is None


def test_a_command_joins_what_runs_unless_it_names_another(tmp_path: Path) -> None:
    """Its Redis and its model: a worker that is started by hand works beside those of `up`."""
    with runfile.lock(tmp_path):
        runfile.write_state(tmp_path, state("worker 1"))
        joined = runfile.joined(WorkerSettings(data_dir=tmp_path))
        assert (joined.redis_url, joined.model) == ("redis://", "m")
        named = WorkerSettings(data_dir=tmp_path, redis_url="redis://127.0.0.1:1", model="n")
        assert runfile.joined(named) == named
    alone = WorkerSettings(data_dir=tmp_path)
    assert runfile.joined(alone) == alone


def test_no_state_where_nothing_ever_ran(tmp_path: Path) -> None:
    assert runfile.read_state(tmp_path / "nowhere") is None


def test_what_only_this_user_may_see_is_private(tmp_path: Path) -> None:
    """The socket and the state file, which may hold a password, lie in a closed directory."""
    assert runfile.run_dir(tmp_path).stat().st_mode & 0o077 == 0
    assert socket_path(tmp_path).parent.stat().st_mode & 0o077 == 0


def test_a_long_data_directory_still_has_a_socket(tmp_path: Path) -> None:
    """The kernel's limit for the path of a socket is about a hundred bytes."""
    deep = tmp_path / ("d" * 120)
    deep.mkdir()
    path = socket_path(deep)
    assert len(bytes(path)) < 100
    assert path.parent.stat().st_mode & 0o077 == 0
    remove_socket(path, deep)
    assert not path.parent.exists()


def test_the_embedded_server_forgets_nothing_and_is_not_on_the_network(tmp_path: Path) -> None:
    argv = " ".join(server_spec(Path("valkey-server"), tmp_path, tmp_path / "s").argv)
    assert "--port 0 " in argv
    assert "--appendonly yes --appendfsync everysec" in argv
    assert "--maxmemory-policy noeviction" in argv


def test_a_tail_reads_whole_lines_from_now_on(tmp_path: Path) -> None:
    """What was there before is not repeated, half a line waits for its rest."""
    path = tmp_path / "worker.jsonl"
    path.write_text('{"event": "old"}\n')
    with closing(LogTail(tmp_path, ["worker", "gateway"])) as tail, path.open("a") as file:
        assert tail.read() == []
        file.write('{"event": "a"}\n{"ev')
        file.flush()
        assert [line["event"] for line in tail.read()] == ["a"]
        file.write('ent": "b"}\nno json\n')
        file.flush()
        assert [line["event"] for line in tail.read()] == ["b"]
        (tmp_path / "gateway.jsonl").write_text(json.dumps({"event": "c"}) + "\n")
        assert [line["event"] for line in tail.read()] == ["c"]


def test_a_tail_survives_a_log_that_was_emptied(tmp_path: Path) -> None:
    path = tmp_path / "worker.jsonl"
    path.write_text('{"event": "a long old line"}\n')
    with closing(LogTail(tmp_path, ["worker"])) as tail:
        path.write_text('{"event": "new"}\n')
        assert [line["event"] for line in tail.read()] == ["new"]


def test_percentiles_are_of_the_answers_that_came() -> None:
    """Failures are counted, not averaged away."""
    answers = [Answer(first_byte_s=n / 1000, whole_s=n / 100) for n in range(1, 101)]
    figures = summarise(20.0, [*answers, None])
    assert (figures.requests, figures.failed) == (101, 1)
    assert figures.first_byte_p50_ms == 50
    assert figures.first_byte_p99_ms == 99
    assert figures.first_byte_max_ms == 100
