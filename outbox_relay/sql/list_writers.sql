-- The xid of every open or prepared transaction that holds the lock of a writer on the outbox: nobody else can own a
-- number. One pass over pg_locks, because the view costs in proportion to all locks held.
--
-- Whoever writes through a partitioned outbox holds the lock on it as well; the owner may also insert into a partition.
SELECT array_agg(transactionid::text) FILTER (WHERE locktype = 'transactionid') AS xids
FROM pg_locks
WHERE granted
    AND mode IN ('RowExclusiveLock', 'ExclusiveLock')
    AND (
        locktype = 'transactionid'
        OR (
            locktype = 'relation'
            AND (
                relation = '{schema}.outbox'::regclass
                OR relation IN (SELECT inhrelid FROM pg_inherits WHERE inhparent = '{schema}.outbox'::regclass)
            )
            AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
        )
    )
GROUP BY pid, virtualtransaction
HAVING bool_or(locktype = 'relation')
