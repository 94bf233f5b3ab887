-- Drops one partition in which all is old enough and returns the number of its messages; or the shards whose marks
-- disagree with the rows there, and up to where. Only below :reconciled_no is a missing row no disagreement.
SELECT dropped.messages, dropped.shard, dropped.through
FROM {schema}.outbox_drop_partition(make_interval(secs => %(older_than_seconds)s), %(reconciled_no)s) AS dropped
