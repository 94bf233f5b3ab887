"""What operators do beside the running relay: migrate, look, repair, prune."""
