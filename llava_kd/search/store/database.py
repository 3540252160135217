"""The store as a file: SQLite, each write a transaction, so that a kill leaves all of it or nothing."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from llava_kd.search.store.entries import DataSet, Entry, from_json, to_json

VERSION = 1
PATIENCE_S = 2.0  # how long another process may hold the file
_APPLICATION = 0x4C4B4453  # of this project's files among all SQLite files
_TABLES = (
    "CREATE TABLE runs (key TEXT PRIMARY KEY NOT NULL, entry TEXT NOT NULL, "
    "entered TEXT DEFAULT CURRENT_TIMESTAMP)",
    "CREATE TABLE data_sets (fingerprint TEXT PRIMARY KEY NOT NULL, name TEXT NOT NULL, "
    "features TEXT NOT NULL)",
    f"PRAGMA application_id = {_APPLICATION}",
    f"PRAGMA user_version = {VERSION}",
)


class StoreError(ValueError):
    """The file cannot be used now, or not at all."""


class Store:
    """Runs and the data sets that they were trained on. Every method opens the file for itself."""

    def __init__(self, path: str | Path, *, patience_s: float = PATIENCE_S) -> None:
        self.path = Path(path)
        self._patience_s = patience_s

    def prepare(self) -> None:
        """Make the file where there is none. StoreError for one that is locked, or not of this version."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"the store {self.path} cannot be created: {error}") from error
        with self._transaction(writes=True, may_make=True):
            pass

    def add(self, entries: Iterable[Entry], data_sets: Iterable[DataSet] = ()) -> None:
        """All or none; a run that is there already is replaced."""
        runs = [(entry.key, to_json(entry)) for entry in entries]
        sets = [(one.fingerprint, one.name, json.dumps(dict(one.features))) for one in data_sets]
        self.prepare()
        with self._transaction(writes=True) as connection:
            connection.executemany("INSERT OR REPLACE INTO runs (key, entry) VALUES (?, ?)", runs)
            connection.executemany("INSERT OR REPLACE INTO data_sets VALUES (?, ?, ?)", sets)

    def entries(self) -> list[Entry]:
        with self._transaction() as connection:
            rows = connection.execute("SELECT entry FROM runs ORDER BY entered, key").fetchall()
        return [from_json(text) for (text,) in rows]

    def data_sets(self) -> dict[str, DataSet]:
        with self._transaction() as connection:
            rows = connection.execute("SELECT fingerprint, name, features FROM data_sets").fetchall()
        return {
            fingerprint: DataSet(fingerprint=fingerprint, name=name, features=json.loads(features))
            for fingerprint, name, features in rows
        }

    @contextmanager
    def _transaction(self, *, writes: bool = False, may_make: bool = False) -> Iterator[sqlite3.Connection]:
        if not may_make and not self.path.is_file():
            raise StoreError(
                f"there is no store {self.path}; create one from finished runs with `llava-kd search add RUN`"
            )
        try:
            with closing(sqlite3.connect(self.path, timeout=self._patience_s, isolation_level=None)) as file:
                file.execute("BEGIN IMMEDIATE" if writes else "BEGIN")
                try:
                    self._check(file, may_make=may_make)
                    yield file
                except BaseException:  # Ctrl-C too leaves no half of a transaction; it is raised again
                    file.execute("ROLLBACK")
                    raise
                file.execute("COMMIT")
        except sqlite3.Error as error:
            raise self._explained(error) from error

    def _check(self, file: sqlite3.Connection, *, may_make: bool) -> None:
        """StoreError for what is no store of this version; of a file without any table one is made."""
        (application,) = file.execute("PRAGMA application_id").fetchone()
        (version,) = file.execute("PRAGMA user_version").fetchone()
        if application != _APPLICATION:
            (tables,) = file.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if tables or application or version:
                raise StoreError(f"{self.path} is the database of another program; name another --store")
            if not may_make:
                raise StoreError(f"{self.path} is empty; add runs to it with `llava-kd search add RUN`")
            for line in _TABLES:
                file.execute(line)
        elif version != VERSION:
            raise StoreError(
                f"the store {self.path} was written by another version (format {version}, this one reads "
                f"{VERSION}); name another --store, or use the version that wrote it"
            )

    def _explained(self, error: sqlite3.Error) -> StoreError:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return StoreError(
                f"the store {self.path} is locked by another process (waited {self._patience_s:g} s); wait "
                "for it, or name another --store"
            )
        if code == sqlite3.SQLITE_NOTADB:
            return StoreError(f"{self.path} is not a store (not a SQLite file); name another --store")
        return StoreError(
            f"the store {self.path} cannot be used ({error}); name another --store, or fix the file"
        )
