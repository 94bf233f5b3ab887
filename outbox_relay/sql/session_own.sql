-- What every statement of a relay or a command relies on, whatever else is set: for the session of a direct connection,
-- and behind a pooler, which may give each transaction another session, with SET LOCAL at the beginning of each.
--
-- With row_security = off a policy that hides rows is an error: what is hidden would be taken for published or deleted.
-- Only indexes may be chosen, for statistics of a time when a table was small make a few rows look like all of it; JIT
-- would compile a plan for longer than it runs. Dates come in the one style that the driver reads, and names as they
-- are compared. A time-out is for whoever begins a transaction to set.
SET statement_timeout = 0;
SET row_security = off;
SET datestyle = 'ISO, MDY';
SET timezone = 'UTC';
SET quote_all_identifiers = off;
SET jit = off;
SET enable_seqscan = off;
SET enable_bitmapscan = off;
SET max_parallel_workers_per_gather = 0
