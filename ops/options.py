"""Command-line options made from settings classes: one field is one option and one variable.

The field's docstring is the help text and pydantic checks the value, so an option, its environment
variable and the process that it configures can not disagree.
"""

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import click
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings

Command = Callable[..., Any]
S = TypeVar("S", bound=BaseSettings)

_METAVARS: dict[object, str] = {int: "N", float: "NUMBER", str: "TEXT", Path: "PATH", bool: "BOOL"}


def options_of(settings: type[BaseSettings]) -> Callable[[Command], Command]:
    """Give a command one option for each field of ``settings``, in the order of the fields."""

    def decorate(command: Command) -> Command:
        for name, field in reversed(settings.model_fields.items()):
            command = _option(name, field)(command)
        return command

    return decorate


def build(settings: type[S], given: dict[str, Any]) -> S:
    """Settings from the options that were given, else the environment, else the defaults.

    Raises: pydantic.ValidationError, pydantic_settings.SettingsError for a value that is not valid.
    """
    return settings(
        **{
            name: given[name]
            for name in settings.model_fields
            if given.get(name) not in (None, ())  # what click passes for an option not given
        }
    )


def _option(name: str, field: FieldInfo) -> Callable[[Command], Command]:
    if field.annotation is bool:
        return click.option(
            f"--{name.replace('_', '-')}",
            name,
            is_flag=True,
            default=None,  # not given: the environment decides
            help=f"{_description(field)}[HEADRACE_{name.upper()}]",
        )
    return click.option(
        f"--{name.replace('_', '-')}",
        name,
        type=str,  # pydantic converts and checks
        multiple=_repeats(field),
        metavar=_metavar(field.annotation),
        help=f"{_description(field)}[{_default(field)}HEADRACE_{name.upper()}]",
    )


def _description(field: FieldInfo) -> str:
    text = " ".join((field.description or "").replace("``", "").split())
    return f"{text} " if text else ""


def _default(field: FieldInfo) -> str:
    shown = "" if field.default in (None, (), "") else str(field.default)
    return f"{shown}; " if shown else ""


def _repeats(field: FieldInfo) -> bool:
    return get_origin(field.annotation) is tuple


def _metavar(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Literal:
        return "|".join(str(choice) for choice in get_args(annotation))
    if origin in (Union, types.UnionType):
        return _metavar(next(arm for arm in get_args(annotation) if arm is not type(None)))
    if origin is tuple:
        return _metavar(get_args(annotation)[0])
    return _METAVARS.get(annotation, "TEXT")
