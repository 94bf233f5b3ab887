"""What others can see of the relay: logs, metrics and probes."""
