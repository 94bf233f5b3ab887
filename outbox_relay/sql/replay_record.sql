-- Records a replay before its first message goes out; no row comes back if the name is taken.
INSERT INTO {schema}.outbox_replay (name, operator, why, selection, published_before)
VALUES (%(name)s, %(operator)s, %(why)s, %(selection)s::jsonb, %(published_before)s)
ON CONFLICT (name) DO NOTHING
RETURNING name
