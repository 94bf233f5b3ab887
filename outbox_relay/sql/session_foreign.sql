-- The settings that this session has from its role, its database, the client's environment or another client of a
-- pooler, each with the value that undoes it; and the time-outs that the server's configuration has for everybody.
--
-- What decides neither what a statement answers nor whether it ends is somebody's decision, and stays: logging,
-- keepalives, memory, where new tables are stored, what belongs to extensions, and what only a superuser may set.
-- search_path stays too, for triggers of the user's own, but behind pg_catalog: no function in it comes first.
--
-- All in one message: one of the time-outs may end a session that is idle in its transaction for a moment.
BEGIN;
SET LOCAL statement_timeout = 0;
SELECT
    name,
    CASE name WHEN 'search_path' THEN concat_ws(', ', 'pg_catalog', nullif(setting, '')) ELSE boot_val END AS value
FROM pg_settings
WHERE context = 'user'
    AND (
        source IN ('global', 'database', 'user', 'database user', 'client', 'session')
        OR name IN (
            'lock_timeout', 'transaction_timeout', 'idle_in_transaction_session_timeout', 'idle_session_timeout'
        )
    )
    AND setting IS DISTINCT FROM boot_val
    AND boot_val IS NOT NULL
    AND category NOT LIKE ALL (
        '{"Customized Options","Connections and Authentication%","Reporting and Logging%","Resource Usage%","%Library Preloading"}'::text[]
    )
    AND name NOT IN (
        'client_encoding',
        'createrole_self_grant',
        'default_table_access_method',
        'default_tablespace',
        'default_toast_compression',
        'statement_timeout',
        'temp_tablespaces',
        'transaction_deferrable',
        'transaction_isolation',
        'transaction_read_only'
    )
ORDER BY name;
COMMIT
