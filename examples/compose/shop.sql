-- What a database is given before the first migration: the shop's own table, and a login for each job.

CREATE TABLE orders (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    total numeric(10, 2) NOT NULL
);

CREATE ROLE outbox_writer NOLOGIN;
CREATE ROLE outbox_relay NOLOGIN;
CREATE ROLE outbox_pruner NOLOGIN;
CREATE ROLE outbox_operator NOLOGIN;

CREATE ROLE shop_owner LOGIN PASSWORD 'laptop';
CREATE ROLE shop_relay LOGIN PASSWORD 'laptop' IN ROLE outbox_relay, outbox_pruner, pg_read_all_stats;
CREATE ROLE shop_app LOGIN PASSWORD 'laptop' IN ROLE outbox_writer;

GRANT CREATE, USAGE ON SCHEMA public TO shop_owner;
GRANT SELECT, INSERT ON orders TO shop_app;
