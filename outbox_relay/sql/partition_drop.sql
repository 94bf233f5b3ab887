-- Drops one partition in which all is old enough, and gives the number of its messages, or null if there is none.
SELECT {schema}.outbox_drop_partition(make_interval(secs => %(older_than_seconds)s))
