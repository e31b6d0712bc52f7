"""A real PostgreSQL server on loopback for tests: `initdb` in a folder of its own, then the server, in our hands."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Self

from tests.faults.fake_cluster import free_port, listens

START_LIMIT_S = 60.0
# The server refuses to run as root; Debian's package makes this user.
USER = "postgres"


def find_programs() -> Path | None:
    """The folder with `initdb` and `postgres`: on the PATH, or where Debian puts it; None where there is none."""
    on_path = shutil.which("initdb")
    if on_path is not None and shutil.which("postgres", path=str(Path(on_path).resolve().parent)):
        return Path(on_path).resolve().parent
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    return versions[-1].parent if versions else None


class PostgresServer:
    """One server with an empty database; a context manager."""

    def __init__(self, folder: Path, programs: Path) -> None:
        self.folder = folder
        self.programs = programs
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        """SQLAlchemy's address of the database."""
        return f"postgresql://{USER}@127.0.0.1:{self.port}/postgres"

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True)
        user = USER if os.geteuid() == 0 else None
        if user is not None:
            os.chown(self.folder, pwd.getpwnam(user).pw_uid, -1)
        data = self.folder / "data"
        initdb = [str(self.programs / "initdb"), "-D", str(data), "-U", USER, "-A", "trust", "--no-sync"]
        subprocess.run(initdb, check=True, capture_output=True, user=user, cwd="/")
        server = [str(self.programs / "postgres"), "-D", str(data), "-p", str(self.port), "-k", "", "-F"]
        with (self.folder / "server.log").open("wb") as log:
            self._process = subprocess.Popen(
                [*server, "-c", "listen_addresses=127.0.0.1"], stdout=log, stderr=log, user=user, cwd="/"
            )
        deadline = time.monotonic() + START_LIMIT_S
        while not listens(self.port):
            if time.monotonic() > deadline or self._process.poll() is not None:
                raise SystemExit(f"PostgreSQL did not start: {(self.folder / 'server.log').read_text()[-2000:]}")
            time.sleep(0.1)
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait()
