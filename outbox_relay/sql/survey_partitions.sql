-- For how long the partitions last that exist, in seconds: what is left of the open one's time, and the time of those
-- that are made ahead. Below 0 it is overdue to open the next one.
SELECT extract(epoch FROM max(opened_at) + sum(open_for) - clock_timestamp())::float8
FROM {schema}.outbox_partition
WHERE closed_at IS NULL
