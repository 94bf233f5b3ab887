"""The checks of PostgreSQL: each a function of what one question returned, with no connection of its own."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from psycopg.sql import Identifier

from outbox_relay.operate.doctor.check import Check, duration
from outbox_relay.operate.status import how_to_end

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from outbox_relay.operate.migrate import MigrationState
    from outbox_relay.relay.horizon import OpenTransaction

_OLDEST_VERSION, _NEWEST_VERSION = 14, 18
_MOST_CLOCK_SECONDS = 5.0
_MOST_OVERDUE_SECONDS = 3600.0
_MESSAGES = re.compile(r"outbox(_p\d+)?")  # the table, or its partitions
_MANY_DEAD_TUPLES = 100_000
_MANY_BYTES = 100 * 2**30
_FAILSAFE_AGE = 1_600_000_000  # where vacuum drops everything else; at 2^31 the server takes no more writes
_VERIFYING_MODES = frozenset({"verify-ca", "verify-full"})

# Both as pg_get_indexdef has them, so that they can be compared, and pasted.
INDEXES: Mapping[str, str] = {
    "outbox_unpublished_idx": "btree (shard, sequence_no) WHERE ((published_at IS NULL) AND (parked_at IS NULL))",
    "outbox_parked_idx": ("btree (shard, aggregate_type, aggregate_id, sequence_no) WHERE (parked_at IS NOT NULL)"),
}

# As the migration sets them; another value than ours is somebody's decision.
VACUUM_OPTIONS: Mapping[str, str] = {
    "autovacuum_vacuum_scale_factor": "0.05",
    "autovacuum_vacuum_threshold": "10000",
    "autovacuum_vacuum_insert_scale_factor": "0.1",
    "autovacuum_analyze_scale_factor": "0.05",
    "autovacuum_analyze_threshold": "10000",
    "autovacuum_vacuum_cost_delay": "1",
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
    """The columns of `doctor_tables.sql`, `name` is quoted and has its schema."""

    name: str
    holds_messages: bool
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


def check_indexes(found: Sequence[Index], *, schema: str) -> Iterator[Check]:
    """Is each index there, valid, and over what it should be?"""
    by_name = {index.name: index for index in found}
    concurrently = _concurrently(found)
    for name, definition in INDEXES.items():
        check = f"index {name}"
        index = by_name.get(name)
        create = f"CREATE INDEX{concurrently} {name} ON {_quoted(schema, 'outbox')} USING {definition};"
        if index is None:
            yield Check(check, "FAIL", "is missing", create)
        elif not index.is_valid:
            remedy = f"REINDEX INDEX CONCURRENTLY {_quoted(schema, name)};"
            yield Check(check, "FAIL", "is invalid, no query uses it", remedy)
        elif index.definition != definition:
            drop = f"DROP INDEX{concurrently} {_quoted(schema, name)};"
            yield Check(check, "FAIL", f"is {index.definition}", f"{drop}\n{create}")
        else:
            yield Check(check, "OK", "is valid")


def check_plan(plan: Mapping[str, object], *, found: Sequence[Index], schema: str) -> Check:
    """Does a claim find messages through the partial index, and not by reading those that are published?"""
    whole = {part: index.name for index in found for part in index.parts}
    scans = [node for node in _nodes(plan) if _MESSAGES.fullmatch(str(node.get("Relation Name")))]
    used = {whole.get(str(node.get("Index Name")), node.get("Index Name")) for node in scans}
    if used <= INDEXES.keys():
        return Check("plan of the claim", "OK", "through outbox_unpublished_idx")
    usable = {index.name for index in found if index.is_valid}
    if not usable >= INDEXES.keys():
        return Check("plan of the claim", "FAIL", "reads published messages, for want of an index: see above")
    others = [index for index in found if index.name in used - INDEXES.keys() and not index.is_primary]
    if others:
        finding = f"through {', '.join(index.name for index in others)}, and so reads published messages as well"
        drop = f"DROP INDEX{_concurrently(found)}"
        remedy = "\n".join(f"{drop} {_quoted(schema, index.name)};" for index in others)
        return Check("plan of the claim", "FAIL", finding, remedy)
    finding = "reads published messages, because the statistics mislead the planner"
    return Check("plan of the claim", "FAIL", finding, f"ANALYZE {_quoted(schema, 'outbox')};")


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
    """Does vacuum come by itself, and as often as marking each message once needs?"""
    if not server.has_autovacuum:
        remedy = "ALTER SYSTEM SET autovacuum = on;\nALTER SYSTEM SET track_counts = on;\nSELECT pg_reload_conf();"
        return Check("autovacuum", "FAIL", "off on the whole server", remedy)
    off = [table for table in tables if not table.has_autovacuum]
    if off:
        resets = [f"ALTER TABLE {table.name} RESET (autovacuum_enabled);" for table in off]
        return Check("autovacuum", "FAIL", f"off for {_names(off)}", "\n".join(resets))
    unset = [table for table in tables if table.holds_messages and VACUUM_OPTIONS.keys() - table.options.keys()]
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
    return Check("prepared transactions", "FAIL", _who(prepared), _ends(prepared))


def check_long_transactions(transactions: Sequence[OpenTransaction], *, server: Server) -> Check:
    """Does a session keep a transaction open, so that vacuum must leave what it may still see?"""
    long = [transaction for transaction in transactions if not transaction.gid]
    if long:
        return Check("long transactions", "WARN", _who(long), _ends(long))
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


def check_horizon(writers: Sequence[OpenTransaction], *, ordering_timeout: float) -> Check:
    """Does a writer hold up the messages of everybody else?"""
    holders = [writer for writer in writers if writer.age_seconds > ordering_timeout]
    if holders:
        return Check("horizon", "FAIL", f"held by {_who(holders)}", _ends(holders))
    return Check("horizon", "OK", f"free; writers at work: {len(writers)}")


def _nodes(plan: Mapping[str, object]) -> Iterator[Mapping[str, object]]:
    yield plan
    for child in cast("Sequence[Mapping[str, object]]", plan.get("Plans", ())):
        yield from _nodes(child)


def _concurrently(found: Collection[Index]) -> str:
    """Say it where PostgreSQL can: not of the index of a partitioned table."""
    return "" if any(index.is_partitioned for index in found) else " CONCURRENTLY"


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


def _set_options(table: Table) -> str:
    absent = [f"{name} = {value}" for name, value in VACUUM_OPTIONS.items() if name not in table.options]
    return f"ALTER TABLE {table.name} SET ({', '.join(absent)});"


def _names(tables: Collection[Table]) -> str:
    return ", ".join(table.name for table in tables)


def _who(transactions: Sequence[OpenTransaction]) -> str:
    return "; ".join(
        f"{transaction.gid or f'pid {transaction.pid}'} ({transaction.application_name or transaction.role_name}, "
        f"{transaction.state}) for {duration(transaction.age_seconds)}"
        for transaction in transactions
    )


def _ends(transactions: Sequence[OpenTransaction]) -> str:
    return "\n".join(how_to_end(transaction) for transaction in transactions)
