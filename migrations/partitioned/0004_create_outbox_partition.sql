-- Step 4: the register of the partitions, and the two functions that open and drop them. Both run with the rights of
-- the owner, because a pruner may not alter tables; all that they allow is written here.

CREATE TABLE outbox_partition (
    number    integer NOT NULL,
    first_no  bigint NOT NULL,
    open_for  interval NOT NULL DEFAULT '1 day',
    opened_at timestamptz,
    closed_at timestamptz,
    made_in   xid8 NOT NULL DEFAULT pg_current_xact_id(),
    CONSTRAINT outbox_partition_pkey PRIMARY KEY (number),
    CONSTRAINT outbox_partition_open_for_check CHECK (open_for > interval '0')
);

COMMENT ON COLUMN outbox_partition.first_no IS 'The partition is outbox_p<number> and has the numbers from here on';
COMMENT ON COLUMN outbox_partition.open_for IS 'How long new rows go there before the next partition is opened';
COMMENT ON COLUMN outbox_partition.opened_at IS 'Null: made ahead';

INSERT INTO outbox_partition (number, first_no, opened_at)
SELECT last_value / 100000000000, last_value / 100000000000 * 100000000000, now()
FROM outbox_sequence_no_seq;

-- Lets new rows go to the next partition once the open one's time is over, and sees to it that two lie ahead.
--
-- No writer waits for any of this. A transaction that has written before a partition was made may not learn of it any
-- more: it holds the lock on the outbox already, and PostgreSQL looks for news when it takes one. So a partition is
-- opened only when every transaction has ended that is older than it. Until then new rows go on into the open one.
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
        PERFORM setval('outbox_sequence_no_seq', opened.first_no + width, false)
        FROM outbox_sequence_no_seq
        WHERE last_value < opened.first_no + width;
        UPDATE outbox_partition SET closed_at = clock_timestamp() WHERE number = opened.number;
        UPDATE outbox_partition SET opened_at = clock_timestamp() WHERE number = opened.number + 1
        RETURNING * INTO STRICT opened;
    END IF;

    WHILE newest.number < opened.number + 2 LOOP
        SELECT 'WITH (' || array_to_string(reloptions, ', ') || ')' INTO settings
        FROM pg_class
        WHERE oid = format('outbox_p%s', newest.number)::regclass;
        INSERT INTO outbox_partition (number, first_no, open_for)
        VALUES (newest.number + 1, newest.first_no + width, newest.open_for)
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
            newest.first_no,
            newest.first_no + width
        );
    END LOOP;
END
$$;

-- Tells whether every message with a number in [first_no, end_no) was published longer ago than :older_than. Two probes
-- for each shard are enough: the first mark above its highest number there says when the last of them was published.
CREATE FUNCTION outbox_numbers_are_old(first_no bigint, end_no bigint, older_than interval)
RETURNS boolean
LANGUAGE sql
STABLE
AS $$
    SELECT NOT EXISTS (
        SELECT
        FROM outbox_shard
        CROSS JOIN LATERAL (
            SELECT outbox.sequence_no
            FROM outbox
            WHERE outbox.shard = outbox_shard.shard
                AND outbox.sequence_no >= outbox_numbers_are_old.first_no
                AND outbox.sequence_no < outbox_numbers_are_old.end_no
            ORDER BY outbox.sequence_no DESC
            LIMIT 1
        ) AS newest
        LEFT JOIN LATERAL (
            SELECT mark.published_at
            FROM outbox_published AS mark
            WHERE mark.shard = outbox_shard.shard AND mark.through >= newest.sequence_no
            ORDER BY mark.through
            LIMIT 1
        ) AS settled ON true
        WHERE settled.published_at < now() - outbox_numbers_are_old.older_than IS NOT TRUE
    )
$$;

-- Drops the oldest closed partition in which every message was published longer ago than :older_than and none is
-- pending, and returns how many messages it had. Nothing comes back when there is none to drop. Where the marks have
-- counted other rows than there are, nothing is dropped, for one may have been skipped: the shards come back, to be
-- reconciled up to the number beside them. Below :reconciled_no rows may be missing, for somebody may delete published
-- messages.
--
-- What is found before the lock on the partition only saves taking it. The lock lets relays read and keeps writers out;
-- it waits for those that have rows there, so that none of theirs is missed. So a writer that was given up on and is
-- still open has no rows there; one that has ended may have some until they are collected. The drop itself needs the
-- outbox for a moment. It waits for less than the usual deadlock_timeout: whoever is in the way is never ended for it.
CREATE FUNCTION outbox_drop_partition(older_than interval, reconciled_no bigint)
RETURNS TABLE (messages bigint, shard smallint, through bigint)
LANGUAGE plpgsql
SECURITY DEFINER
SET lock_timeout = '500ms'
SET enable_seqscan = off
SET enable_bitmapscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
AS $$
#variable_conflict use_column
DECLARE
    closed record;
    is_locked boolean;
    outcome record;
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE invalid_transaction_state USING MESSAGE = 'partitions are dropped in read committed transactions only';
    END IF;
    <<partition>>
    FOR closed IN
        SELECT format('outbox_p%s', bounded.number) AS name, bounded.number, bounded.first_no, bounded.end_no
        FROM (
            SELECT number, first_no, lead(first_no) OVER (ORDER BY number) AS end_no, closed_at FROM outbox_partition
        ) AS bounded
        WHERE bounded.closed_at < now() - older_than
        ORDER BY bounded.number
    LOOP
        FOREACH is_locked IN ARRAY ARRAY[false, true] LOOP
            IF is_locked THEN
                EXECUTE format('LOCK TABLE %I IN SHARE MODE', closed.name);
            END IF;
            -- Of a partition that somebody has detached nothing can be seen through the outbox.
            CONTINUE partition WHEN NOT EXISTS (
                    SELECT
                    FROM pg_inherits
                    WHERE inhrelid = to_regclass(closed.name)
                        AND inhparent = 'outbox'::regclass
                        AND NOT inhdetachpending
                )
                OR NOT outbox_numbers_are_old(closed.first_no, closed.end_no, older_than)
                OR EXISTS (
                    SELECT
                    FROM outbox_shard
                    JOIN outbox_pending AS pending USING (shard)
                    JOIN outbox USING (shard, sequence_no)
                    WHERE pending.sequence_no >= closed.first_no AND pending.sequence_no < closed.end_no
                )
                OR EXISTS (
                    SELECT
                    FROM outbox_unordered AS late
                    WHERE late.collected_at IS NULL
                        AND late.from_no < closed.end_no
                        AND NOT EXISTS (
                            SELECT
                            FROM pg_locks
                            WHERE locktype = 'transactionid'
                                AND transactionid = late.transaction_id::xid
                                AND mode = 'ExclusiveLock'
                        )
                );
        END LOOP;

        WITH place AS MATERIALIZED (
            SELECT
                outbox_shard.shard,
                coalesce((
                    SELECT mark.through
                    FROM outbox_published AS mark
                    WHERE mark.shard = outbox_shard.shard AND mark.through < edge.oldest
                    ORDER BY mark.through DESC
                    LIMIT 1
                ), 0) AS after_no,
                (
                    SELECT mark.through
                    FROM outbox_published AS mark
                    WHERE mark.shard = outbox_shard.shard AND mark.through >= edge.newest
                    ORDER BY mark.through
                    LIMIT 1
                ) AS through
            FROM outbox_shard
            CROSS JOIN LATERAL (
                SELECT min(outbox.sequence_no) AS oldest, max(outbox.sequence_no) AS newest
                FROM outbox
                WHERE outbox.shard = outbox_shard.shard
                    AND outbox.sequence_no >= closed.first_no
                    AND outbox.sequence_no < closed.end_no
            ) AS edge
            WHERE edge.oldest IS NOT NULL
        ),
        -- The marks over the rows of the partition may also have counted rows of its neighbours, which stay.
        compared AS MATERIALIZED (
            SELECT
                place.*,
                counted.rows,
                counted.left_messages,
                counted.left_checksum,
                (counted.messages = said.messages AND counted.checksum = said.checksum)
                OR (counted.messages < said.messages AND place.through <= reconciled_no) AS agrees
            FROM place
            CROSS JOIN LATERAL (
                SELECT
                    count(*) FILTER (WHERE line.weight = 1 AND line.is_here) AS rows,
                    sum(line.weight) AS messages,
                    bit_xor(line.sequence_no) AS checksum,
                    coalesce(sum(line.weight) FILTER (WHERE NOT line.is_here), 0) AS left_messages,
                    coalesce(bit_xor(line.sequence_no) FILTER (WHERE NOT line.is_here), 0) AS left_checksum
                FROM (
                    SELECT
                        1 AS weight,
                        outbox.sequence_no,
                        outbox.sequence_no >= closed.first_no AND outbox.sequence_no < closed.end_no AS is_here
                    FROM outbox
                    WHERE outbox.shard = place.shard
                        AND outbox.sequence_no > place.after_no
                        AND outbox.sequence_no <= place.through
                    UNION ALL
                    -- Messages of writers that were given up on come once more, for no mark has counted them. OFFSET 0
                    -- keeps the writers in front: without one, nothing is read.
                    SELECT
                        -1,
                        message.sequence_no,
                        message.sequence_no >= closed.first_no AND message.sequence_no < closed.end_no
                    FROM outbox_unordered AS late
                    CROSS JOIN LATERAL (
                        SELECT outbox.sequence_no
                        FROM outbox
                        WHERE outbox.shard = place.shard
                            AND outbox.sequence_no > greatest(place.after_no, late.from_no)
                            AND outbox.sequence_no <= least(place.through, late.to_no)
                            AND outbox.transaction_id = late.transaction_id
                        OFFSET 0
                    ) AS message
                ) AS line
            ) AS counted
            CROSS JOIN LATERAL (
                SELECT sum(mark.messages) AS messages, bit_xor(mark.checksum) AS checksum
                FROM outbox_published AS mark
                WHERE mark.shard = place.shard AND mark.through > place.after_no AND mark.through <= place.through
            ) AS said
        ),
        dropped AS MATERIALIZED (
            SELECT compared.*
            FROM compared
            WHERE (SELECT bool_and(each.agrees) FROM compared AS each)
        ),
        merged AS (
            DELETE FROM outbox_published AS mark
            USING dropped
            WHERE mark.shard = dropped.shard AND mark.through > dropped.after_no AND mark.through < dropped.through
        ),
        remaining AS (
            UPDATE outbox_published AS mark
            SET messages = dropped.left_messages,
                checksum = dropped.left_checksum,
                before_xid = greatest(mark.before_xid, pg_snapshot_xmax(pg_current_snapshot()))
            FROM dropped
            WHERE mark.shard = dropped.shard AND mark.through = dropped.through
        )
        SELECT
            coalesce(sum(compared.rows), 0)::bigint AS messages,
            array_agg(compared.shard) FILTER (WHERE NOT compared.agrees) AS shards,
            array_agg(compared.through) FILTER (WHERE NOT compared.agrees) AS throughs
        INTO outcome
        FROM compared;

        IF outcome.shards IS NOT NULL THEN
            RETURN QUERY SELECT NULL::bigint, * FROM unnest(outcome.shards, outcome.throughs);
            RETURN;
        END IF;
        EXECUTE format('DROP TABLE %I', closed.name);
        DELETE FROM outbox_partition WHERE number = closed.number;
        RETURN QUERY SELECT outcome.messages, NULL::smallint, NULL::bigint;
        RETURN;
    END LOOP;
END
$$;

-- They find their tables whatever the caller's search_path is, and never temporary ones of those names.
DO $$
BEGIN
    EXECUTE format('ALTER FUNCTION outbox_open_partition SET search_path = %I, pg_temp', current_schema());
    EXECUTE format('ALTER FUNCTION outbox_numbers_are_old SET search_path = %I, pg_temp', current_schema());
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
    EXECUTE format('ALTER FUNCTION outbox_numbers_are_old OWNER TO %I', owner_name);
    EXECUTE format('ALTER FUNCTION outbox_drop_partition OWNER TO %I', owner_name);
END
$$;

REVOKE EXECUTE ON FUNCTION outbox_open_partition, outbox_numbers_are_old, outbox_drop_partition FROM PUBLIC;
GRANT EXECUTE ON FUNCTION outbox_open_partition, outbox_numbers_are_old, outbox_drop_partition TO outbox_pruner;
GRANT SELECT ON outbox_partition TO outbox_relay, outbox_pruner, outbox_operator;

DO $$
BEGIN
    PERFORM outbox_open_partition();
END
$$;
