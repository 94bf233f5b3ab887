-- An order and its message, both or neither: one statement is one transaction. Again every second, until it is stopped.

WITH placed AS (
    INSERT INTO orders (total)
    VALUES (round((10 + 90 * random())::numeric, 2))
    RETURNING id, total
)
INSERT INTO outbox (aggregate_type, aggregate_id, event_type, payload)
SELECT 'order', id::text, 'order_placed', jsonb_build_object('total', total)
FROM placed
\watch 1
