"""Where settings come from, which source wins, and what a person is told when one is wrong."""

from __future__ import annotations

import os
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from pydantic import ValidationError
from pydantic_settings import EnvSettingsSource, SettingsError

from outbox_relay.config.explain import explain
from outbox_relay.config.kafka import is_property, property_name
from outbox_relay.config.names import PREFIX
from outbox_relay.config.settings import Settings
from outbox_relay.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_CONFIG = f"{PREFIX}CONFIG"
_SECRETS_DIR = f"{PREFIX}SECRETS_DIR"
_KAFKA = "kafka__"

# Kubernetes puts the addresses of every Service into the environment; those of one called outbox-relay look like ours.
_SERVICE_LINK = re.compile(r"(\w+_)?(service_(host|port\w*)|port(_\d+_(tcp|udp|sctp)\w*)?)")
"""


"""


@dataclass(frozen=True, slots=True)
class Configuration:
    """The settings, and where each came from: `lanes` or `kafka.linger.ms` to the source's name; defaults are absent."""

    settings: Settings
    origins: Mapping[str, str]
