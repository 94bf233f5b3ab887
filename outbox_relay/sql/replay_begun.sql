-- A replay that has begun before, and whether it is the same one.
SELECT
    selection = %(selection)s::jsonb AS is_same,
    published_through,
    messages,
    reached_no,
    to_char(finished_at, 'YYYY-MM-DD HH24:MI:SSOF') AS finished_at
FROM {schema}.outbox_replay
WHERE name = %(name)s
