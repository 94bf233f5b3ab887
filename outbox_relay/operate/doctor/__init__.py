"""Examine a set-up: pure checks over what a few questions to PostgreSQL and Kafka returned."""
