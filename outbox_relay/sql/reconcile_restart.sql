-- Has all marks that are kept compared with their rows once more, and commits, in one message.
UPDATE {schema}.outbox_reconciled
SET checked_through = 0
WHERE checked_through > 0;
COMMIT
