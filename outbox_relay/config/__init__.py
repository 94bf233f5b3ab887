"""The settings of the daemon: read from every source, checked as a whole; imported by the command line only."""

from outbox_relay.config.kafka import ProducerSetting, check_producer_config
from outbox_relay.config.settings import Settings
from outbox_relay.config.sources import Configuration, load

__all__ = ["Configuration", "ProducerSetting", "Settings", "check_producer_config", "load"]
