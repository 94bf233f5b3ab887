-- Forgets waiting messages that are in Kafka now, or that somebody has deleted: the marks have passed them already.
DELETE FROM {schema}.outbox_pending
USING unnest(%(shards)s::smallint[], %(numbers)s::bigint[]) AS done (shard, sequence_no)
WHERE outbox_pending.shard = done.shard AND outbox_pending.sequence_no = done.sequence_no
