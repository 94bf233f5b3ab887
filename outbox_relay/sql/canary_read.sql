-- What has become of a canary, and how long after its insert the mark was written that passed it; no row when it was
-- deleted.
SELECT state, extract(epoch FROM published_at - created_at)::float8 AS seconds
FROM {schema}.outbox_message
WHERE shard = (hashtextextended(%(aggregate_type)s || ':' || %(aggregate_id)s, 0) & 15)::smallint
    AND sequence_no = %(sequence_no)s
