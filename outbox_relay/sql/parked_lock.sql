-- Locks one shard as a relay does, so that no relay publishes or parks in it until the end of the transaction; filled
-- in by the client. The wait ends with lock_timeout, and the statements after it have the time of one statement again.
--
-- A client that freezes meanwhile is ended by idle_in_transaction_session_timeout, as a frozen relay is: its shard
-- stands still.
SET LOCAL statement_timeout = 0;
SELECT FROM {schema}.outbox_shard WHERE shard = %(shard)s FOR UPDATE;
SET LOCAL statement_timeout = %(statement_timeout_ms)s
