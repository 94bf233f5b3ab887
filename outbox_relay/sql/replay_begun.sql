-- A replay that has begun before, and whether it is the same one.
SELECT
    selection = %(selection)s::jsonb AS is_same,
    published_before,
    messages,
    reached_no,
    finished_at
FROM {schema}.outbox_replay
WHERE name = %(name)s
