"""The settings as options of a command, made from the model, so that each is described once."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args, get_origin

import click
from pydantic import ByteSize, SecretStr

from outbox_relay.config import Settings, load

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

_Command = Callable[..., None]

_CONFIG_OPTION = click.option(
    "--config", "config_file", type=click.Path(path_type=Path), metavar="FILE", help="TOML file of settings."
)
_METAVARS: dict[object, str] = {int: "N", float: "SECONDS", ByteSize: "BYTES", str: "TEXT"}


def settings_options(*names: str) -> Callable[[_Command], _Command]:
    """
    Return a decorator that gives a command the merged `Configuration` as its first argument.

    The command gets `--config` and an option for each setting in *names*, or for all that fit on a command line. A
    secret does not, because every user of the machine can read it there, nor does a table.
    """
    fields = {name: field for name, field in Settings.fields().items() if name in names or (not names and _fits(field))}

    def decorate(command: _Command) -> _Command:
        @wraps(command)
        def configured(*, config_file: Path | None, **given: object) -> None:
            flags = {name: value for name in fields if (value := given.pop(name)) is not None}
            command(load(flags, config_file=config_file), **given)

        decorated: _Command = configured
        for name, field in reversed(fields.items()):
            decorated = _option(name, field)(decorated)
        return _CONFIG_OPTION(decorated)

    return decorate


def confirm(question: str, *, otherwise: str) -> None:
    """
    Ask before something is destroyed, and go on only after a yes.

    Raises:
        click.UsageError: Nobody can be asked; it says *otherwise*.
        click.Abort: The answer is no.
    """
    if not sys.stdin.isatty():
        raise click.UsageError(otherwise)
    click.confirm(question, abort=True, err=True)


def _fits(field: FieldInfo) -> bool:
    return field.annotation is not SecretStr and get_origin(field.annotation) in {None, Literal}


def _option(name: str, field: FieldInfo) -> Callable[[_Command], _Command]:
    flag = f"--{name.replace('_', '-')}"
    summary = f"{str(field.description).split('. ')[0].rstrip('.')}."
    if field.annotation is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", name, default=None, help=summary)
    if get_origin(field.annotation) is Literal:
        return click.option(flag, name, type=click.Choice(get_args(field.annotation)), help=summary)
    return click.option(flag, name, metavar=_METAVARS[field.annotation], help=summary)
