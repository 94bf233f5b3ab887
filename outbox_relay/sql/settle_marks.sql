-- Records how far each shard is settled, and commits, in one message.
INSERT INTO {schema}.outbox_published (shard, through, messages, checksum)
SELECT *
FROM unnest(
    %(shards)s::smallint[], %(throughs)s::bigint[], %(messages)s::bigint[], %(checksums)s::bigint[]
);
COMMIT
