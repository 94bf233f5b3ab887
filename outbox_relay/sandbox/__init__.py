"""Real parts, started on this machine: PostgreSQL and Kafka for the demo, the benchmarks and the tests."""
