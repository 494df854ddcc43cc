"""S3 servers for tests and benchmarks: each on a free loopback port, with one bucket, gone when its block ends.

    with s3servers.rclone(tmpdir) as server:
        os.environ.update(server.env)
        store = open_store(server.url)

Entering raises Unavailable, with the reason, where a server cannot be had on this machine. A server is killed
by its process group when the block ends, and by the kernel when the process that started it dies. Start them
from the main thread: the kernel watches the thread that forked.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ACCESS_KEY = "tierfs-tests"
SECRET_KEY = "tierfs-tests-secret"
BUCKET = "tierfs-bucket"
CACHE = Path.home() / ".cache" / "tierfs-tests"
_PR_SET_PDEATHSIG = 1


class Unavailable(Exception):
    """The server cannot be had here; the text says why."""


@dataclass
class Server:
    """A running server. `env` holds the credentials; `url` opens its bucket under the prefix "tests"."""

    name: str
    endpoint: str
    bucket: str = BUCKET
    processes: list[subprocess.Popen] = field(default_factory=list)

    @property
    def env(self) -> dict[str, str]:
        return credentials()

    @property
    def url(self) -> str:
        return self.url_for("tests")

    def url_for(self, prefix: str, endpoint: str = "") -> str:
        """The URL of another prefix, or of the same bucket by way of another endpoint (a proxy)."""
        return f"s3://{self.bucket}/{prefix}?endpoint={endpoint or self.endpoint}&region=us-east-1"

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.endpoint.removeprefix("http://").split(":")
        return host, int(port)

    def stop(self) -> None:
        for process in reversed(self.processes):
            kill_group(process)
        self.processes.clear()


def credentials(access: str = ACCESS_KEY, secret: str = SECRET_KEY) -> dict[str, str]:
    """The environment of a client; hides any real account that this machine may have."""
    return {
        "AWS_ACCESS_KEY_ID": access,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_CONFIG_FILE": os.devnull,
    }


def die_with_parent() -> None:
    """For `preexec_fn`: the kernel kills this process when the thread that started it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def spawn(argv: list[str], log: Path, env: dict[str, str] | None = None) -> subprocess.Popen:
    """Start a server in its own process group, its output going to `log`."""
    with log.open("ab") as out:
        return subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env={**os.environ, **(env or {})},
            start_new_session=True,
            preexec_fn=die_with_parent,
        )


def kill_group(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(ready: Callable[[], bool], process: subprocess.Popen, log: Path, seconds: float) -> None:
    """Poll until `ready`; raises RuntimeError with the log's end when the process dies or time runs out."""
    deadline = time.monotonic() + seconds
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{process.args[0]} did not start: {log.read_text(errors='replace')[-2000:]}")
        time.sleep(0.05)


def answers_http(endpoint: str) -> bool:
    """Whether anything speaks HTTP there; a refusal is an answer too."""
    try:
        urllib.request.urlopen(endpoint, timeout=2).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def make_bucket(server: Server) -> None:
    import boto3
    from botocore.config import Config

    boto3.client(
        "s3",
        endpoint_url=server.endpoint,
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
        region_name="us-east-1",
        config=Config(s3={"addressing_style": "path"}, request_checksum_calculation="when_required"),
    ).create_bucket(Bucket=server.bucket)


@contextlib.contextmanager
def _running(name: str, argv: list[str], workdir: Path, port: int, env: dict[str, str]) -> Iterator[Server]:
    server = Server(name, f"http://127.0.0.1:{port}")
    log = workdir / f"{name}.log"
    try:
        server.processes.append(spawn(argv, log, env))
        wait_for(lambda: answers_http(server.endpoint), server.processes[0], log, 30)
        make_bucket(server)
        yield server
    finally:
        server.stop()


def _tool(name: str) -> str:
    """A program of the interpreter's own environment, or of the PATH."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        raise Unavailable(f"{name} is not installed")
    return found


@contextlib.contextmanager
def named(workdir: Path | str) -> Iterator[Server]:
    """One that runs already: its endpoint in TIERFS_TEST_S3, where the tests' account may make buckets."""
    endpoint = os.environ.get("TIERFS_TEST_S3")
    if not endpoint:
        raise Unavailable("TIERFS_TEST_S3 names no endpoint of a server")
    server = Server("named", endpoint.rstrip("/"), f"tierfs-tests-{uuid.uuid4().hex[:8]}")
    make_bucket(server)
    yield server


@contextlib.contextmanager
def rclone(workdir: Path | str) -> Iterator[Server]:
    """`rclone serve s3`: ranges answered with 200, conditions ignored, a bucket is a directory."""
    workdir = Path(workdir)
    root = workdir / "rclone"
    root.mkdir(parents=True, exist_ok=True)
    port = free_port()
    argv = [_tool("rclone"), "serve", "s3", "--addr", f"127.0.0.1:{port}", "--config", os.devnull]
    argv += ["--auth-key", f"{ACCESS_KEY},{SECRET_KEY}", "--dir-cache-time", "1s", str(root)]
    with _running("rclone", argv, workdir, port, {}) as server:
        yield server


@contextlib.contextmanager
def moto(workdir: Path | str) -> Iterator[Server]:
    """moto's server: the most complete API, everything in memory, any secret accepted."""
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    port = free_port()
    argv = [_tool("moto_server"), "-H", "127.0.0.1", "-p", str(port)]
    with _running("moto", argv, workdir, port, credentials()) as server:
        yield server


@contextlib.contextmanager
def versitygw(workdir: Path | str) -> Iterator[Server]:
    """versitygw on a directory (which needs user xattrs): fast, strict, checks SHA-256."""
    workdir = Path(workdir)
    root = workdir / "versitygw"
    root.mkdir(parents=True, exist_ok=True)
    port = free_port()
    # Without --keep-alive each request pays for a connection of its own: twice the round trips.
    argv = [_versitygw_binary(), "--keep-alive", "--quiet", "--port", f"127.0.0.1:{port}", "posix", str(root)]
    env = {"ROOT_ACCESS_KEY": ACCESS_KEY, "ROOT_SECRET_KEY": SECRET_KEY}
    with _running("versitygw", argv, workdir, port, env) as server:
        yield server


def _versitygw_binary() -> str:
    """The PATH's, the cached one, or one built now (two minutes, once)."""
    built = CACHE / "bin" / "versitygw"
    found = shutil.which("versitygw") or (str(built) if built.exists() else None)
    if found:
        return found
    if not shutil.which("go"):
        raise Unavailable("versitygw is not installed, nor go to build it with")
    command = ["go", "install", "github.com/versity/versitygw/cmd/versitygw@latest"]
    env = {**os.environ, "GOBIN": str(built.parent)}
    try:
        subprocess.run(command, env=env, check=True, capture_output=True, timeout=600)
    except (subprocess.SubprocessError, OSError) as exc:
        raise Unavailable(f"versitygw could not be built: {exc}") from exc
    return str(built)


@contextlib.contextmanager
def seaweedfs(workdir: Path | str) -> Iterator[Server]:
    """SeaweedFS, all its parts in one process: what many have on a NAS."""
    workdir = Path(workdir)
    root = workdir / "seaweedfs"
    root.mkdir(parents=True, exist_ok=True)
    account = {"credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}], "name": "tests"}
    (workdir / "s3.json").write_text(json.dumps({"identities": [account | {"actions": ["Admin"]}]}))
    port = free_port()
    argv = [_tool("weed"), f"-logdir={workdir}", "server", f"-dir={root}"]
    argv += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3"]
    argv += [f"-s3.port={port}", f"-s3.config={workdir / 's3.json'}", "-s3.autoCreateBucket=false"]
    argv += ["-s3.port.iceberg=0", "-s3.port.lance=0"]
    argv += ["-master.volumeSizeLimitMB=1024", "-volume.max=20", "-master.telemetry=false"]
    ports = {f"{part}.port.grpc": free_port() for part in ("master", "volume", "filer", "s3")}
    ports |= {f"{part}.port": free_port() for part in ("master", "volume", "filer")}
    argv += [f"-{name}={number}" for name, number in ports.items()]
    try:
        with _running("seaweedfs", argv, workdir, port, {}) as server:
            yield server
    finally:
        for number in {port, *ports.values()}:  # it is killed, and would have removed its sockets at its end
            for left in Path("/tmp").glob(f"seaweedfs-*-{number}.sock"):
                left.unlink(missing_ok=True)


@contextlib.contextmanager
def minio(workdir: Path | str) -> Iterator[Server]:
    """MinIO on one directory."""
    workdir = Path(workdir)
    root = workdir / "minio"
    root.mkdir(parents=True, exist_ok=True)
    port = free_port()
    argv = [_tool("minio"), "server", "--quiet", "--address", f"127.0.0.1:{port}"]
    argv += ["--console-address", f"127.0.0.1:{free_port()}", str(root)]
    env = {"MINIO_ROOT_USER": ACCESS_KEY, "MINIO_ROOT_PASSWORD": SECRET_KEY}
    with _running("minio", argv, workdir, port, env) as server:
        yield server


_CEPH_CONF = """
[global]
fsid = {fsid}
auth cluster required = none
auth service required = none
auth client required = none
mon host = {monitor}
mon initial members = a
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind msgr2 = false
run dir = {root}
log file = {root}/$name.log
admin socket =
crash dir = {root}
osd crush chooseleaf type = 0
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pgp num = 1
osd pool default pg autoscale mode = off
rgw rados pool pg num min = 1
rgw bucket index max aio = 8
rgw override bucket index max shards = 1
rgw dynamic resharding = false
rgw run sync thread = false
mon allow pool size one = true
mon max pg per osd = 1000
mon data avail crit = 1
mon data avail warn = 1
[mon.a]
mon data = {root}/mon
[osd]
osd data = {root}/osd
osd objectstore = memstore
memstore device bytes = 2147483648
osd op num shards = 2
osd crush update on start = false
osd class update on start = false
"""


@contextlib.contextmanager
def rgw(workdir: Path | str) -> Iterator[Server]:
    """A Ceph cluster of one monitor, one OSD in memory and one RADOS gateway, without authentication inside."""
    for program in ("ceph", "monmaptool", "ceph-mon", "ceph-osd", "radosgw", "radosgw-admin"):
        if not shutil.which(program):
            raise Unavailable(f"{program} is not installed (Debian: ceph-mon ceph-osd radosgw)")
    root = Path(workdir).resolve() / "rgw"
    for part in ("mon", "osd"):
        (root / part).mkdir(parents=True, exist_ok=True)
    server = Server("rgw", f"http://127.0.0.1:{free_port()}")
    try:
        _start_ceph(root, server)
        make_bucket(server)
        yield server
    finally:
        server.stop()


def _start_ceph(root: Path, server: Server) -> None:
    conf, log, osd_uuid = root / "ceph.conf", root / "output.log", str(uuid.uuid4())
    fsid, monitor = str(uuid.uuid4()), f"v1:127.0.0.1:{free_port()}"
    conf.write_text(_CEPH_CONF.format(fsid=fsid, monitor=monitor, root=root))

    def run(program: str, *args: str) -> None:
        # A monitor that has just begun may be slow on a busy machine; what is asked twice is done once.
        for last in (False, False, True):
            with log.open("ab") as out:
                argv = [program, "-c", str(conf), *args]
                done = subprocess.run(argv, check=last, stdout=out, stderr=out, timeout=60)
            if done.returncode == 0:
                return

    def daemon(program: str, *args: str) -> subprocess.Popen:
        server.processes.append(spawn([program, "-f", "-c", str(conf), *args], log))
        return server.processes[-1]

    run("monmaptool", "--create", "--addv", "a", f"[{monitor}]", "--fsid", fsid, str(root / "monmap"))
    run("ceph-mon", "--mkfs", "-i", "a", "--monmap", str(root / "monmap"))
    daemon("ceph-mon", "-i", "a")
    run("ceph", "--connect-timeout", "30", "osd", "new", osd_uuid)
    # An OSD that places itself asks before it knows the cluster's id and is refused ("wrong fsid").
    run("ceph", "osd", "crush", "add", "osd.0", "1.0", "root=default", "host=here")
    run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd_uuid)
    daemon("ceph-osd", "-i", "0")
    user = ("user", "create", "--uid=tests", "--display-name=tests")
    run("radosgw-admin", *user, f"--access-key={ACCESS_KEY}", f"--secret-key={SECRET_KEY}")
    frontend = f"beast endpoint={server.endpoint.removeprefix('http://')} tcp_nodelay=1"
    gateway = daemon("radosgw", "-n", "client.rgw", f"--rgw-frontends={frontend}")
    wait_for(lambda: answers_http(server.endpoint), gateway, log, 60)


SERVERS = {
    "rclone": rclone,
    "moto": moto,
    "versitygw": versitygw,
    "rgw": rgw,
    "seaweedfs": seaweedfs,
    "minio": minio,
    "named": named,
}
