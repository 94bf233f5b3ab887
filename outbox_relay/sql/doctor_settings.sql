-- Who commits without waiting for the disk, and what mends it: the server, all roles or one, in this database or all.
-- Of the roles those count that may write messages. What is set for this session's role hides what the server sets.
SELECT
    format('%s = off on the whole server', name) AS finding,
    format(E'ALTER SYSTEM SET %s = on;\nSELECT pg_reload_conf();', name) AS remedy
FROM pg_settings
WHERE setting = 'off'
    AND (
        name = 'fsync'
        OR name = 'synchronous_commit' AND source NOT IN ('global', 'database', 'user', 'database user')
    )
UNION ALL
SELECT
    format('synchronous_commit = off for %s', coalesce(pg_roles.rolname, 'all roles')),
    CASE
        WHEN pg_database.oid IS NULL
            THEN format('ALTER ROLE %s RESET synchronous_commit;', coalesce(quote_ident(pg_roles.rolname), 'ALL'))
        WHEN pg_roles.oid IS NULL THEN format('ALTER DATABASE %I RESET synchronous_commit;', pg_database.datname)
        ELSE format(
            'ALTER ROLE %I IN DATABASE %I RESET synchronous_commit;', pg_roles.rolname, pg_database.datname
        )
    END
FROM pg_db_role_setting
CROSS JOIN unnest(pg_db_role_setting.setconfig) AS given (setting)
LEFT JOIN pg_roles ON pg_roles.oid = pg_db_role_setting.setrole
LEFT JOIN pg_database ON pg_database.oid = pg_db_role_setting.setdatabase
WHERE given.setting ~ '^synchronous_commit=(off|false|no|0)$'
    AND coalesce(pg_database.datname, current_database()) = current_database()
    AND (pg_roles.oid IS NULL OR has_column_privilege(pg_roles.oid, '{schema}.outbox'::regclass, 'message_id', 'INSERT'))
ORDER BY finding
