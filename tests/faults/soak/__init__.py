"""A soak: load, relays and consumers, a nemesis that strikes by a schedule, and the verdict on what was recorded."""
