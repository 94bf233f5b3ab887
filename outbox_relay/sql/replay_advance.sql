-- Says how far a replay has come, and commits, in one message: to the horizon this transaction looks like a writer.
UPDATE {schema}.outbox_replay
SET messages = %(messages)s,
    reached_no = %(reached_no)s,
    finished_at = CASE WHEN %(is_finished)s THEN statement_timestamp() END
WHERE name = %(name)s;
COMMIT
