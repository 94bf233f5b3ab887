-- Which session of the server answers, and its clock.
SELECT pg_backend_pid() AS pid, extract(epoch FROM clock_timestamp())::float8 AS now
