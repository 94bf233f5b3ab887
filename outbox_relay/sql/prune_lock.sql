-- Tells whether this transaction is the only one that prunes this outbox. The lock ends with the transaction, however
-- it ends.
SELECT pg_try_advisory_xact_lock(hashtextextended('outbox_relay_prune', '{schema}.outbox'::regclass::oid::bigint))
