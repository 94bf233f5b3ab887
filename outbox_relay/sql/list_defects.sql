-- What somebody has changed about complete tables so that a relay could not trust what it reads or writes, each with
-- the statement that mends it; no row means ready. It reads the catalog only: while a policy hides rows of a table, a
-- statement that names the table is an error of its own.
WITH relay_table AS MATERIALIZED (
    SELECT oid, relname, format('%%I.%%I', %(schema)s::text, relname) AS name
    FROM pg_class
    WHERE relnamespace = to_regnamespace(quote_ident(%(schema)s::text))
        AND relname IN (
            'outbox', 'outbox_shard', 'outbox_published', 'outbox_pending', 'outbox_unordered', 'outbox_reconciled'
        )
)
-- Hidden messages are never published, and hidden marks publish everything again.
SELECT
    format('row level security hides rows of %%I from role %%I', relay_table.relname, current_user) AS defect,
    format(
        'ALTER TABLE %%s DISABLE ROW LEVEL SECURITY, or ALTER ROLE %%I BYPASSRLS', relay_table.name, current_user
    ) AS remedy
FROM relay_table
WHERE row_security_active(relay_table.oid)
UNION ALL
-- What is inserted, settled or removed would be reported as done and be something else.
SELECT
    format('rule %%I of %%I does something else instead of what is asked', rule.rulename, relay_table.relname),
    format('DROP RULE %%I ON %%s', rule.rulename, relay_table.name)
FROM relay_table
JOIN pg_rewrite AS rule ON rule.ev_class = relay_table.oid AND rule.is_instead AND rule.ev_enabled <> 'D'
UNION ALL
-- Marks outlive the messages of a TRUNCATE, and with RESTART IDENTITY hide as many new ones.
SELECT
    format('no enabled trigger outbox_forget_trigger empties the marks when %%I is truncated', relay_table.relname),
    CASE
        WHEN EXISTS (
            SELECT
            FROM pg_trigger
            WHERE tgrelid = relay_table.oid AND tgname = 'outbox_forget_trigger'
        ) THEN format('ALTER TABLE %%s ENABLE TRIGGER outbox_forget_trigger', relay_table.name)
        ELSE format(
            'CREATE TRIGGER outbox_forget_trigger AFTER TRUNCATE ON %%s '
            'FOR EACH STATEMENT EXECUTE FUNCTION %%I.outbox_forget()',
            relay_table.name,
            %(schema)s::text
        )
    END
FROM relay_table
WHERE relay_table.relname = 'outbox'
    AND NOT EXISTS (
        SELECT
        FROM pg_trigger
        JOIN pg_proc ON pg_proc.oid = pg_trigger.tgfoid
        WHERE pg_trigger.tgrelid = relay_table.oid
            AND pg_trigger.tgenabled IN ('O', 'A')
            AND pg_trigger.tgtype & 32 = 32
            AND pg_proc.proname = 'outbox_forget'
            AND pg_proc.pronamespace = to_regnamespace(quote_ident(%(schema)s::text))
    )
UNION ALL
-- A session that has drawn several numbers at once uses the lower ones after the marks have passed them.
SELECT
    format(
        'numbers are not drawn one by one: %%I has CACHE %%s, INCREMENT %%s%%s',
        relation.relname,
        sequence.seqcache,
        sequence.seqincrement,
        CASE WHEN sequence.seqcycle THEN ', CYCLE' ELSE '' END
    ),
    format(
        'ALTER SEQUENCE %%I.%%I CACHE 1 INCREMENT 1 NO CYCLE, then let all applications connect anew, '
        'for their sessions use up the numbers that they have drawn',
        %(schema)s::text,
        relation.relname
    )
FROM pg_sequence AS sequence
JOIN pg_class AS relation ON relation.oid = sequence.seqrelid
WHERE relation.relname = 'outbox_sequence_no_seq'
    AND relation.relnamespace = to_regnamespace(quote_ident(%(schema)s::text))
    AND (sequence.seqcache <> 1 OR sequence.seqincrement <> 1 OR sequence.seqcycle)
