-- For one transaction of the doctor: it neither waits for long nor makes others queue behind it, and reads definitions
-- as they are compared with ours. Row level security would hide what it asks for: PostgreSQL refuses to answer instead.
SET LOCAL lock_timeout = '2s';
SET LOCAL statement_timeout = '10s';
SET LOCAL quote_all_identifiers = off;
SET LOCAL row_security = off
