"""Transactional outbox for PostgreSQL and Kafka: write a row, relay it in order, apply it once."""

__version__ = "0.1.0"
