-- Whether the outbox is partitioned.
SELECT to_regclass('{schema}.outbox_partition') IS NOT NULL
