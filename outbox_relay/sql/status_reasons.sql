-- Why messages wait that a mark has passed; :most of them are counted, and of the reasons the first ones come.
SELECT reason_code, count(*) AS messages
FROM (SELECT reason_code FROM {schema}.outbox_pending WHERE state = 'waiting' LIMIT %(most)s) AS waiting
GROUP BY reason_code
ORDER BY messages DESC, reason_code
LIMIT 10
