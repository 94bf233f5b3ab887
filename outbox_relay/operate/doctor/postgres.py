"""The checks of PostgreSQL: each a function of what one question returned, with no connection of its own."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from psycopg.sql import Identifier

from outbox_relay.operate.doctor.check import Check, duration
from outbox_relay.operate.doctor.messages import how_to_end_all, who

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from outbox_relay.operate.migrate import MigrationState
    from outbox_relay.relay.horizon import OpenTransaction

_OLDEST_VERSION, _NEWEST_VERSION = 14, 18
_MOST_CLOCK_SECONDS = 5.0
_MOST_OVERDUE_SECONDS = 3600.0
_MESSAGES = re.compile(r"outbox(_p\d+)?")  # the table, or its partitions
_ADVICE = re.compile(r", (?=or |then )")  # where the advice begins in a remedy of `list_defects.sql`
_MANY_DEAD_TUPLES = 100_000
_MANY_BYTES = 100 * 2**30
_FAILSAFE_AGE = 1_600_000_000  # where vacuum drops everything else; at 2^31 the server takes no more writes
_VERIFYING_MODES = frozenset({"verify-ca", "verify-full"})

# By table and name, as pg_get_indexdef has them, so that they can be compared, and pasted.
INDEXES: Mapping[tuple[str, str], str] = {
    ("outbox", "outbox_pkey"): "btree (shard, sequence_no)",
    ("outbox_published", "outbox_published_pkey"): "btree (shard, through)",
    ("outbox_pending", "outbox_pending_pkey"): "btree (shard, sequence_no)",
    ("outbox_pending", "outbox_pending_key_idx"): "btree (key_hash, is_unordered, state, sequence_no)",
    ("outbox_pending", "outbox_pending_waiting_idx"): (
        "btree (shard, hashtextextended(aggregate_type, (0)::bigint), sequence_no) WHERE (state = 'waiting'::text)"
    ),
    ("outbox_unordered", "outbox_unordered_pkey"): "btree (transaction_id)",
}

# As the migration sets them; another value than ours is somebody's decision.
VACUUM_OPTIONS: Mapping[str, Mapping[str, str]] = {
    "outbox": {
        "autovacuum_vacuum_scale_factor": "0.05",
        "autovacuum_vacuum_threshold": "10000",
        "autovacuum_vacuum_insert_scale_factor": "0.1",
        "autovacuum_analyze_scale_factor": "0.05",
        "autovacuum_analyze_threshold": "10000",
        "autovacuum_vacuum_cost_delay": "1",
    },
    "outbox_published": {
        "autovacuum_vacuum_scale_factor": "0.05",
        "autovacuum_vacuum_threshold": "1000",
        "autovacuum_analyze_scale_factor": "0.05",
        "autovacuum_analyze_threshold": "1000",
        "autovacuum_vacuum_cost_delay": "1",
    },
    "outbox_pending": {
        "autovacuum_vacuum_scale_factor": "0.05",
        "autovacuum_vacuum_threshold": "1000",
        "autovacuum_vacuum_cost_delay": "1",
    },
}


@dataclass(frozen=True, slots=True)
class Server:
    """The columns of `doctor_server.sql`; ages are counted in transactions."""

    version_number: int
    version: str
    is_replica: bool
    is_read_only: bool
    role_name: str
    database_name: str
    lacks_group: bool
    sees_all_sessions: bool
    has_autovacuum: bool
    freeze_max_age: int
    xid_age: int
    multixact_age: int


@dataclass(frozen=True, slots=True)
class Table:
    """The columns of `doctor_tables.sql`: a table or a partition by its quoted `name`, and the table it belongs to."""

    name: str
    table_name: str
    is_logged: bool
    has_autovacuum: bool
    options: Mapping[str, str]
    live_tuples: int
    dead_tuples: int
    total_bytes: int
    xid_age: int
    multixact_age: int


@dataclass(frozen=True, slots=True)
class Slot:
    """The columns of `doctor_slots.sql`: a replication slot that nobody reads."""

    slot_name: str
    kept_bytes: float
    held_transactions: int


@dataclass(frozen=True, slots=True)
class Index:
    """The columns of `doctor_indexes.sql`; `definition` is what follows USING, `parts` are the partitions' indexes."""

    table_name: str
    name: str
    is_primary: bool
    is_valid: bool
    definition: str
    is_partitioned: bool = False
    parts: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Partitions:
    """The columns of `doctor_partitions.sql`; below 0 the open partition is in its time."""

    partitions: int
    ahead: int
    overdue_seconds: float


@dataclass(frozen=True, slots=True)
class Trigger:
    """The columns of `doctor_triggers.sql`, quoted: a trigger that may change or drop rows."""

    name: str
    table_name: str


@dataclass(frozen=True, slots=True)
class Client:
    """
    What this side knows of its connection.

    Attributes:
        host: Address it is connected to, empty for a socket.
        sslmode: As libpq was told.
        key_pid: The session by the key that libpq got to cancel queries with.
        pids: The sessions that answered a few statements, each outside a transaction.
        clock_seconds: This machine's clock less the server's.
    """

    host: str
    is_encrypted: bool
    sslmode: str
    key_pid: int
    pids: Sequence[int]
    clock_seconds: float


def check_tls(client: Client) -> Check:
    """Is the connection encrypted, and to whom?"""
    if client.host in {"", "::1"} or client.host.startswith("127."):
        return Check("tls", "OK", "not needed: the server is on this machine")
    if not client.is_encrypted:
        return Check(
            "tls",
            "WARN",
            f"none: passwords and messages travel to {client.host} in the clear",
            "# let the server offer TLS, then add sslmode=verify-full and sslrootcert=... to OUTBOX_RELAY_DATABASE_URL",
        )
    if client.sslmode not in _VERIFYING_MODES:
        return Check(
            "tls",
            "WARN",
            f"encrypted, but sslmode={client.sslmode} takes anybody for the server",
            "# add sslmode=verify-full and sslrootcert=... to OUTBOX_RELAY_DATABASE_URL",
        )
    return Check("tls", "OK", f"encrypted, sslmode={client.sslmode}")


def check_version(server: Server) -> Check:
    """Is it a version that the relay is tested on?"""
    major = server.version_number // 10_000
    finding = f"PostgreSQL {server.version}"
    if major < _OLDEST_VERSION:
        return Check("server version", "FAIL", f"{finding} is too old", f"# upgrade to {_OLDEST_VERSION} or newer")
    if major > _NEWEST_VERSION:
        return Check("server version", "WARN", f"{finding} is newer than this version of the relay is tested on")
    return Check("server version", "OK", finding)


def check_primary(server: Server) -> Check:
    """Can the relay write there?"""
    if server.is_replica:
        return Check(
            "primary",
            "FAIL",
            "only a replica answers, and the relay has to mark messages",
            "# name the primary in OUTBOX_RELAY_DATABASE_URL, or all servers: host=a,b",
        )
    if server.is_read_only:
        return Check(
            "primary",
            "FAIL",
            f"the transactions of role {server.role_name!r} are read-only",
            f"ALTER ROLE {_quoted(server.role_name)} IN DATABASE {_quoted(server.database_name)} "
            "SET default_transaction_read_only = off;",
        )
    return Check("primary", "OK", "the server takes writes")


def check_pooler(client: Client) -> Check:
    """
    Does a pooler stand between, and in which mode?

    A pooler invents the key for cancelling, so the session in it is not the one that answers. A session that changes
    between statements tells that transactions are pooled; one that does not tells nothing, as a pooler with nothing
    else to do gives back the same one.
    """
    if set(client.pids) == {client.key_pid}:
        return Check("pooler", "OK", "none: the server itself answers")
    if len(set(client.pids)) > 1:
        return Check("pooler", "OK", "one that pools transactions, which the relay can work behind")
    return Check(
        "pooler",
        "WARN",
        "one whose mode is UNKNOWN: the relay works behind session and transaction pooling, not statement pooling",
        "# look up pool_mode in its configuration",
    )


def check_clock(client: Client) -> Check:
    """Do the two machines agree on the time? The relay does not depend on it, whoever compares timestamps does."""
    ahead = client.clock_seconds
    if abs(ahead) <= _MOST_CLOCK_SECONDS:
        return Check("clock", "OK", f"{abs(ahead):.1f} s from the server's")
    side = "ahead of" if ahead > 0 else "behind"
    finding = f"this machine is {duration(abs(ahead))} {side} the server"
    return Check("clock", "WARN", finding, "timedatectl set-ntp true")


def check_tables(missing: Sequence[tuple[str | None, str]], *, schema: str) -> Check:
    """Are all tables and columns there? *missing* are the rows of `list_missing.sql`."""
    absent = sorted({name for name, _ in missing if name is not None})
    if absent:
        finding = f"schema {schema!r} has no {', '.join(absent)}"
        return Check("tables", "FAIL", finding, _migrate(schema))
    return Check("tables", "OK", f"complete in schema {schema!r}")


def check_grants(missing: Sequence[tuple[str | None, str]], *, server: Server) -> Check:
    """May the role do what a relay does?"""
    grants = [f"{grant};" for name, grant in missing if name is None]
    if not grants:
        return Check("grants", "OK", f"role {server.role_name!r} has what a relay needs")
    lacking = f"role {server.role_name!r} lacks privileges that a relay needs"
    if server.lacks_group:
        grant = f"GRANT outbox_relay TO {_quoted(server.role_name)};"
        return Check("grants", "FAIL", f"{lacking}: it is no member of outbox_relay", grant)
    return Check("grants", "FAIL", lacking, "\n".join(grants))


def check_migrations(states: Sequence[MigrationState], *, schema: str) -> Check:
    """Is the schema of this version?"""
    return _check_line(states, name="schema version", remedy=_migrate(schema))


def check_partition_migrations(states: Sequence[MigrationState], *, schema: str) -> Iterator[Check]:
    """Is a schema that has begun to be partitioned of this version, too?"""
    if any(state.state != "pending" for state in states):
        yield _check_line(states, name="schema version of partitions", remedy=f"{_migrate(schema)} --partitioned")


def check_defects(defects: Sequence[tuple[str, str]]) -> Iterator[Check]:
    """Has somebody changed the tables so that a relay refuses to start? The rows of `list_defects.sql`."""
    return _problems(defects, name="definitions", fine="nothing hides, diverts or forgets what a relay asks for")


def check_disagreements(disagreements: Sequence[tuple[str, str]]) -> Iterator[Check]:
    """Do numbers, marks and shards fit together? The rows of `list_disagreements.sql`."""
    return _problems(disagreements, name="numbers", fine="sequence, messages, marks and shards fit together")


def check_triggers(triggers: Sequence[Trigger]) -> Check:
    """May a trigger change or drop what applications write, or what relays settle and remove?"""
    if not triggers:
        return Check("triggers", "OK", "none changes or drops rows before they are written")
    named = ", ".join(f"{trigger.name} of {trigger.table_name}" for trigger in triggers)
    drops = [f"DROP TRIGGER {trigger.name} ON {trigger.table_name};" for trigger in triggers]
    return Check("triggers", "WARN", f"before a row is written, these may change or drop it: {named}", "\n".join(drops))


def check_indexes(found: Sequence[Index], *, schema: str) -> Iterator[Check]:
    """Is each index there, valid, and over what it should be?"""
    by_name = {(index.table_name, index.name): index for index in found}
    for (table, name), definition in INDEXES.items():
        check = f"index {name}"
        index = by_name.get((table, name))
        create = _create_index(table, name, schema=schema)
        if index is None:
            yield Check(check, "FAIL", "is missing", create)
        elif not index.is_valid:
            remedy = f"REINDEX INDEX CONCURRENTLY {_quoted(schema, name)};"
            yield Check(check, "FAIL", "is invalid, no query uses it", remedy)
        elif index.definition != definition:
            yield Check(check, "FAIL", f"is {index.definition}", f"{_drop_index(index, schema=schema)}\n{create}")
        else:
            yield Check(check, "OK", "is valid")


def check_plan(plan: Mapping[str, object], *, found: Sequence[Index], schema: str) -> Check:
    """Does a lane find the messages above its marks through the primary key, and not by reading published ones?"""
    name, expected = "plan of the lanes", "outbox_pkey"
    of_outbox = [index for index in found if index.table_name == "outbox"]
    whole = {part: index.name for index in of_outbox for part in index.parts}
    scans = [node for node in _nodes(plan) if _MESSAGES.fullmatch(str(node.get("Relation Name")))]
    used = {whole.get(str(node.get("Index Name")), node.get("Index Name")) for node in scans}
    if used <= {expected}:
        return Check(name, "OK", f"through {expected}")
    if not any(index.name == expected and index.is_valid for index in of_outbox):
        return Check(name, "FAIL", "reads published messages, for want of an index: see above")
    others = [index for index in of_outbox if index.name in used - {expected}]
    if others:
        finding = f"through {', '.join(index.name for index in others)}, and so reads published messages as well"
        return Check(name, "FAIL", finding, "\n".join(_drop_index(index, schema=schema) for index in others))
    finding = "reads published messages, because the statistics mislead the planner"
    return Check(name, "FAIL", finding, f"ANALYZE {_quoted(schema, 'outbox')};")


def check_partitions(found: Partitions, *, schema: str) -> Check:
    """Does somebody open the next partition in time?"""
    if found.overdue_seconds > _MOST_OVERDUE_SECONDS:
        finding = (
            f"the next one should have been opened {duration(found.overdue_seconds)} ago: neither a relay with a "
            "retention nor `outbox-relay prune` has run since, or an older transaction is still open"
        )
        return Check("partitions", "WARN", finding, f"SELECT {_quoted(schema, 'outbox_open_partition')}();")
    return Check("partitions", "OK", f"{found.partitions}, of them ahead: {found.ahead}")


def check_autovacuum(tables: Collection[Table], *, server: Server) -> Check:
    """Does vacuum come by itself, and as often as pruning messages and thinning marks needs?"""
    if not server.has_autovacuum:
        remedy = "ALTER SYSTEM SET autovacuum = on;\nALTER SYSTEM SET track_counts = on;\nSELECT pg_reload_conf();"
        return Check("autovacuum", "FAIL", "off on the whole server", remedy)
    off = [table for table in tables if not table.has_autovacuum]
    if off:
        resets = [f"ALTER TABLE {table.name} RESET (autovacuum_enabled);" for table in off]
        return Check("autovacuum", "FAIL", f"off for {_names(off)}", "\n".join(resets))
    unset = [table for table in tables if _absent_options(table)]
    if unset:
        finding = f"{_names(unset)} lacks settings of the migration and is vacuumed late"
        return Check("autovacuum", "WARN", finding, "\n".join(_set_options(table) for table in unset))
    return Check("autovacuum", "OK", "on, with the settings of the migration")


def check_dead_tuples(tables: Collection[Table]) -> Check:
    """Does vacuum keep up?"""
    behind = [table for table in tables if table.dead_tuples > max(_MANY_DEAD_TUPLES, table.live_tuples)]
    if behind:
        finding = ", ".join(f"{table.name} has {table.dead_tuples:,} beside {table.live_tuples:,}" for table in behind)
        remedy = "\n".join(f"VACUUM (ANALYZE) {table.name};" for table in behind)
        return Check("dead tuples", "WARN", f"{finding} live ones: vacuum does not keep up", remedy)
    return Check("dead tuples", "OK", f"{sum(table.dead_tuples for table in tables):,}")


def check_durability(tables: Collection[Table], settings: Sequence[tuple[str, str]]) -> Check:
    """May a crash of the server take back what is in Kafka, or empty a table? *settings*: `doctor_settings.sql`."""
    unlogged = [table for table in tables if not table.is_logged]
    if unlogged:
        finding = f"a crash of the server empties {_names(unlogged)}"
        remedy = "\n".join(f"ALTER TABLE {table.name} SET LOGGED;" for table in unlogged)
        return Check("durability", "FAIL", finding, remedy)
    if settings:
        named = ", ".join(name for name, _ in settings)
        finding = f"a crash of the server may take back a transaction whose message is in Kafka: {named}"
        return Check("durability", "WARN", finding, "\n".join(remedy for _, remedy in settings))
    return Check("durability", "OK", "what is committed survives a crash of the server")


def check_size(tables: Collection[Table]) -> Check:
    """Has somebody forgotten to prune?"""
    total_bytes = sum(table.total_bytes for table in tables)
    finding = f"{total_bytes / 2**20:,.1f} MiB with indexes"
    if total_bytes > _MANY_BYTES:
        finding = f"{finding}: published messages are kept for too long"
        return Check("table size", "WARN", finding, "outbox-relay prune --older-than 7d")
    return Check("table size", "OK", finding)


def check_wraparound(tables: Collection[Table], *, server: Server) -> Check:
    """How far is the server from refusing writes because vacuum has not frozen old rows?"""
    many = min(2 * server.freeze_max_age, _FAILSAFE_AGE // 2)
    old = [table for table in tables if max(table.xid_age, table.multixact_age) > many]
    oldest = max([server.xid_age, server.multixact_age, *(max(table.xid_age, table.multixact_age) for table in old)])
    finding = f"oldest row of the database is {oldest:,} transactions old"
    if oldest <= many:
        return Check("xid age", "OK", finding)
    remedy = "\n".join(f"VACUUM (FREEZE) {table.name};" for table in old) or "VACUUM (FREEZE);"
    return Check("xid age", "FAIL" if oldest > _FAILSAFE_AGE else "WARN", f"{finding}, of 2,100,000,000", remedy)


def check_prepared(transactions: Sequence[OpenTransaction]) -> Check:
    """Has somebody forgotten a prepared transaction? It holds its locks, and back vacuum, over restarts too."""
    prepared = [transaction for transaction in transactions if transaction.gid]
    if not prepared:
        return Check("prepared transactions", "OK", "none has been forgotten")
    return Check("prepared transactions", "FAIL", who(prepared), how_to_end_all(prepared))


def check_long_transactions(transactions: Sequence[OpenTransaction], *, server: Server) -> Check:
    """Does a session keep a transaction open, so that vacuum must leave what it may still see?"""
    long = [transaction for transaction in transactions if not transaction.gid]
    if long:
        return Check("long transactions", "WARN", who(long), how_to_end_all(long))
    if not server.sees_all_sessions:
        grant = f"GRANT pg_read_all_stats TO {_quoted(server.role_name)};"
        return Check("long transactions", "WARN", "the sessions of other roles cannot be seen", grant)
    return Check("long transactions", "OK", "none")


def check_slots(slots: Sequence[Slot]) -> Check:
    """Does a replication slot without a reader keep the log, and old rows, until the disk is full?"""
    if not slots:
        return Check("replication slots", "OK", "each is being read")
    kept = "; ".join(
        f"{slot.slot_name} keeps {slot.kept_bytes / 2**20:,.1f} MiB of log, and rows that died in the last"
        f" {slot.held_transactions:,} transactions"
        for slot in slots
    )
    remedy = "\n".join(f"SELECT pg_drop_replication_slot('{slot.slot_name}');" for slot in slots)
    return Check("replication slots", "WARN", f"not read by anybody: {kept}", remedy)


def _nodes(plan: Mapping[str, object]) -> Iterator[Mapping[str, object]]:
    yield plan
    for child in cast("Sequence[Mapping[str, object]]", plan.get("Plans", ())):
        yield from _nodes(child)


def _problems(rows: Sequence[tuple[str, str]], *, name: str, fine: str) -> Iterator[Check]:
    """Yield a check for each problem; behind its statement a remedy may have advice, which cannot be pasted."""
    for problem, remedy in rows:
        pasted, *advice = _ADVICE.split(remedy, maxsplit=1)
        yield Check(name, "FAIL", "; ".join([problem, *advice]), f"{pasted};")
    if not rows:
        yield Check(name, "OK", fine)


def _create_index(table: str, name: str, *, schema: str) -> str:
    definition = INDEXES[table, name]
    if name.endswith("_pkey"):
        columns = definition.removeprefix("btree ")
        return f"ALTER TABLE {_quoted(schema, table)} ADD CONSTRAINT {name} PRIMARY KEY {columns};"
    return f"CREATE INDEX CONCURRENTLY {name} ON {_quoted(schema, table)} USING {definition};"


def _drop_index(index: Index, *, schema: str) -> str:
    """Drop it without blocking anybody where PostgreSQL can: not a constraint, nor that of a partitioned table."""
    if index.is_primary:
        return f"ALTER TABLE {_quoted(schema, index.table_name)} DROP CONSTRAINT {_quoted(index.name)};"
    return f"DROP INDEX{'' if index.is_partitioned else ' CONCURRENTLY'} {_quoted(schema, index.name)};"


def _quoted(*names: str) -> str:
    return Identifier(*names).as_string()


def _check_line(states: Sequence[MigrationState], *, name: str, remedy: str) -> Check:
    pending = [str(state) for state in states if state.state == "pending"]
    unknown = [str(state) for state in states if state.state == "unknown"]
    if len(pending) == len(states):
        return Check(name, "OK", "not recorded: another tool applied the migrations")
    if pending:
        finding = f"older than this version: waits for {', '.join(pending)}"
        return Check(name, "FAIL", finding, remedy)
    if unknown:
        finding = f"newer than this version: has {', '.join(unknown)}"
        return Check(name, "WARN", finding, "pip install --upgrade 'outbox-relay[daemon]'")
    return Check(name, "OK", str(states[-1]))


def _migrate(schema: str) -> str:
    return f"outbox-relay migrate apply --schema {schema}"


def _absent_options(table: Table) -> list[str]:
    options = VACUUM_OPTIONS.get(table.table_name, {})
    return [f"{name} = {value}" for name, value in options.items() if name not in table.options]


def _set_options(table: Table) -> str:
    return f"ALTER TABLE {table.name} SET ({', '.join(_absent_options(table))});"


def _names(tables: Collection[Table]) -> str:
    return ", ".join(table.name for table in tables)
