-- Remembers transactions whose messages have been overtaken, before anything overtakes them. Several relays may agree.
INSERT INTO {schema}.outbox_unordered (transaction_id)
SELECT unnest(%(xids)s::text[])::xid8
ON CONFLICT DO NOTHING
