-- Step 3: the present table becomes the first partition of a new one that takes its name. Nothing is copied, and what
-- is unpublished goes on. This needs the table for itself, for some milliseconds.
--
-- The partitions are ranges of sequence_no, not of times that a writer gives: each covers 100,000,000,000 numbers, and
-- opening the next one moves the sequence to its first number. So a row always finds a partition, the primary key stays
-- (shard, sequence_no), and whoever reads on from a number opens the partitions from there on only.
--
-- Columns, checks, indexes, grants and settings are taken from the table as it is, with what its owner has changed. The
-- view outbox_message and the trigger that forgets the marks move to the new table.

DO $$
DECLARE
    width CONSTANT bigint := 100000000000;
    part text;
    bound bigint;
    old_owner oid;
    old_acl aclitem[];
    old_sequence_acl aclitem[];
    last_number record;
    command text;
    commands text[];
BEGIN
    LOCK TABLE outbox IN ACCESS EXCLUSIVE MODE;
    SELECT last_value, is_called INTO last_number FROM outbox_sequence_no_seq;
    SELECT relowner, relacl INTO old_owner, old_acl FROM pg_class WHERE oid = 'outbox'::regclass;
    SELECT relacl INTO old_sequence_acl FROM pg_class WHERE oid = 'outbox_sequence_no_seq'::regclass;
    part := format('outbox_p%s', last_number.last_value / width);
    bound := (last_number.last_value / width + 1) * width;

    -- What to do to the new table once it is there, remembered by names that the old one is about to give up.
    SELECT array_agg(made.command)
    INTO commands
    FROM (
        SELECT format('ALTER TABLE outbox ADD CONSTRAINT %I %s', conname, pg_get_constraintdef(oid))
        FROM pg_constraint
        WHERE conrelid = 'outbox'::regclass AND contype IN ('p', 'u')
        UNION ALL
        SELECT format(
            'CREATE %sINDEX %I ON outbox%s',
            CASE WHEN indisunique THEN 'UNIQUE ' END,
            relname,
            substring(pg_get_indexdef(indexrelid) FROM ' USING .*')
        )
        FROM pg_index
        JOIN pg_class ON pg_class.oid = indexrelid
        WHERE indrelid = 'outbox'::regclass AND NOT EXISTS (SELECT FROM pg_constraint WHERE conindid = indexrelid)
        UNION ALL
        SELECT format('COMMENT ON TABLE outbox IS %L', description)
        FROM pg_description
        WHERE classoid = 'pg_class'::regclass AND objoid = 'outbox'::regclass AND objsubid = 0
        UNION ALL
        SELECT format('GRANT %s ON outbox TO %s', privilege_type, coalesce(quote_ident(rolname), 'PUBLIC'))
        FROM aclexplode(old_acl)
        LEFT JOIN pg_roles ON pg_roles.oid = grantee
        UNION ALL
        SELECT format(
            'GRANT %s (%I) ON outbox TO %s', privilege_type, attname, coalesce(quote_ident(rolname), 'PUBLIC')
        )
        FROM pg_attribute
        CROSS JOIN aclexplode(attacl)
        LEFT JOIN pg_roles ON pg_roles.oid = grantee
        WHERE attrelid = 'outbox'::regclass
        UNION ALL
        SELECT format(
            'GRANT %s ON SEQUENCE outbox_sequence_no_seq TO %s',
            privilege_type,
            coalesce(quote_ident(rolname), 'PUBLIC')
        )
        FROM aclexplode(old_sequence_acl)
        LEFT JOIN pg_roles ON pg_roles.oid = grantee
        UNION ALL
        SELECT pg_get_triggerdef(oid)
        FROM pg_trigger
        WHERE tgrelid = 'outbox'::regclass AND NOT tgisinternal
        UNION ALL
        -- Replaced, not dropped: its grants, its comments and what reads it stay.
        SELECT format(
            'CREATE OR REPLACE VIEW outbox_message %s AS %s',
            'WITH (' || array_to_string(reloptions, ', ') || ')',
            pg_get_viewdef(oid)
        )
        FROM pg_class
        WHERE oid = to_regclass('outbox_message')
    ) AS made (command);

    FOR command IN
        SELECT format('ALTER INDEX %I RENAME TO %I', relname, regexp_replace(relname, '^(outbox_)?', part || '_'))
        FROM pg_index
        JOIN pg_class ON pg_class.oid = indexrelid
        WHERE indrelid = 'outbox'::regclass
        UNION ALL
        SELECT format('DROP TRIGGER %I ON outbox', tgname)
        FROM pg_trigger
        WHERE tgrelid = 'outbox'::regclass AND NOT tgisinternal
    LOOP
        EXECUTE command;
    END LOOP;
    ALTER TABLE outbox ALTER COLUMN sequence_no DROP IDENTITY;
    EXECUTE format('ALTER TABLE outbox RENAME TO %I', part);

    EXECUTE format(
        'CREATE TABLE outbox (LIKE %I INCLUDING ALL EXCLUDING INDEXES) PARTITION BY RANGE (sequence_no)', part
    );
    ALTER TABLE outbox
        DROP CONSTRAINT outbox_first_partition_check,
        ALTER COLUMN sequence_no ADD GENERATED ALWAYS AS IDENTITY;
    PERFORM setval('outbox_sequence_no_seq', last_number.last_value, last_number.is_called);
    EXECUTE format('ALTER TABLE outbox OWNER TO %I', pg_get_userbyid(old_owner));

    FOREACH command IN ARRAY commands LOOP
        EXECUTE command;
    END LOOP;
    EXECUTE format('ALTER TABLE outbox ATTACH PARTITION %I FOR VALUES FROM (MINVALUE) TO (%s)', part, bound);
    EXECUTE format('ALTER TABLE %I DROP CONSTRAINT outbox_first_partition_check', part);

    -- Partitions are reached through the outbox only, whose lock tells the relays who may own a number.
    FOR command IN
        SELECT DISTINCT format('REVOKE ALL ON %I FROM %s', part, coalesce(quote_ident(rolname), 'PUBLIC'))
        FROM (
            SELECT grantee FROM aclexplode(old_acl)
            UNION ALL
            SELECT grantee FROM pg_attribute CROSS JOIN aclexplode(attacl) WHERE attrelid = part::regclass
        ) AS granted
        LEFT JOIN pg_roles ON pg_roles.oid = grantee
        WHERE grantee <> old_owner
    LOOP
        EXECUTE command;
    END LOOP;
END
$$;
