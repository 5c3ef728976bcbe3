"""What runbook, alerts and `headrace explain` tell people to run exists, options and all."""

import re
import shlex
from collections.abc import Iterator

import click
import pytest
import yaml
from click.testing import CliRunner

from common.explanations import EXPLANATIONS, INSIDE
from ops.cli import cli
from ops.explain import RUNBOOKS
from tests.support.processes import ROOT

PAGES = sorted(RUNBOOKS.glob("*.md"))
RULES = ROOT / "ops" / "prometheus" / "alerts.yml"


def command_lines(text: str) -> list[str]:
    """Those in backticks, and indented ones, that call `headrace`."""
    quoted = re.findall(r"`(headrace\s[^`]*)`", text)
    indented = re.findall(r"^ {4,}(headrace\s.*)$", text, re.MULTILINE)
    return [" ".join(line.split()) for line in (*quoted, *indented)]


def parse(line: str) -> click.Command:
    """The command of a line. Raises: click.ClickException for what does not exist."""
    command: click.Command = cli
    words = shlex.split(line)[1:]
    context = click.Context(cli)
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        found = command.get_command(context, words[0])
        if found is None:
            raise click.UsageError(f"no command {words[0]!r} in {line!r}")
        command, words = found, words[1:]
    options, rest, _ = command.make_parser(click.Context(command)).parse_args(words)
    assert not rest, f"too much in {line!r}: {rest}"
    for parameter in command.params:
        value = options.get(str(parameter.name))
        if isinstance(parameter.type, click.Choice) and isinstance(value, str):
            assert value in parameter.type.choices, f"{value!r} in {line!r}"
    return command


def every_option() -> set[str]:
    def walk(command: click.Command) -> Iterator[click.Command]:
        yield command
        if isinstance(command, click.Group):
            context = click.Context(command)
            for name in command.list_commands(context):
                yield from walk(command.get_command(context, name) or command)

    return {
        option for command in walk(cli) for parameter in command.params for option in parameter.opts
    }


def texts() -> dict[str, str]:
    """All that tells people to run something, by its name."""
    found = {page.name: page.read_text() for page in PAGES}
    entries = {**EXPLANATIONS, **{code: inside.explanation for code, inside in INSIDE.items()}}
    for code, entry in entries.items():
        checks = [f"    {check}" for check in entry.checks]
        found[code] = "\n".join([entry.cause, entry.fix, *checks])
    groups = yaml.safe_load(RULES.read_text())["groups"]
    says = [rule["annotations"] for group in groups for rule in group["rules"]]
    lines = [f"    {it[name]}" for it in says for name in ("incident", "explain")]
    return found | {RULES.name: "\n".join(lines)}


TEXTS = texts()


@pytest.mark.parametrize("source", TEXTS)
def test_what_people_are_told_to_run_can_be_run(source: str) -> None:
    text = TEXTS[source]
    for line in command_lines(text):
        command = parse(line)
        assert CliRunner().invoke(command, ["--help"]).exit_code == 0, line
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - {"--version"}
    assert named <= every_option()


def test_a_command_that_is_not_there_is_found() -> None:
    """Else the test above could not fail."""
    for line in ("headrace incidents", "headrace status --nothing", "headrace doctor too much"):
        with pytest.raises((click.ClickException, AssertionError)):
            parse(line)
