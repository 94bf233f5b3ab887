-- The partitioned layout, step 1: say up to which id the present table will go, so that step 3 can make it the first
-- partition without reading it. Nothing is checked yet, so writers wait for a moment only.
--
-- What hangs on the table itself would stay behind with the first partition, so its owner has to take it away first.

DO $$
DECLARE
    width CONSTANT bigint := 100000000000;  -- ids of one partition, as in step 4
    hanging text;
    bound bigint;
BEGIN
    IF to_regclass('outbox') IS NULL THEN
        RAISE undefined_table USING
            MESSAGE = 'there is no outbox yet',
            HINT = 'Run first: outbox-relay migrate apply';
    END IF;

    SELECT string_agg(DISTINCT pg_describe_object(classid, objid, 0), ', ')
    INTO hanging
    FROM pg_depend
    LEFT JOIN pg_constraint ON classid = 'pg_constraint'::regclass AND pg_constraint.oid = objid
    WHERE refclassid = 'pg_class'::regclass
        AND refobjid = 'outbox'::regclass
        AND (
            classid IN (
                'pg_trigger'::regclass, 'pg_policy'::regclass, 'pg_rewrite'::regclass, 'pg_publication_rel'::regclass
            )
            OR pg_constraint.contype = 'f'
        );
    IF hanging IS NOT NULL THEN
        RAISE feature_not_supported USING
            MESSAGE = format('the outbox has %s', hanging),
            HINT = 'Drop it, run this again, and create it anew on the partitioned table';
    END IF;

    SELECT (last_value / width + 1) * width INTO bound FROM outbox_id_seq;
    EXECUTE format('ALTER TABLE outbox ADD CONSTRAINT outbox_first_partition_check CHECK (id < %s) NOT VALID', bound);
END
$$;
