"""The daemon: horizon -> claim -> publish -> settle, sequenced by the loop."""
