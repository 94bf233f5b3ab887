-- Locks one shard as a relay does, in a transaction that has just begun; filled in by the client. Read committed, whatever
-- the role's default: what follows must see what the relay has parked that held the lock before.
--
-- A frozen client is ended, as a frozen relay is, for its shard stands still.
SET TRANSACTION ISOLATION LEVEL READ COMMITTED;
SET LOCAL idle_in_transaction_session_timeout = %(timeout_ms)s;
SET LOCAL lock_timeout = %(timeout_ms)s;
SELECT FROM {schema}.outbox_shard WHERE shard = %(shard)s FOR UPDATE
