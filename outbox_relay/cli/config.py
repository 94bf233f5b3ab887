"""`outbox-relay config`: what the settings are, where each is from, and what they may be."""

from __future__ import annotations

import json

import click

from outbox_relay.cli.options import settings_options
from outbox_relay.config import Configuration, Settings, check_producer_config
from outbox_relay.config.kafka import holds_secret
from outbox_relay.config.names import REDACTED, env_name


@click.group()
def config() -> None:
    """Show the settings, or the rules for them."""


@config.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@settings_options()
def show(configuration: Configuration, *, as_json: bool) -> None:
    """Print the merged settings with the source of each, secrets redacted, then check those of Kafka."""
    values = _shown(configuration.settings)
    sources = {name: configuration.origins.get(name, "default") for name in values}
    if as_json:
        rows = {env_name(name): {"value": value, "source": sources[name]} for name, value in values.items()}
        click.echo(json.dumps(rows, indent=2))
    else:
        width = max(len(env_name(name)) for name in values)
        for name, value in values.items():
            text = value if isinstance(value, str) else json.dumps(value)
            click.echo(f"{env_name(name):<{width}}  {text}  ({sources[name]})")
    check_producer_config(configuration.settings.producer_config())


@config.command()
def schema() -> None:
    """Print the JSON Schema of the TOML file."""
    dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    click.echo(json.dumps(dialect | Settings.model_json_schema(), indent=2))


def _shown(settings: Settings) -> dict[str, object]:
    values = settings.model_dump(mode="json", by_alias=True, exclude={"kafka"})
    values["database_url"] = REDACTED if settings.database_url.get_secret_value() else ""
    values["allowed_topics"] = sorted(settings.allowed_topics)
    properties = sorted(settings.producer_config().items())
    return values | {f"kafka.{name}": REDACTED if holds_secret(name) else value for name, value in properties}
