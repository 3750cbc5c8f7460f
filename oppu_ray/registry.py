"""The database beside the vault's folders: which version is current, who may train, who may ask, what was done.

train_pack -> vault.commit -> **registry** -> inference. In: keyed hashes of users, never ids or text. Out: `Version`,
`Lease`, `Token`, `Entry`. SQLite in WAL mode by default (not on a network disk), PostgreSQL by URL.

A reader might question that every write takes one lock (SQLite's `BEGIN IMMEDIATE`, an advisory lock in PostgreSQL). It
makes each check-then-write below plainly correct, keeps the audit chain in order, and costs a millisecond per trained
user; readers never wait. Fences are numbers from one counter that never goes back, so a job that lost its lease, or
whose user was forgotten, can never publish, however late it wakes up.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any
from urllib.parse import quote

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from oppu_ray.core import InputError

PAGE = 10_000
"""Rows read at once where all are walked."""
BUSY_S = 30  # a write takes milliseconds, but a queue of workers before a slow disk may take seconds
CONNECT_S = 5
ROLES = ("user", "operator", "reader")
_WRITE_LOCK = 0x6F707075
_TOKEN_ID = re.compile(r"[0-9a-f]{16}")
_TOKEN = re.compile(r"oppu_([0-9a-f]{16})_([A-Za-z0-9_-]{43})")

_META = sa.MetaData()
_SCHEMA = sa.Table("schema", _META, sa.Column("version", sa.Integer, primary_key=True))
_USERS = sa.Table(
    "users",
    _META,
    sa.Column("user_hash", sa.String(64), primary_key=True),
    sa.Column("current", sa.String(64)),
    sa.Column("created_at", sa.Double, nullable=False),
    # Number of the audit line that added the user or forgot something of theirs: never used twice, also not by a user
    # who was forgotten and comes again.
    sa.Column("generation", sa.Integer, nullable=False, server_default="0"),
    # Counts the changes of the history; NULL: its segments are not listed yet (a vault made with schema 1).
    sa.Column("history_version", sa.Integer),
    sa.Column("key_check", sa.String(64)),
    # What all versions that were ever released have cost of the user's privacy (zero-concentrated DP): versions that
    # are removed, quarantined or rolled back stay in the sum.
    sa.Column("rho", sa.Double, nullable=False, server_default="0"),
)
# The user's history in order: file `name` holds `num_items` items. `ids`: 16 bytes of each item's keyed hash.
_SEGMENTS = sa.Table(
    "segments",
    _META,
    sa.Column("user_hash", sa.String(64), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("name", sa.String(80), nullable=False),
    sa.Column("num_items", sa.Integer, nullable=False),
    sa.Column("num_bytes", sa.BigInteger, nullable=False),
    sa.Column("ids", sa.LargeBinary, nullable=False),
)
# What is true of the whole vault and must not be guessed from its folder: is it sealed, which key file is its own.
_FACTS = sa.Table(
    "facts",
    _META,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
)
# Processes that hold copies of users' data: the newest audit line that each has obeyed, and how long it counts.
_FOLLOWERS = sa.Table(
    "followers",
    _META,
    sa.Column("name", sa.String(200), primary_key=True),
    sa.Column("seen", sa.Integer, nullable=False),
    sa.Column("expires_at", sa.Double, nullable=False),
)
_VERSIONS = sa.Table(
    "versions",
    _META,
    sa.Column("user_hash", sa.String(64), primary_key=True),
    sa.Column("version", sa.String(64), primary_key=True),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("base_fingerprint", sa.Text, nullable=False),
    sa.Column("manifest_sha256", sa.String(64), nullable=False),
    sa.Column("run_id", sa.Text, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("is_good", sa.Boolean, nullable=False),
)
_UNITS = sa.Table(
    "units",
    _META,
    sa.Column("run_id", sa.Text, primary_key=True),
    sa.Column("user_hash", sa.String(64), primary_key=True, index=True),
    sa.Column("version", sa.String(64), nullable=False),
)
_LEASES = sa.Table(
    "leases",
    _META,
    sa.Column("fence", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("user_hash", sa.String(64), nullable=False, unique=True),
    sa.Column("holder", sa.Text, nullable=False),
    sa.Column("expires_at", sa.Double, nullable=False),
    sqlite_autoincrement=True,
)
_TOKENS = sa.Table(
    "tokens",
    _META,
    sa.Column("token_id", sa.String(16), primary_key=True),
    sa.Column("role", sa.String(16), nullable=False),
    sa.Column("user_hash", sa.String(64), index=True),
    sa.Column("digest", sa.String(64), nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("expires_at", sa.Double),
    sa.Column("revoked_at", sa.Double),
)
_RECEIPTS = sa.Table(
    "receipts",
    _META,
    sa.Column("receipt_id", sa.String(32), primary_key=True),
    sa.Column("user_hash", sa.String(64), nullable=False, index=True),
    sa.Column("body", sa.Text, nullable=False),
)
_AUDIT = sa.Table(
    "audit",
    _META,
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("time", sa.Double, nullable=False),
    sa.Column("action", sa.String(32), nullable=False),
    sa.Column("user_hash", sa.String(64), index=True),
    sa.Column("detail", sa.Text, nullable=False),
    sa.Column("chain", sa.String(64), nullable=False),
)
_OF_USERS = (_USERS, _SEGMENTS, _VERSIONS, _UNITS, _LEASES, _TOKENS)
"""All rows of a user but receipts and the audit log."""

# A new registry is made from the tables above, at the newest schema; MIGRATIONS[i] brings schema i + 1 to i + 2.
# Tables that a migration does not name are made as above.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        "ALTER TABLE users ADD COLUMN generation INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE users ADD COLUMN history_version INTEGER",
        "ALTER TABLE users ADD COLUMN key_check VARCHAR(64)",
        "ALTER TABLE users ADD COLUMN rho DOUBLE PRECISION NOT NULL DEFAULT 0",
    ),
)


class UserHash(str):
    """A user's keyed hash, for callers that hold no id (a verified token). A plain str is always taken as an id."""


class RegistryError(ValueError):
    """The database could not be reached, read or written."""


class Refused(ValueError):
    """A definite no (lease held or lost, `current` moved, run already done): nothing was written."""


class Forgotten(Refused):
    """The user is not there, or was forgotten, or items of theirs, since the caller began."""


class HistoryChanged(Refused):
    """Another process changed the history since it was read: read it again and go on."""


@dataclass(frozen=True)
class Version:
    """One registered adapter version. `created_at` in Unix seconds; not `is_good` means quarantined."""

    user_hash: str
    version: str
    number: int
    base_fingerprint: str
    manifest_sha256: str
    run_id: str
    created_at: float
    is_good: bool = True


@dataclass(frozen=True)
class User:
    """One line of the list of users. `created_at` in Unix seconds; quarantined versions count."""

    user_hash: UserHash
    current: str | None
    created_at: float
    num_versions: int


@dataclass(frozen=True)
class Listed:
    """What the registry lists of some users, to compare with their folders.

    Args:
        users: All of them.
        unlisted: Those whose segments are not listed yet (a vault made with schema 1).
        files: (user hash, version or name of a segment).
    """

    users: frozenset[str]
    unlisted: frozenset[str]
    files: frozenset[tuple[str, str]]


@dataclass(frozen=True)
class Segment:
    """One file of a user's history.

    Args:
        number: Its place, from 1; numbers may have gaps.
        name: Of the file in the user's history folder.
        num_bytes: Of its items as JSON lines.
        ids: The first 16 bytes of each item's keyed hash, in order, joined.
    """

    number: int
    name: str
    num_items: int
    num_bytes: int
    ids: bytes


@dataclass(frozen=True)
class History:
    """A user's history as listed in the registry, read in one transaction.

    Args:
        generation: Changes when something of the user is forgotten, and when a forgotten user comes again.
        version: Changes with every change of the history; None: a vault of schema 1, segments not listed yet.
        segments: In order.
    """

    generation: int
    version: int | None
    segments: tuple[Segment, ...]

    @property
    def num_items(self) -> int:
        return sum(segment.num_items for segment in self.segments)

    @property
    def num_bytes(self) -> int:
        return sum(segment.num_bytes for segment in self.segments)


@dataclass(frozen=True)
class Lease:
    """The right to train one user until `expires_at`; `fence` is larger than that of every lease before."""

    user_hash: str
    holder: str
    fence: int
    expires_at: float


@dataclass(frozen=True)
class Token:
    """Who a bearer token speaks for. `user_hash` is None for operators and readers. Times in Unix seconds.

    `generation`: the user's when the token was verified, for writes that must not outlive a forgetting.
    """

    token_id: str
    role: str
    user_hash: UserHash | None
    created_at: float
    expires_at: float | None
    revoked_at: float | None
    generation: int | None = None


@dataclass(frozen=True)
class Follower:
    """A process that may hold copies of users' data: the newest audit line that it has obeyed. Times in Unix seconds.

    After `expires_at` it is dead, or it answers nobody until it has read the log (`following.Following`).
    """

    name: str
    seen: int
    expires_at: float


@dataclass(frozen=True)
class Entry:
    """One line of the audit log; `chain` is the keyed hash over this line and the one before."""

    number: int
    time: float
    action: str
    user_hash: str | None
    detail: str
    chain: str


class Registry:
    """See the module's docstring. One per process; safe to share between threads.

    Args:
        url: SQLAlchemy URL, e.g. "sqlite:////data/vault/registry.sqlite" or "postgresql://host/name".
        chain_key: Key of the audit chain, so that who can write to the database alone cannot rewrite the log.
        clock: Unix seconds.
        create: Make a registry where there is none; otherwise that is an error.
    """

    def __init__(
        self, url: str, chain_key: bytes, clock: Callable[[], float] = time.time, *, create: bool = True
    ) -> None:
        self._chain_key = chain_key
        self._clock = clock
        self.written_revision = 0  # the newest that this process has written
        self._url = sa.make_url(url)
        if self._url.get_backend_name() == "sqlite":
            self._engine = sa.create_engine(self._sqlite_url(create), connect_args={"timeout": BUSY_S})
            sa.event.listen(self._engine, "connect", _prepare_sqlite)
            sa.event.listen(self._engine, "begin", _begin_sqlite)
            self._reader = self._engine.execution_options(read_only=True)
        elif self._url.get_backend_name() == "postgresql":
            options = {"options": f"-c lock_timeout={BUSY_S}s", "connect_timeout": CONNECT_S}
            driver = self._url.set(drivername="postgresql+psycopg")
            self._engine = sa.create_engine(driver, connect_args=options, pool_pre_ping=True)
            self._reader = self._engine.execution_options(isolation_level="AUTOCOMMIT")
        else:
            raise ValueError(f"registry_url {self._shown}: expected sqlite:///... or postgresql://...")
        self._migrate(create)

    def close(self) -> None:
        """Close the pooled connections."""
        self._engine.dispose()

    # ---- users and versions

    def add_users(self, user_hashes: Iterable[str], lease: Lease | None = None) -> int:
        """Register users that are not yet; returns how many were new.

        Args:
            lease: Of the job that adds them. A job never brings back a user who was forgotten.

        Raises:
            Refused: A user is new and under a lease of another; or `lease` was lost, or the user was forgotten.
        """
        wanted = set(user_hashes)
        with self._read() as connection:
            if lease is not None:
                _check_held(connection, lease)
            missing = wanted - _present(connection, _USERS.c.user_hash, wanted)
        if not missing:
            return 0
        with self._write() as connection:
            if lease is not None:
                _check_held(connection, lease)
            missing -= _present(connection, _USERS.c.user_hash, missing)
            of_others = (_LEASES.c.expires_at > self._clock(), _LEASES.c.fence != (lease.fence if lease else 0))
            if held := _present(connection, _LEASES.c.user_hash, missing, *of_others):
                raise Refused(f"user {min(held)[:12]}: is being added or swept by another process; try again")
            if lease is not None:
                _check_not_forgotten(connection, missing)
            if missing:
                self._add(connection, missing)
        return len(missing)

    def has_user(self, user_hash: str) -> bool:
        with self._read() as connection:
            return bool(_present(connection, _USERS.c.user_hash, {user_hash}))

    def gone_users(self, user_hashes: Iterable[str]) -> set[str]:
        """Which of these users were forgotten and not added again."""
        with self._read() as connection:
            forgotten = _present(connection, _AUDIT.c.user_hash, set(user_hashes), *_WHOLE)
            return forgotten - _present(connection, _USERS.c.user_hash, forgotten)

    def users(self) -> list[User]:
        """All users, oldest first."""
        with self._read() as connection:
            rows = connection.execute(_USER.order_by(_USERS.c.created_at, _USERS.c.user_hash))
            return [User(UserHash(row[0]), *row[1:]) for row in rows]

    def users_after(self, user_hash: str = "", limit: int = PAGE) -> list[User]:
        """The next users in the order of their hashes, after this hash: for walks over all of them."""
        with self._read() as connection:
            chosen = _USER.where(_USERS.c.user_hash > user_hash).order_by(_USERS.c.user_hash).limit(limit)
            return [User(UserHash(row[0]), *row[1:]) for row in connection.execute(chosen)]

    def hashes(self) -> Iterator[UserHash]:
        """The hashes of all users, in order, read page by page."""
        page = [UserHash("")]
        while page:
            chosen = sa.select(_USERS.c.user_hash).where(_USERS.c.user_hash > page[-1])
            with self._read() as connection:
                found = connection.scalars(chosen.order_by(_USERS.c.user_hash).limit(PAGE))
                page = [UserHash(user_hash) for user_hash in found]
            yield from page

    def find_users(self, digits: str) -> list[UserHash]:
        """The users whose hashes begin with these hex digits."""
        with self._read() as connection:
            chosen = sa.select(_USERS.c.user_hash).where(_begins(_USERS, digits))
            return [UserHash(found) for found in connection.scalars(chosen)]

    def listed(self, digits: str) -> Listed:
        """What is listed of the users whose hashes begin with these hex digits."""
        with self._read() as connection:
            chosen = sa.select(_USERS.c.user_hash, _USERS.c.history_version).where(_begins(_USERS, digits))
            users = connection.execute(chosen).all()
            files = set[tuple[str, str]]()
            for table, name in ((_VERSIONS, _VERSIONS.c.version), (_SEGMENTS, _SEGMENTS.c.name)):
                found = connection.execute(sa.select(table.c.user_hash, name).where(_begins(table, digits)))
                files.update((row[0], row[1]) for row in found)
        unlisted = frozenset(row.user_hash for row in users if row.history_version is None)
        return Listed(frozenset(row.user_hash for row in users), unlisted, frozenset(files))

    def has_files(self, user_hash: str | None = None) -> bool:
        """Whether versions or segments of a user (or of anyone) are listed."""
        with self._read() as connection:
            for table in (_VERSIONS, _SEGMENTS):
                chosen = sa.select(sa.literal(1)).select_from(table).limit(1)
                if user_hash is not None:
                    chosen = chosen.where(table.c.user_hash == user_hash)
                if connection.scalar(chosen):
                    return True
        return False

    def current(self, user_hash: str) -> Version | None:
        """The version that answers for this user, or None. One indexed query, whatever the number of users."""
        with self._read() as connection:
            row = connection.execute(_CURRENT, {"wanted": user_hash}).first()
        return None if row is None else Version(**row._mapping)

    def version(self, user_hash: str, version: str) -> Version | None:
        """One version, quarantined or not, or None."""
        with self._read() as connection:
            row = connection.execute(_VERSION, {"wanted": user_hash, "version": version}).first()
        return None if row is None else Version(**row._mapping)

    def versions(self, user_hash: str | None = None) -> list[Version]:
        """All versions of a user (or of everyone), quarantined ones too, oldest first."""
        chosen = sa.select(_VERSIONS).order_by(_VERSIONS.c.number, _VERSIONS.c.created_at)
        if user_hash is not None:
            chosen = chosen.where(_VERSIONS.c.user_hash == user_hash)
        with self._read() as connection:
            return [Version(**row._mapping) for row in connection.execute(chosen)]

    def newest_version(self) -> Version | None:
        """The version that was published last, of anyone."""
        with self._read() as connection:
            row = connection.execute(sa.select(_VERSIONS).order_by(_VERSIONS.c.created_at.desc()).limit(1)).first()
        return None if row is None else Version(**row._mapping)

    def rho(self, user_hash: str) -> float:
        """What all versions ever released have cost of a user's privacy (zero-concentrated DP); 0 if there is none."""
        with self._read() as connection:
            return connection.scalar(sa.select(_USERS.c.rho).where(_USERS.c.user_hash == user_hash)) or 0.0

    def publish(
        self,
        lease: Lease,
        version: Version,
        expected: str | None,
        make_current: bool = True,
        rho: tuple[float, float] | None = None,
    ) -> None:
        """Record a version and, unless told not to, make it current, in one transaction; adds the user if new.

        Args:
            rho: Where it was trained under noise: what the user's versions have cost before it, and with it.

        Raises:
            Refused: The lease was lost, `current` is no longer `expected`, the run has committed this user, or another
                version was released meanwhile, so that `rho` is too low.
        """
        with self._listing() as connection:
            _check_held(connection, lease)
            self._publish(connection, version, expected, make_current, rho)

    def import_user(
        self,
        lease: Lease,
        segments: Sequence[Segment],
        version: Version | None,
        rho: float = 0.0,
        key_check: str | None = None,
    ) -> None:
        """Add a user whole, in one transaction: the list of their history, and their current version if there is one.

        Args:
            rho: What their versions have cost of their privacy where they come from.
            key_check: Of the user's key, in a sealed vault.

        Raises:
            Refused: The lease was lost, or the user exists.
        """
        user_hash = lease.user_hash
        with self._listing() as connection:
            _check_held(connection, lease)
            if _present(connection, _USERS.c.user_hash, {user_hash}):
                raise Refused(f"user {user_hash[:12]}: exists already; an import makes a new user")
            self._add(connection, {user_hash})
            connection.execute(sa.update(_USERS).where(_USERS.c.user_hash == user_hash).values(key_check=key_check))
            if segments:
                rows = [{"user_hash": user_hash, **asdict(segment)} for segment in segments]
                connection.execute(sa.insert(_SEGMENTS), rows)
            if version is not None:
                self._publish(connection, version, None, True, (0.0, rho))

    def use(self, user_hash: str, version: str, expected: str | None) -> None:
        """Make a good version current. `Refused` when `current` is no longer `expected`, ValueError if not good."""
        with self._write() as connection:
            good = sa.select(_VERSIONS.c.is_good)
            if not connection.scalar(good.where(_VERSIONS.c.user_hash == user_hash, _VERSIONS.c.version == version)):
                raise ValueError(f"user {user_hash[:12]}: version {version!r} is unknown or quarantined")
            current = connection.scalar(sa.select(_USERS.c.current).where(_USERS.c.user_hash == user_hash))
            self._move(connection, user_hash, current, expected, version)
            self._audit(connection, "use", user_hash, {"version": version, "before": expected})

    def quarantine(self, user_hash: str, version: str, reason: str) -> bool:
        """Mark a version bad; if it was current, the newest good one of the same base takes its place (or none).

        False if there is no such version, or it was marked before.
        """
        mine = _VERSIONS.c.user_hash == user_hash
        with self._write() as connection:
            bad = connection.execute(sa.select(_VERSIONS).where(mine, _VERSIONS.c.version == version)).first()
            if bad is None or not bad.is_good:
                return False
            connection.execute(sa.update(_VERSIONS).where(mine, _VERSIONS.c.version == version).values(is_good=False))
            others = (mine, _VERSIONS.c.is_good, _VERSIONS.c.base_fingerprint == bad.base_fingerprint)
            self._repoint(connection, user_hash, {version}, *others)
            self._audit(connection, "quarantine", user_hash, {"version": version, "reason": reason})
        return True

    def delete_versions(self, user_hash: str, versions: set[str], items: Sequence[str]) -> int:
        """Drop versions and what runs they finished; `current` falls back to the newest good one left, or none.

        Ends any lease too: a job that trains on what is being forgotten must not publish. The log says which `items`,
        by their keyed hashes, are to be forgotten; the number of that line is returned.
        """
        mine = _VERSIONS.c.user_hash == user_hash
        with self._listing() as connection:
            for table in (_VERSIONS, _UNITS):
                chosen = (table.c.user_hash == user_hash, table.c.version.in_(versions))
                connection.execute(sa.delete(table).where(*chosen))
            connection.execute(sa.delete(_LEASES).where(_LEASES.c.user_hash == user_hash))
            self._repoint(connection, user_hash, versions, mine, _VERSIONS.c.is_good)
            generation = self._audit(connection, "forget", user_hash, {"versions": sorted(versions), "items": items})
            mine = _USERS.c.user_hash == user_hash
            connection.execute(sa.update(_USERS).where(mine).values(generation=generation))
            return generation

    def drop_old_versions(self, user_hash: str, keep: int) -> list[str]:
        """Drop all but the newest `keep` versions of a user; returns the dropped ones.

        The current version stays, and so does one that a run has committed: the run is evaluated with it.
        """
        mine = _VERSIONS.c.user_hash == user_hash
        with self._listing() as connection:
            newest = sa.select(_VERSIONS.c.version).where(mine).order_by(_VERSIONS.c.number.desc()).limit(keep)
            kept = set(connection.scalars(newest))
            kept.update(connection.scalars(sa.select(_UNITS.c.version).where(_UNITS.c.user_hash == user_hash)))
            kept.add(connection.scalar(sa.select(_USERS.c.current).where(_USERS.c.user_hash == user_hash)))
            dropped = sorted(set(connection.scalars(sa.select(_VERSIONS.c.version).where(mine))) - kept)
            if dropped:
                connection.execute(sa.delete(_VERSIONS).where(mine, _VERSIONS.c.version.in_(dropped)))
                self._audit(connection, "drop_versions", user_hash, {"versions": dropped})
        return dropped

    def delete_user(self, user_hash: str) -> int:
        """Drop every row of a user but receipts and the audit log; returns the number of the audit line. Idempotent."""
        with self._listing() as connection:
            for table in _OF_USERS:
                connection.execute(sa.delete(table).where(table.c.user_hash == user_hash))
            return self._audit(connection, "forget", user_hash, {})

    def drop_old_pages(self) -> bool:
        """Make the database's files lose deleted rows; False if the database keeps some for now.

        SQLite overwrites deleted rows, but its log file has the pages from before until it is cut to zero, which a
        reader in another process can put off. PostgreSQL removes them in its own time.
        """
        if self._url.get_backend_name() != "sqlite":
            return False
        with self._read() as connection:
            connection.rollback()
            row = connection.connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            return row[0] == 0

    def num_rows(self, user_hash: str) -> int:
        """How many rows speak of a user, receipts and audit log aside."""
        with self._read() as connection:
            counts = [sa.select(sa.func.count()).where(table.c.user_hash == user_hash) for table in _OF_USERS]
            return sum(connection.scalar(count) or 0 for count in counts)

    # ---- histories

    def history(self, user_hash: str) -> History:
        """The list of a user's segments. `Forgotten` if there is no such user."""
        with self._read() as connection:
            return _history(connection, user_hash)

    def change_history(
        self, user_hash: str, before: History, segments: Sequence[Segment], lease: Lease | None = None
    ) -> History:
        """Replace the list of segments; returns the new one.

        Args:
            before: As read before the change.
            lease: Under which the user is worked on, if one is held.

        Raises:
            Refused: The user was forgotten, or something of theirs, since `before` was read; the history was changed
                by another process; or the lease was lost.
        """
        mine = _SEGMENTS.c.user_hash == user_hash
        with self._listing() as connection:
            if lease is not None:
                _check_held(connection, lease)
            _check_generation(connection, user_hash, before.generation)
            if _history(connection, user_hash).version != before.version:
                raise HistoryChanged(f"user {user_hash[:12]}: the history was changed by another process; try again")
            after = History(before.generation, (before.version or 0) + 1, tuple(segments))
            kept = {segment.number for segment in before.segments if segment in after.segments}
            gone = {segment.number for segment in before.segments} - kept
            if gone:
                connection.execute(sa.delete(_SEGMENTS).where(mine, _SEGMENTS.c.number.in_(gone)))
            if new := [segment for segment in after.segments if segment.number not in kept]:
                rows = [{"user_hash": user_hash, **asdict(segment)} for segment in new]
                connection.execute(sa.insert(_SEGMENTS), rows)
            values = {"history_version": after.version}
            connection.execute(sa.update(_USERS).where(_USERS.c.user_hash == user_hash).values(values))
        return after

    def generation(self, user_hash: str) -> int:
        """Read it before what a later write is made from, and hand it to `fenced`. `Forgotten` if no such user."""
        with self._read() as connection:
            return _generation(connection, user_hash)

    def check_generation(self, user_hash: str, generation: int) -> None:
        """`Forgotten` if the user was, or something of theirs, since `generation` was read."""
        with self._read() as connection:
            _check_generation(connection, user_hash, generation)

    @contextmanager
    def fenced(self, user_hash: str, generation: int) -> Iterator[None]:
        """Hold the registry's write lock while files of a user are put in place: no forgetting can begin meanwhile.

        Keep the body short: a rename, not a write.

        Raises:
            Forgotten: The user was, or something of theirs, since `generation` was read.
        """
        with self._write() as connection:
            _check_generation(connection, user_hash, generation)
            yield

    # ---- facts of the vault, and who follows the audit log

    def facts(self) -> dict[str, str]:
        """All that is recorded of the whole vault."""
        with self._read() as connection:
            return {name: value for name, value in connection.execute(_ALL_FACTS)}

    def fact(self, name: str) -> str | None:
        """What is recorded of the whole vault under this name, or None."""
        return self.facts().get(name)

    def join_followers(self, name: str, ttl_s: float) -> int:
        """Register a process before it caches anything of a user; returns the newest audit line, which it has obeyed.

        It has to renew by `follow` within `ttl_s`. Followers that were lost an hour ago are dropped.
        """
        with self._write() as connection:
            now = self._clock()
            connection.execute(sa.delete(_FOLLOWERS).where(_FOLLOWERS.c.expires_at < now - 3600))
            newest = connection.scalar(sa.select(sa.func.max(_AUDIT.c.number))) or 0
            connection.execute(sa.insert(_FOLLOWERS).values(name=name, seen=newest, expires_at=now + ttl_s))
            return newest

    def follow(self, name: str, seen: int, ttl_s: float) -> None:
        """Record that a follower has obeyed all audit lines up to `seen`, and lives for another `ttl_s`."""
        with self._write() as connection:
            values = {"seen": seen, "expires_at": self._clock() + ttl_s}
            mine = _FOLLOWERS.c.name == name
            if not connection.execute(sa.update(_FOLLOWERS).where(mine).values(**values)).rowcount:
                connection.execute(sa.insert(_FOLLOWERS).values(name=name, **values))

    def leave_followers(self, name: str) -> None:
        """The process ends, or has dropped all that it held."""
        with self._write() as connection:
            connection.execute(sa.delete(_FOLLOWERS).where(_FOLLOWERS.c.name == name))

    def followers(self) -> list[Follower]:
        """Processes that may hold copies of users' data: those whose time has not run out, by name."""
        live = _FOLLOWERS.c.expires_at > self._clock()
        with self._read() as connection:
            rows = connection.execute(sa.select(_FOLLOWERS).where(live).order_by(_FOLLOWERS.c.name))
            return [Follower(**row._mapping) for row in rows]

    def forgotten_since(self, seen: int) -> tuple[int, list[str]]:
        """The newest audit line, and the users of whom something was forgotten after line `seen`, oldest first.

        Reads no line up to `seen`, and of the lines after it only those of forgetting.
        """
        newest = sa.select(sa.func.max(_AUDIT.c.number)).scalar_subquery()
        wanted = sa.or_(_AUDIT.c.action == "forget", _AUDIT.c.number == newest)
        chosen = sa.select(_AUDIT.c.number, _AUDIT.c.action, _AUDIT.c.user_hash).where(_AUDIT.c.number > seen, wanted)
        with self._read() as connection:
            rows = connection.execute(chosen.order_by(_AUDIT.c.number)).all()
        return (rows[-1].number if rows else seen), [row.user_hash for row in rows if row.action == "forget"]

    def record_facts(self, facts: Mapping[str, str]) -> dict[str, str]:
        """Record facts unless some of these names are there, in one transaction; returns those that hold."""
        with self._write() as connection:
            return {name: _record_fact(connection, name, value) for name, value in facts.items()}

    def revision(self) -> int:
        """Counts the changes of what is listed: it goes back only where an older copy of the registry was restored."""
        return int(self.fact("revision") or 0)

    def key_check(self, user_hash: str) -> str | None:
        """The check value of the user's key, or None if no key was registered."""
        with self._read() as connection:
            return connection.scalar(_KEY_CHECK, {"wanted": user_hash})

    def record_key_check(self, user_hash: str, value: str) -> str:
        """Record the check value of the user's key unless there is one; returns the one that holds.

        Raises:
            Forgotten: No such user.
        """
        mine = _USERS.c.user_hash == user_hash
        with self._write() as connection:
            _generation(connection, user_hash)
            found = connection.scalar(sa.select(_USERS.c.key_check).where(mine))
            if found is None:
                connection.execute(sa.update(_USERS).where(mine).values(key_check=value))
        return value if found is None else found

    # ---- runs: which users are done

    def done_users(self, run_id: str) -> set[str]:
        """Hashes of the users that this run has committed."""
        with self._read() as connection:
            return set(connection.scalars(sa.select(_UNITS.c.user_hash).where(_UNITS.c.run_id == run_id)))

    def unit_version(self, run_id: str, user_hash: str) -> str | None:
        """The version that this run committed for this user, or None."""
        with self._read() as connection:
            return _unit_version(connection, run_id, user_hash)

    # ---- leases

    def acquire_lease(self, user_hash: str, holder: str, ttl_s: float) -> Lease:
        """Take the right to train a user. The same holder may take it anew (a run that restarts after a crash).

        Raises:
            Refused: Another holder has it, and it has not expired.
        """
        with self._write() as connection:
            now = self._clock()
            row = connection.execute(sa.select(_LEASES).where(_LEASES.c.user_hash == user_hash)).first()
            if row is not None and row.holder != holder and row.expires_at > now:
                left = f"{row.expires_at - now:.0f} s more"
                raise Refused(f"user {user_hash[:12]}: leased to {row.holder} for {left}; wanted by {holder}")
            connection.execute(sa.delete(_LEASES).where(_LEASES.c.user_hash == user_hash))
            values = {"user_hash": user_hash, "holder": holder, "expires_at": now + ttl_s}
            fence = connection.execute(sa.insert(_LEASES).values(**values)).inserted_primary_key
            assert fence is not None
            return Lease(user_hash, holder, fence[0], now + ttl_s)

    def renew_leases(self, leases: Iterable[Lease], ttl_s: float) -> None:
        """Move the end of leases to `ttl_s` from now; a lost one stays lost."""
        mine = _LEASES.c.fence.in_([lease.fence for lease in leases])
        with self._write() as connection:
            connection.execute(sa.update(_LEASES).where(mine).values(expires_at=self._clock() + ttl_s))

    def leaseholder(self, user_hash: str) -> str | None:
        """Who has the right to train a user, if anyone."""
        with self._read() as connection:
            return connection.scalar(sa.select(_LEASES.c.holder).where(_LEASES.c.user_hash == user_hash))

    def check_lease(self, lease: Lease) -> None:
        """`Refused` if the lease was lost: to another holder, or because the user was forgotten."""
        with self._read() as connection:
            _check_held(connection, lease)

    def release_lease(self, lease: Lease) -> None:
        """Give a lease back; nothing happens if it was lost."""
        with self._write() as connection:
            mine = (_LEASES.c.user_hash == lease.user_hash, _LEASES.c.fence == lease.fence)
            connection.execute(sa.delete(_LEASES).where(*mine))

    # ---- tokens

    def create_token(self, role: str, user_hash: str | None = None, ttl_s: float | None = None) -> str:
        """A new bearer token "oppu_<id>_<secret>"; only its SHA-256 is kept (the secret has 256 random bits)."""
        if role not in ROLES:
            raise ValueError(f"role {role!r}: expected one of {', '.join(ROLES)}")
        if (role == "user") != (user_hash is not None):
            raise ValueError(f"role {role!r}: a user's token needs a user, any other must have none")
        token_id, secret, now = secrets.token_hex(8), secrets.token_urlsafe(32), self._clock()
        values = {"token_id": token_id, "role": role, "user_hash": user_hash, "digest": _sha256(secret)}
        expires_at = None if ttl_s is None else now + ttl_s
        with self._write() as connection:
            if user_hash is not None and not _present(connection, _USERS.c.user_hash, {user_hash}):
                raise InputError(f"user {user_hash[:12]}: no such user")
            connection.execute(sa.insert(_TOKENS).values(**values, created_at=now, expires_at=expires_at))
            self._audit(connection, "create_token", user_hash, {"token_id": token_id, "role": role})
        return f"oppu_{token_id}_{secret}"

    def verify_token(self, token: str) -> Token | None:
        """Whom a token speaks for; None if malformed, unknown, expired or revoked (a caller must not tell which)."""
        if not (parts := _TOKEN.fullmatch(token)):
            return None
        with self._read() as connection:
            row = connection.execute(_TOKEN_AND_USER, {"wanted": parts[1]}).first()
        is_equal = hmac.compare_digest(_sha256(parts[2]), "0" * 64 if row is None else row.digest)
        if row is None or not is_equal or row.revoked_at is not None:
            return None
        return None if row.expires_at is not None and row.expires_at <= self._clock() else _token(row, row.generation)

    def revoke_token(self, token_id: str) -> None:
        """End a token at once. InputError if there is no such token."""
        if not _TOKEN_ID.fullmatch(token_id):  # PostgreSQL would fail on a NUL, SQLite on a surrogate
            raise InputError(f"token {token_id[:40]!r}: no such token; expected the 16 hex digits after 'oppu_'")
        with self._write() as connection:
            row = connection.execute(sa.select(_TOKENS).where(_TOKENS.c.token_id == token_id)).first()
            if row is None:
                raise InputError(f"token {token_id!r}: no such token")
            live = (_TOKENS.c.token_id == token_id, _TOKENS.c.revoked_at.is_(None))
            connection.execute(sa.update(_TOKENS).where(*live).values(revoked_at=self._clock()))
            self._audit(connection, "revoke_token", row.user_hash, {"token_id": token_id})

    def tokens(self, user_hash: str | None = None) -> list[Token]:
        """All tokens (or those of one user) without their secrets, oldest first."""
        chosen = sa.select(_TOKENS).order_by(_TOKENS.c.created_at)
        if user_hash is not None:
            chosen = chosen.where(_TOKENS.c.user_hash == user_hash)
        with self._read() as connection:
            return [_token(row) for row in connection.execute(chosen)]

    # ---- receipts and the audit log

    def add_receipt(self, receipt_id: str, user_hash: str, body: str) -> None:
        with self._write() as connection:
            values = {"receipt_id": receipt_id, "user_hash": user_hash, "body": body}
            connection.execute(sa.insert(_RECEIPTS).values(**values))
            self._audit(connection, "receipt", user_hash, {"receipt_id": receipt_id, "sha256": _sha256(body)})

    def receipts(self, user_hash: str | None = None) -> list[str]:
        """Bodies (JSON) of a user's receipts, or of all."""
        chosen = sa.select(_RECEIPTS.c.body)
        if user_hash is not None:
            chosen = chosen.where(_RECEIPTS.c.user_hash == user_hash)
        with self._read() as connection:
            return list(connection.scalars(chosen))

    def record(self, action: str, user_hash: str | None, detail: dict[str, Any]) -> None:
        """Add a line to the audit log for something done outside the registry, e.g. an export."""
        with self._write() as connection:
            self._audit(connection, action, user_hash, detail)

    def forgettings(self, user_hash: str | None = None) -> list[tuple[str, list[str] | None]]:
        """(user, keyed hashes of the items, or None for the whole user) of each forgetting, oldest first.

        Of one user by an index; of all by reading the whole log.
        """
        chosen = sa.select(_AUDIT.c.user_hash, _AUDIT.c.detail).where(_AUDIT.c.action == "forget")
        if user_hash is not None:
            chosen = chosen.where(_AUDIT.c.user_hash == user_hash)
        with self._read() as connection:
            rows = connection.execute(chosen.order_by(_AUDIT.c.number))
            return [(row.user_hash, json.loads(row.detail).get("items")) for row in rows]

    def audit_log(self, user_hash: str | None = None) -> list[Entry]:
        """The audit log, oldest first; of one user if given."""
        chosen = sa.select(_AUDIT).order_by(_AUDIT.c.number)
        if user_hash is not None:
            chosen = chosen.where(_AUDIT.c.user_hash == user_hash)
        with self._read() as connection:
            return [Entry(**row._mapping) for row in connection.execute(chosen)]

    def verify_audit(self) -> str | None:
        """None if the chain holds, else the first break. Cut-off newest lines show only against an older copy."""
        before, position = "", 0
        while page := self._audit_page(position):
            for entry in page:
                position += 1
                if entry.number != position:
                    return f"audit line {position} is missing"
                if not hmac.compare_digest(self._chain(before, entry), entry.chain):
                    return f"audit line {position} ({entry.action}) was changed"
                before = entry.chain
        return None

    def is_chained(self) -> bool:
        """Whether the newest line of the audit log was written with this chain key; True where there is none."""
        with self._read() as connection:
            rows = connection.execute(sa.select(_AUDIT).order_by(_AUDIT.c.number.desc()).limit(2)).all()
        entries = [Entry(**row._mapping) for row in rows]
        before = entries[1].chain if len(entries) > 1 else ""
        return not entries or hmac.compare_digest(self._chain(before, entries[0]), entries[0].chain)

    def is_empty(self) -> bool:
        """Whether nothing was ever written here."""
        return self.fact("vault") is None and not self._audit_page(0, 1)

    # ---- inside

    def _audit_page(self, after: int, limit: int = PAGE) -> list[Entry]:
        with self._read() as connection:
            chosen = sa.select(_AUDIT).where(_AUDIT.c.number > after).order_by(_AUDIT.c.number).limit(limit)
            return [Entry(**row._mapping) for row in connection.execute(chosen)]

    @property
    def url(self) -> str:
        """For a process of ours that opens the same registry; it may hold a password."""
        return self._url.render_as_string(hide_password=False)

    @property
    def _shown(self) -> str:
        return self._url.render_as_string(hide_password=True)

    @contextmanager
    def _read(self) -> Iterator[sa.Connection]:
        try:
            with self._reader.connect() as connection:
                yield connection
        except DBAPIError as error:
            raise RegistryError(f"registry {self._shown}: {error.orig}") from error

    @contextmanager
    def _write(self) -> Iterator[sa.Connection]:
        try:
            with self._engine.begin() as connection:
                if self._url.get_backend_name() == "postgresql":
                    connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_WRITE_LOCK)))
                yield connection
        except DBAPIError as error:
            raise RegistryError(f"registry {self._shown}: {error.orig}") from error

    @contextmanager
    def _listing(self) -> Iterator[sa.Connection]:
        """A write that changes what files are listed: it counts up the revision.

        Where the revision is not above the newest one that this process has written, the registry was replaced by an
        older copy meanwhile, as after a failover that lost commits. That is recorded, and gc removes nothing any more.
        """
        with self._write() as connection:
            yield connection
            named = _FACTS.c.name == "revision"
            found = connection.scalar(sa.select(_FACTS.c.value).where(named))
            revision = int(found or 0) + 1
            if found is None:
                connection.execute(sa.insert(_FACTS).values(name="revision", value=str(revision)))
            else:
                connection.execute(sa.update(_FACTS).where(named).values(value=str(revision)))
            if revision <= self.written_revision:
                _record_fact(connection, "lags_behind", str(self.written_revision))
        self.written_revision = max(self.written_revision, revision)

    def _sqlite_url(self, create: bool) -> sa.URL:
        """A URL that opens the database file and never makes it: one made under a mount point would look like a vault.

        It is made here, for SQLite would let everybody read it, and never opened otherwise: closing it drops all locks
        that this process has on it, SQLite's too, and another process would take the log away from under them.
        """
        path = os.path.abspath(self._url.database or "")
        try:
            if create:
                with suppress(FileExistsError):
                    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
            size = os.stat(path).st_size
        except OSError as error:
            raise RegistryError(f"registry {self._shown}: {error.strerror}; is its disk mounted?") from error
        if size == 0 and not create:
            raise RegistryError(f"registry {self._shown}: is empty; expected the one of an existing vault")
        return self._url.set(database=f"file:{quote(path)}", query={"mode": "rw", "uri": "true"})

    def _migrate(self, create: bool) -> None:
        newest = 1 + len(MIGRATIONS)
        with self._read() as connection:
            is_new = not sa.inspect(connection).has_table("schema")
            found = None if is_new else connection.scalar(sa.select(_SCHEMA.c.version))
        if found == newest:
            return
        if found is None and not create:
            raise RegistryError(f"registry {self._shown}: holds no registry; expected the one of an existing vault")
        if found is not None and found > newest:
            raise RegistryError(f"registry {self._shown}: schema {found} is newer than this oppu_ray's {newest}")
        with self._write() as connection:
            _META.create_all(connection, tables=[_SCHEMA])
            found = connection.scalar(sa.select(_SCHEMA.c.version))  # asked again: another process may have migrated
            if found is None:
                _META.create_all(connection)
                connection.execute(sa.insert(_SCHEMA).values(version=newest))
                return
            for statement in (line for step in MIGRATIONS[found - 1 :] for line in step):
                connection.exec_driver_sql(statement)
            _META.create_all(connection)
            connection.execute(sa.update(_SCHEMA).values(version=newest))

    def _add(self, connection: sa.Connection, user_hashes: set[str]) -> None:
        """Insert users that are not there, with empty histories."""
        subject = min(user_hashes) if len(user_hashes) == 1 else None
        generation = self._audit(connection, "add", subject, {"num_users": len(user_hashes)})
        new = {"created_at": self._clock(), "generation": generation, "history_version": 0}
        connection.execute(sa.insert(_USERS), [{"user_hash": user_hash, **new} for user_hash in sorted(user_hashes)])

    def _publish(
        self,
        connection: sa.Connection,
        version: Version,
        expected: str | None,
        make_current: bool,
        rho: tuple[float, float] | None,
    ) -> None:
        """See `publish`; the caller has checked the lease."""
        user_hash = version.user_hash
        row = connection.execute(sa.select(_USERS.c.current).where(_USERS.c.user_hash == user_hash)).first()
        if row is None:
            self._add(connection, {user_hash})
        current = None if row is None else row.current
        self._move(connection, user_hash, current, expected, version.version if make_current else current)
        if rho is not None:
            mine = (_USERS.c.user_hash == user_hash, _USERS.c.rho == rho[0])
            if connection.execute(sa.update(_USERS).where(*mine).values(rho=rho[1])).rowcount != 1:
                raise Refused(f"user {user_hash[:12]}: another version was released meanwhile; try again")
        connection.execute(sa.insert(_VERSIONS).values(**asdict(version)))
        if version.run_id:
            unit = {"run_id": version.run_id, "user_hash": user_hash}
            if _unit_version(connection, version.run_id, user_hash) is not None:
                raise Refused(f"user {user_hash[:12]}: run {version.run_id} has committed this user already")
            connection.execute(sa.insert(_UNITS).values(**unit, version=version.version))
        detail = {"version": version.version, "manifest_sha256": version.manifest_sha256}
        self._audit(connection, "publish", user_hash, detail)

    def _move(
        self, connection: sa.Connection, user_hash: str, current: str | None, expected: str | None, version: str | None
    ) -> None:
        if current != expected:
            raise Refused(f"user {user_hash[:12]}: current version is {current}, expected {expected}; try again")
        connection.execute(sa.update(_USERS).where(_USERS.c.user_hash == user_hash).values(current=version))

    def _repoint(
        self, connection: sa.Connection, user_hash: str, gone: set[str], *candidates: sa.ColumnElement[bool]
    ) -> None:
        """If `current` is one of `gone`, let the newest candidate take its place."""
        newest = sa.select(_VERSIONS.c.version).where(*candidates).order_by(_VERSIONS.c.number.desc()).limit(1)
        was_current = (_USERS.c.user_hash == user_hash, _USERS.c.current.in_(gone))
        connection.execute(sa.update(_USERS).where(*was_current).values(current=connection.scalar(newest)))

    def _audit(self, connection: sa.Connection, action: str, user_hash: str | None, detail: dict[str, Any]) -> int:
        """Append a line to the audit log; returns its number."""
        last = sa.select(_AUDIT.c.number, _AUDIT.c.chain).order_by(_AUDIT.c.number.desc()).limit(1)
        row = connection.execute(last).first()
        number, before = (1, "") if row is None else (row.number + 1, row.chain)
        entry = Entry(number, self._clock(), action, user_hash, json.dumps(detail, sort_keys=True), "")
        entry = replace(entry, chain=self._chain(before, entry))
        connection.execute(sa.insert(_AUDIT).values(**asdict(entry)))
        return number

    def _chain(self, before: str, entry: Entry) -> str:
        line = json.dumps([before, entry.number, entry.time, entry.action, entry.user_hash, entry.detail])
        return hmac.new(self._chain_key, line.encode(), hashlib.sha256).hexdigest()


_USER = sa.select(
    _USERS.c.user_hash,
    _USERS.c.current,
    _USERS.c.created_at,
    sa.select(sa.func.count()).where(_VERSIONS.c.user_hash == _USERS.c.user_hash).scalar_subquery(),
)
_KEY_CHECK = sa.select(_USERS.c.key_check).where(_USERS.c.user_hash == sa.bindparam("wanted"))
_ALL_FACTS = sa.select(_FACTS.c.name, _FACTS.c.value)
_CURRENT = (
    sa.select(_VERSIONS)
    .join(_USERS, sa.and_(_USERS.c.user_hash == _VERSIONS.c.user_hash, _USERS.c.current == _VERSIONS.c.version))
    .where(_USERS.c.user_hash == sa.bindparam("wanted"))
)
_TOKEN_AND_USER = (
    sa.select(_TOKENS, _USERS.c.generation)
    .select_from(_TOKENS.outerjoin(_USERS, _USERS.c.user_hash == _TOKENS.c.user_hash))
    .where(_TOKENS.c.token_id == sa.bindparam("wanted"))
)
_VERSION = sa.select(_VERSIONS).where(
    _VERSIONS.c.user_hash == sa.bindparam("wanted"), _VERSIONS.c.version == sa.bindparam("version")
)


_WHOLE = (_AUDIT.c.action == "forget", _AUDIT.c.detail == "{}")
"""Audit lines that say a whole user was forgotten."""


def _present(
    connection: sa.Connection, column: sa.Column[str], wanted: set[str], *also: sa.ColumnElement[bool]
) -> set[str]:
    """Which of `wanted` stand in a column, asked in portions that both databases take."""
    ordered, found = sorted(wanted), set[str]()
    for start in range(0, len(ordered), 500):
        chosen = sa.select(column).where(column.in_(ordered[start : start + 500]), *also)
        found.update(connection.scalars(chosen))
    return found


def _begins(table: sa.Table, digits: str) -> sa.ColumnElement[bool]:
    """Whether a row's user hash begins with these hex digits: a range, which both databases look up in the index."""
    return table.c.user_hash.between(digits.ljust(64, "0"), digits.ljust(64, "f"))


def _record_fact(connection: sa.Connection, name: str, value: str) -> str:
    """See `record_fact`."""
    found = connection.scalar(sa.select(_FACTS.c.value).where(_FACTS.c.name == name))
    if found is None:
        connection.execute(sa.insert(_FACTS).values(name=name, value=value))
    return value if found is None else found


def _generation(connection: sa.Connection, user_hash: str) -> int:
    found = connection.scalar(sa.select(_USERS.c.generation).where(_USERS.c.user_hash == user_hash))
    if found is None:
        raise Forgotten(f"user {user_hash[:12]}: no such user, or forgotten meanwhile")
    return found


def _check_generation(connection: sa.Connection, user_hash: str, generation: int) -> None:
    if _generation(connection, user_hash) != generation:
        raise Forgotten(f"user {user_hash[:12]}: the user, or items of theirs, were forgotten meanwhile")


def _check_not_forgotten(connection: sa.Connection, user_hashes: set[str]) -> None:
    if gone := _present(connection, _AUDIT.c.user_hash, user_hashes, *_WHOLE):
        raise Forgotten(f"user {min(gone)[:12]}: was forgotten; expected a user who is there or was added again")


def _history(connection: sa.Connection, user_hash: str) -> History:
    segments = [column for column in _SEGMENTS.c if column.name != "user_hash"]
    joined = _USERS.outerjoin(_SEGMENTS, _SEGMENTS.c.user_hash == _USERS.c.user_hash)
    chosen = sa.select(_USERS.c.generation, _USERS.c.history_version, *segments).select_from(joined)
    rows = connection.execute(chosen.where(_USERS.c.user_hash == user_hash).order_by(_SEGMENTS.c.number)).all()
    if not rows:
        raise Forgotten(f"user {user_hash[:12]}: no such user, or forgotten meanwhile")
    listed = tuple(Segment(*row[2:]) for row in rows if row.number is not None)
    return History(rows[0].generation, rows[0].history_version, listed)


def _check_held(connection: sa.Connection, lease: Lease) -> None:
    held = sa.select(_LEASES.c.fence).where(_LEASES.c.user_hash == lease.user_hash)
    if connection.scalar(held) != lease.fence:
        raise Refused(f"user {lease.user_hash[:12]}: the lease of {lease.holder} (fence {lease.fence}) was lost")


def _unit_version(connection: sa.Connection, run_id: str, user_hash: str) -> str | None:
    mine = (_UNITS.c.run_id == run_id, _UNITS.c.user_hash == user_hash)
    return connection.scalar(sa.select(_UNITS.c.version).where(*mine))


def _token(row: sa.Row[Any], generation: int | None = None) -> Token:
    subject = None if row.user_hash is None else UserHash(row.user_hash)
    return Token(row.token_id, row.role, subject, row.created_at, row.expires_at, row.revoked_at, generation)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _prepare_sqlite(dbapi_connection: Any, _record: Any) -> None:
    dbapi_connection.isolation_level = None  # transactions begin in `_begin_sqlite`, not where the driver guesses
    cursor = dbapi_connection.cursor()
    for setting in ("journal_mode=WAL", "synchronous=FULL", "secure_delete=ON"):
        cursor.execute(f"PRAGMA {setting}")
    cursor.close()


def _begin_sqlite(connection: sa.Connection) -> None:
    is_reader = connection.get_execution_options().get("read_only", False)
    connection.exec_driver_sql("BEGIN" if is_reader else "BEGIN IMMEDIATE")
