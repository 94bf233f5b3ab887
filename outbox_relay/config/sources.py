"""Where settings come from, and which source wins."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import ValidationError
from pydantic_settings import EnvSettingsSource, SettingsError

from outbox_relay.config.explain import explain
from outbox_relay.config.kafka import is_property, property_name
from outbox_relay.config.names import PREFIX, env_name
from outbox_relay.config.settings import Settings
from outbox_relay.errors import ConfigurationError

Origin = Literal["flag", "environment", "secret file", "TOML file", "default"]

_CONFIG = f"{PREFIX}CONFIG"
_SECRETS_DIR = f"{PREFIX}SECRETS_DIR"
_FILE = "_FILE"

# Kubernetes describes every Service in the environment; the variables of one called outbox-relay look like settings.
_SERVICE_LINK = re.compile(rf"{PREFIX}(\w+_)?(SERVICE_(HOST|PORT\w*)|PORT(_\d+_(TCP|UDP|SCTP)\w*)?)")


@dataclass(frozen=True, slots=True)
class Configuration:
    """
    The settings, and by name (`lanes`, `kafka.linger.ms`) the source of each that was given.

    Attributes:
        load_again: Reads the same sources once more, for a file may hold another secret by now; raises as `load` does.
    """

    settings: Settings
    origins: Mapping[str, Origin]
    load_again: Callable[[], Configuration]


def load(flags: Mapping[str, object] | None = None, *, config_file: Path | None = None) -> Configuration:
    """
    Merge the settings of all sources: *flags*, the environment, secret files, a TOML file, the defaults.

    Raises:
        ConfigurationError: Something is unknown, wrong or unreadable; the message has a line for each problem.
    """
    environment = {name: value for name, value in os.environ.items() if name.startswith(PREFIX) and value}
    path = config_file or (Path(environment[_CONFIG]) if _CONFIG in environment else None)
    files = {name: value for name, value in environment.items() if _names_a_file(name)}
    variables = environment.keys() - files.keys() - {_CONFIG, _SECRETS_DIR}
    layers: list[tuple[Origin, Mapping[str, object]]] = [
        ("TOML file", _read_toml(path) if path else {}),
        ("secret file", _parse(_read_directory(environment.get(_SECRETS_DIR)))),
        (
            "secret file",
            _parse({name.removesuffix(_FILE): _read(Path(file), source=name) for name, file in files.items()}),
        ),
        ("environment", _parse({name: environment[name] for name in variables})),
        ("flag", flags or {}),
    ]
    settings, origins = _merge(layers)
    return Configuration(settings, origins, load_again=partial(load, flags, config_file=config_file))


def _merge(layers: list[tuple[Origin, Mapping[str, object]]]) -> tuple[Settings, Mapping[str, Origin]]:
    merged: dict[str, object] = {}
    properties: dict[str, object] = {}
    origins: dict[str, Origin] = {}
    for origin, layer in layers:
        values = dict(layer)
        given = _flatten(_table(values.pop("kafka", {})))
        merged |= values
        properties |= given
        origins |= dict.fromkeys([*values, *(f"kafka.{name}" for name in given)], origin)
    try:
        return Settings.model_validate(merged | {"kafka": properties}), origins
    except ValidationError as error:
        raise ConfigurationError(explain(error)) from None  # the cause quotes what was given, secrets too


def _table(kafka: object) -> Mapping[str, object]:
    if not isinstance(kafka, Mapping):
        raise ConfigurationError(f"{env_name('kafka')}: not a table of librdkafka properties")
    return kafka


def _flatten(table: Mapping[str, object], *, parent: str = "") -> dict[str, object]:
    # TOML reads an unquoted linger.ms as a table within a table.
    flat: dict[str, object] = {}
    for key, value in table.items():
        name = f"{parent}{key}"
        flat |= _flatten(value, parent=f"{name}.") if isinstance(value, Mapping) else {property_name(name): value}
    return flat


def _names_a_file(variable: str) -> bool:
    # Some of librdkafka's own properties end in .file.
    _, _, librdkafka_name = variable.lower().partition("__")
    return variable.endswith(_FILE) and not is_property(librdkafka_name)


def _parse(variables: Mapping[str, str]) -> dict[str, object]:
    """Return *variables* by setting; unknown ones are among them, for the model to refuse."""
    source = EnvSettingsSource(Settings)
    source.env_vars = {name.lower(): value for name, value in variables.items()}
    try:
        values: dict[str, object] = source()
    except SettingsError:
        raise ConfigurationError(
            f"{env_name('kafka')}: not JSON: set single properties instead, "
            f"e.g. {env_name('kafka.compression.type')}=zstd"
        ) from None
    return values | {name.removeprefix(PREFIX).lower(): value for name, value in variables.items() if _is_unknown(name)}


def _is_unknown(variable: str) -> bool:
    name = variable.removeprefix(PREFIX).lower()
    return not (name in Settings.fields() or name.startswith("kafka__") or _SERVICE_LINK.fullmatch(variable))


def _read_toml(path: Path) -> dict[str, object]:
    try:
        return tomllib.loads(_read(path, source="--config"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{path} is no TOML: {error}") from None


def _read_directory(directory: str | None) -> dict[str, str]:
    if directory is None:
        return {}
    try:
        files = [file for file in Path(directory).iterdir() if file.name.upper().startswith(PREFIX)]
    except OSError as error:
        raise ConfigurationError(f"{_SECRETS_DIR}: {directory} cannot be read: {error.strerror}") from error
    return {file.name.upper(): _read(file, source=_SECRETS_DIR) for file in files}


def _read(path: Path, *, source: str) -> str:
    try:
        return path.read_text(encoding="utf-8").rstrip("\r\n")
    except OSError as error:
        raise ConfigurationError(f"{source}: {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        raise ConfigurationError(f"{source}: {path} is not UTF-8 text") from None
