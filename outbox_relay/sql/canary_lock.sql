-- Tells whether this transaction is the only one that may write a canary into this outbox. The lock ends with the
-- transaction, however it ends.
SELECT pg_try_advisory_xact_lock(hashtextextended('outbox_relay_canary', '{schema}.outbox'::regclass::oid::bigint))
