-- Step 4: the register of the partitions, and the two functions that open and drop them. Both run with the rights of the
-- owner, because a relay may not alter tables; all that they allow is written here.

CREATE TABLE outbox_partition (
    number    integer NOT NULL,
    first_id  bigint NOT NULL,
    open_for  interval NOT NULL DEFAULT '1 day',
    opened_at timestamptz,
    closed_at timestamptz,
    made_in   xid8 NOT NULL DEFAULT pg_current_xact_id(),
    CONSTRAINT outbox_partition_pkey PRIMARY KEY (number),
    CONSTRAINT outbox_partition_open_for_check CHECK (open_for > interval '0')
);

COMMENT ON COLUMN outbox_partition.first_id IS 'The partition is outbox_p<number> and has the ids from here on';
COMMENT ON COLUMN outbox_partition.open_for IS 'How long new rows go there before the next partition is opened';
COMMENT ON COLUMN outbox_partition.opened_at IS 'Null: made ahead';

INSERT INTO outbox_partition (number, first_id, opened_at)
SELECT last_value / 100000000000, last_value / 100000000000 * 100000000000, now()
FROM outbox_id_seq;

-- Lets new rows go to the next partition once the open one's time is over, and sees to it that two lie ahead.
--
-- No writer waits for any of this. A transaction that has written before a partition was made may not learn of it any more:
-- it holds the lock on the outbox already, and PostgreSQL looks for news when it takes one. So a partition is opened only
-- when every transaction has ended that is older than it. Until then new rows go on into the open one.
CREATE FUNCTION outbox_open_partition()
RETURNS void
LANGUAGE plpgsql
SECURITY DEFINER
SET lock_timeout = '500ms'
AS $$
DECLARE
    width CONSTANT bigint := 100000000000;
    settings text;
    opened outbox_partition;
    newest outbox_partition;
    is_known boolean;
BEGIN
    LOCK TABLE outbox_partition IN SHARE ROW EXCLUSIVE MODE;
    SELECT * INTO STRICT opened FROM outbox_partition WHERE opened_at IS NOT NULL AND closed_at IS NULL;
    SELECT * INTO STRICT newest FROM outbox_partition ORDER BY number DESC LIMIT 1;
    SELECT made_in < pg_snapshot_xmin(pg_current_snapshot()) INTO is_known
    FROM outbox_partition
    WHERE number = opened.number + 1;

    IF opened.opened_at + opened.open_for <= clock_timestamp() AND is_known THEN
        -- Not undone by a rollback: then the next call finds the sequence where it should be.
        PERFORM setval('outbox_id_seq', opened.first_id + width, false)
        FROM outbox_id_seq
        WHERE last_value < opened.first_id + width;
        UPDATE outbox_partition SET closed_at = clock_timestamp() WHERE number = opened.number;
        UPDATE outbox_partition SET opened_at = clock_timestamp() WHERE number = opened.number + 1
        RETURNING * INTO STRICT opened;
    END IF;

    WHILE newest.number < opened.number + 2 LOOP
        SELECT 'WITH (' || array_to_string(reloptions, ', ') || ')' INTO settings
        FROM pg_class
        WHERE oid = format('outbox_p%s', newest.number)::regclass;
        INSERT INTO outbox_partition (number, first_id, open_for)
        VALUES (newest.number + 1, newest.first_id + width, newest.open_for)
        RETURNING * INTO newest;
        -- Made apart and attached then, which leaves the outbox open to everybody.
        EXECUTE format(
            'CREATE TABLE outbox_p%s (LIKE outbox INCLUDING ALL EXCLUDING IDENTITY EXCLUDING INDEXES) %s',
            newest.number,
            settings
        );
        EXECUTE format(
            'ALTER TABLE outbox ATTACH PARTITION outbox_p%s FOR VALUES FROM (%s) TO (%s)',
            newest.number,
            newest.first_id,
            newest.first_id + width
        );
    END LOOP;
END
$$;

-- Drops the oldest closed partition in which every row was published longer ago than :older_than and none is parked;
-- gives the number of its rows, or null when there is none to drop.
--
-- The lock on the partition lets relays claim but nobody write to it: what was looked at stays so until the drop. It waits
-- for writers that have rows there, so none of theirs is missed. The drop itself needs the outbox for a moment, and may
-- wait for less than the usual deadlock_timeout: whoever else is in the way is never ended for it.
CREATE FUNCTION outbox_drop_partition(older_than interval)
RETURNS bigint
LANGUAGE plpgsql
SECURITY DEFINER
SET lock_timeout = '500ms'
SET enable_seqscan = on
AS $$
DECLARE
    closed outbox_partition;
    part text;
    is_needed boolean;
    messages bigint;
    old_messages bigint;
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE invalid_transaction_state USING MESSAGE = 'partitions are dropped in read committed transactions only';
    END IF;
    FOR closed IN SELECT * FROM outbox_partition WHERE closed_at < now() - older_than ORDER BY number LOOP
        part := format('outbox_p%s', closed.number);
        EXECUTE format(
            'SELECT EXISTS (SELECT FROM %1$I WHERE published_at IS NULL AND parked_at IS NULL)
                OR EXISTS (SELECT FROM %1$I WHERE parked_at IS NOT NULL)',
            part
        ) INTO is_needed;
        CONTINUE WHEN is_needed;

        EXECUTE format('LOCK TABLE %I IN SHARE MODE', part);
        EXECUTE format(
            'SELECT count(*), count(*) FILTER (WHERE published_at < now() - $1 AND parked_at IS NULL) FROM %I',
            part
        ) INTO messages, old_messages USING older_than;
        CONTINUE WHEN old_messages < messages;

        EXECUTE format('DROP TABLE %I', part);
        DELETE FROM outbox_partition WHERE number = closed.number;
        RETURN messages;
    END LOOP;
    RETURN NULL;
END
$$;

-- They find their tables whatever the caller's search_path is, and never temporary ones of those names.
DO $$
BEGIN
    EXECUTE format('ALTER FUNCTION outbox_open_partition SET search_path = %I, pg_temp', current_schema());
    EXECUTE format('ALTER FUNCTION outbox_drop_partition SET search_path = %I, pg_temp', current_schema());
END
$$;

-- The owner of the outbox is the one who may alter it, whoever runs this.
DO $$
DECLARE
    owner_name text := (SELECT pg_get_userbyid(relowner) FROM pg_class WHERE oid = 'outbox'::regclass);
BEGIN
    EXECUTE format('ALTER TABLE outbox_partition OWNER TO %I', owner_name);
    EXECUTE format('ALTER FUNCTION outbox_open_partition OWNER TO %I', owner_name);
    EXECUTE format('ALTER FUNCTION outbox_drop_partition OWNER TO %I', owner_name);
END
$$;

REVOKE EXECUTE ON FUNCTION outbox_open_partition, outbox_drop_partition FROM PUBLIC;
GRANT EXECUTE ON FUNCTION outbox_open_partition, outbox_drop_partition TO outbox_relay, outbox_pruner;
GRANT SELECT ON outbox_partition TO outbox_relay, outbox_pruner, outbox_operator;

DO $$
BEGIN
    PERFORM outbox_open_partition();
END
$$;
