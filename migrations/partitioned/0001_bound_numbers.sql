-- The partitioned layout, step 1: say up to which number the present table will go, so that step 3 can make it the
-- first partition without reading it. Nothing is checked yet, so writers wait for a moment only.
--
-- What hangs on the table itself would stay behind with the first partition, so its owner has to take it away first.
-- Our own trigger and view are moved by step 3.

DO $$
DECLARE
    width CONSTANT bigint := 100000000000;  -- numbers of one partition, as in step 4
    hanging text;
    bound bigint;
BEGIN
    IF to_regclass('outbox') IS NULL THEN
        RAISE undefined_table USING
            MESSAGE = 'there is no outbox yet',
            HINT = 'Run first: outbox-relay migrate apply';
    END IF;

    SELECT string_agg(DISTINCT object.name, ', ')
    INTO hanging
    FROM (
        SELECT 'row security' FROM pg_class WHERE oid = 'outbox'::regclass AND relrowsecurity
        UNION ALL
        SELECT pg_describe_object(depend.classid, depend.objid, 0)
        FROM pg_depend AS depend
        LEFT JOIN pg_constraint AS foreign_key
            ON depend.classid = 'pg_constraint'::regclass
            AND foreign_key.oid = depend.objid
            AND foreign_key.contype = 'f'
        LEFT JOIN pg_trigger AS forget
            ON depend.classid = 'pg_trigger'::regclass
            AND forget.oid = depend.objid
            AND forget.tgrelid = 'outbox'::regclass
            AND forget.tgfoid = to_regproc('outbox_forget')
        LEFT JOIN pg_rewrite AS view_rule
            ON depend.classid = 'pg_rewrite'::regclass
            AND view_rule.oid = depend.objid
            AND view_rule.ev_class = to_regclass('outbox_message')
        WHERE depend.refclassid = 'pg_class'::regclass
            AND depend.refobjid = 'outbox'::regclass
            AND forget.oid IS NULL
            AND view_rule.oid IS NULL
            AND (
                depend.classid IN (
                    'pg_trigger'::regclass,
                    'pg_policy'::regclass,
                    'pg_rewrite'::regclass,
                    'pg_publication_rel'::regclass,
                    'pg_proc'::regclass
                )
                OR foreign_key.oid IS NOT NULL
            )
    ) AS object (name);
    IF hanging IS NOT NULL THEN
        RAISE feature_not_supported USING
            MESSAGE = format('the outbox has %s', hanging),
            HINT = 'Drop it, run this again, and create it anew on the partitioned table';
    END IF;

    SELECT (last_value / width + 1) * width INTO bound FROM outbox_sequence_no_seq;
    EXECUTE format(
        'ALTER TABLE outbox ADD CONSTRAINT outbox_first_partition_check CHECK (sequence_no < %s) NOT VALID', bound
    );
END
$$;
