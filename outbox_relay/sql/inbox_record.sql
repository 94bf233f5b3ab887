-- Records messages as consumed and gives the ids of those that were not recorded before.
--
-- A twin that has recorded one of them and is still open is waited for: if it commits, the message is not new; if it
-- rolls back, it is. The order is that of the locks, so that overlapping batches never wait for each other in a circle.
--
-- No conflict target is named: the primary key has one column more when the table is partitioned by time.
INSERT INTO {schema}.inbox_message (consumer, message_id, created_at)
SELECT %(consumer)s, message.id, message.created_at
FROM unnest(%(message_ids)s::uuid[], %(created_ats)s::timestamptz[]) AS message (id, created_at)
ORDER BY message.id
ON CONFLICT DO NOTHING
RETURNING message_id
