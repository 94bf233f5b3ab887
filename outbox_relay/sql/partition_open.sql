-- Opens the next partition if it is time, and makes those that lie ahead.
SELECT {schema}.outbox_open_partition()
