-- The highest number drawn so far, committed or not; all that an idle poll costs.
SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM {schema}.outbox_sequence_no_seq
