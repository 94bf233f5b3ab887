-- Records a replay before its first message goes out, and commits, in one message: to the horizon this transaction
-- looks like a writer. No row comes back if the name is taken.
INSERT INTO {schema}.outbox_replay (name, operator, why, selection, published_through)
VALUES (%(name)s, %(operator)s, %(why)s, %(selection)s::jsonb, %(published_through)s::bigint[])
ON CONFLICT (name) DO NOTHING
RETURNING name;
COMMIT
