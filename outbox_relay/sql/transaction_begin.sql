-- Leaves a mark that ends with the transaction, to be looked for before COMMIT.
SELECT set_config('outbox_relay.transaction', %(mark)s, true), pg_backend_pid()
