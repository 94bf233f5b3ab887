-- Step 2: read the whole table once, to see that the bound holds. Writers and relays go on meanwhile.
ALTER TABLE outbox VALIDATE CONSTRAINT outbox_first_partition_check;
