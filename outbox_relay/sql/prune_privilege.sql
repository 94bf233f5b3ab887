-- Tells whether this role may remove messages.
SELECT has_table_privilege('{schema}.outbox', 'DELETE')
