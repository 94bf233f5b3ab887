-- For one transaction of the doctor: it neither waits for long nor makes others queue behind it.
SET LOCAL lock_timeout = '2s';
SET LOCAL statement_timeout = '10s'
