-- The first id of the oldest partition that is still kept as a whole. What is older below it stands in a partition that
-- cannot be dropped yet, and is removed by rows.
SELECT min(first_id)
FROM {schema}.outbox_partition
WHERE closed_at IS NULL OR closed_at >= now() - make_interval(secs => %(older_than_seconds)s)
