-- Tells whether this role may write messages. The writers' role has a grant for each column, and the owner for all.
SELECT has_column_privilege('{schema}.outbox', 'message_id', 'INSERT')
