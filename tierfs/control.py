"""The control socket: requests, answers, their framing, and the client.

A frame is 4 bytes of length (little-endian) and msgpack. A request is answered by any number of frames such as
`Progress` and `Facts` and one last frame: `Done`, `Status`, `Findings` or `Failed`. A client that hangs up
cancels its request. A connection may ask one thing after another, and ends with the answer to what takes long.
Paths are bytes relative to the volume's root, b"" being the root itself.
"""

from __future__ import annotations

import os
import socket
import stat
import struct
from collections.abc import Iterator
from typing import Any

import msgspec

from tierfs.errors import NotPermittedError, PathError, TierError, UsageError, VolumeError
from tierfs.locate import Mount
from tierfs.spelling import shown

MAX_FRAME = 16 << 20
_QUICK_SECONDS = 60.0  # for an answer to a request that only looks; a restart of the mover may lie in between
_LENGTH = struct.Struct("<I")
_CREDENTIALS = struct.Struct("3i")


class Frame(msgspec.Struct, tag=True, frozen=True):
    """Base of all requests and answers."""


# --- requests --------------------------------------------------------------------------------------------


class GetStatus(Frame, frozen=True):
    """Facts of the volume. Answer: Status."""


class GetFacts(Frame, frozen=True):
    """Facts of these paths. Answer: Facts …, Done (a missing path is an outcome)."""

    paths: list[bytes]


class ListNames(Frame, frozen=True):
    """Facts of a directory's entries, or of one file. Answer: Facts …, Done."""

    path: bytes


class SetPin(Frame, frozen=True):
    """Pin or unpin. Answer: Progress …, Done."""

    paths: list[bytes]
    on: bool


class GetPins(Frame, frozen=True):
    """All pinned paths that the caller may see. Answer: Facts …, Done."""


class Demote(Frame, frozen=True):
    """An order to demote, recursively. `wait`: answer when it is done, else when it has been accepted."""

    paths: list[bytes]
    wait: bool


class Fetch(Frame, frozen=True):
    """An order to fetch, recursively. `wait` as in Demote."""

    paths: list[bytes]
    wait: bool


class Drain(Frame, frozen=True):
    """Wait until everything is in the store. Answer: Progress …, Done (what cannot leave is an outcome)."""


class Check(Frame, frozen=True):
    """Compare tree, index and store. Answer: Progress …, Findings.

    `read_data`: read all copies, from where the last reading was cut short unless `from_start`, at most `rate`
    bytes a second (0: no limit).
    """

    repair: bool
    read_data: bool
    rate: int = 0
    from_start: bool = False


class GetVersions(Frame, frozen=True):
    """Former contents of a file, there or not; of what lay beneath a directory. Answer: Version …, Done."""

    path: bytes


class ReadVersion(Frame, frozen=True):
    """One of them, by its generation or as of a moment (ns). Answer: Version, Content …, Done."""

    path: bytes
    generation: int | None = None
    when: int | None = None


class Collect(Frame, frozen=True):
    """Remove what may go from the store now, or (`dry_run`) only name it. Answer: Garbage …, Done."""

    dry_run: bool


class Reload(Frame, frozen=True):
    """Read the configuration anew. Answer: Done or Failed."""


Request = (
    GetStatus | GetFacts | ListNames | SetPin | GetPins | Demote | Fetch | Drain | Check | Reload
    | GetVersions | ReadVersion | Collect
)  # fmt: skip


# --- answers ---------------------------------------------------------------------------------------------


class Facts(Frame, frozen=True):
    """What is known of one path; sizes in bytes. `reason`: why the last fetch or copy failed, if it did.
    `stays`: why it is not demoted even where space is short, if it is resident and may not be."""

    path: bytes
    tier: str
    size: int = 0
    local_bytes: int = 0
    dirty: bool = False
    pinned: bool = False
    heat: float = 0.0
    generation: int = 0
    copy: str = ""
    reason: str = ""
    stays: str = ""


class Version(Frame, frozen=True):
    """One content of a file: current, superseded or deleted. Times in ns, `kept_until` in seconds (None: not
    before its file has another copy). `until` None: it still is. Mode 0: owner and mode are not known."""

    path: bytes
    generation: int
    size: int
    mtime: int
    key: str
    state: str
    since: int
    until: int | None = None
    kept_until: float | None = None
    mode: int = 0
    uid: int = 0
    gid: int = 0


class Content(Frame, frozen=True):
    """Bytes of a version at their place; what is in no such frame is a hole."""

    offset: int
    data: bytes


class Garbage(Frame, frozen=True):
    """An object that will be removed, not before `may_go` (seconds). `size` None: not known."""

    key: str
    size: int | None
    reason: str
    may_go: float


class Problem(msgspec.Struct, frozen=True):
    """One recent error of the daemon. `at` in seconds since the epoch."""

    at: float
    what: str


class Waiting(msgspec.Struct, frozen=True):
    """A file that is not in the store. `since`: for how many seconds; `open`: somebody may be writing it;
    `grown`: bytes since it was last closed, which no sum knows yet; `rescued`: how many seconds ago a rescue
    copy was taken of it (0: none was)."""

    path: bytes
    size: int
    since: float
    open: bool = False
    grown: int = 0
    rescued: float = 0.0


class Scrub(msgspec.Struct, frozen=True):
    """The reading back of all copies, every so many seconds (0: never): moments in seconds since the epoch,
    `ended` 0 while a pass is not over; files and bytes it has read; how many copies cannot be had back."""

    every: float
    running: bool = False
    began: float = 0.0
    ended: float = 0.0
    files: int = 0
    bytes: int = 0
    damaged: int = 0


class Ahead(msgspec.Struct, frozen=True):
    """Files that came before they were asked for, since the mover began; what is not used soon was in vain."""

    files: int
    bytes: int
    used_files: int
    used_bytes: int


class Status(Frame, frozen=True):
    """Facts of a volume. Sizes in bytes, rates in bytes a second, `oldest_dirty` in seconds of age.

    `journal_behind_seconds`: the age of the oldest change of names and attributes that is not in the store.
    """

    volume: str
    state: str
    store: str
    local_bytes: int
    local_limit: int
    total_bytes: int
    files: int
    stubs: int
    dirty_files: int
    dirty_bytes: int
    queued: int
    pids: dict[str, int]
    errors: list[Problem]
    lent_bytes: int = 0  # local for scans alone
    oldest_dirty: float = 0.0
    upload_rate: float = 0.0
    fetch_rate: float = 0.0
    verifying: int = 0
    journal_behind_seconds: float = 0.0
    notes: list[str] = []
    binding: dict[str, str] = {}  # name, reason, and form: compiled or pure
    scrub: Scrub | None = None
    waiting: list[Waiting] = []  # those that have waited longest
    server_deaths: int = 0  # since it was mounted: ends of these processes that nobody asked for
    mover_deaths: int = 0
    restarts: int = 0  # since it was mounted, by `tierfs restart`
    state_bytes: bytes = b""  # of former versions empty
    ahead: Ahead | None = None

    @property
    def where(self) -> str:
        """The state directory, its name as it is."""
        return os.fsdecode(self.state_bytes or self.state)


class Progress(Frame, frozen=True):
    """How far a request has come. `bytes_resumed`: of those done, what an earlier one did. `note`: what who
    waits should know."""

    files_done: int
    files_total: int
    bytes_done: int
    bytes_total: int
    path: bytes = b""
    bytes_resumed: int = 0
    note: str = ""


class Outcome(msgspec.Struct, frozen=True):
    """A path for which a request did not do what it asked. `failed`: an error, otherwise a rule kept it."""

    path: bytes
    reason: str
    failed: bool = False


class Done(Frame, frozen=True):
    """The end of a request: how many files it changed (or will), and those that it did not.

    `position`: of a Drain, what has marks in the log from there on may not be in the store.
    """

    files: int = 0
    stayed: list[Outcome] = []
    position: int = 0


class Finding(msgspec.Struct, frozen=True):
    """One thing that a check found. `repaired`: it is gone now."""

    what: str
    path: bytes = b""
    repaired: bool = False


class Findings(Frame, frozen=True):
    """The end of a check. `renewing`: the index is made anew first, and the check is to be asked again.

    `read_files`, `read_bytes`: of all copies those that were read, the `resumed_` ones by an earlier check.
    """

    findings: list[Finding]
    files: int = 0
    renewing: bool = False
    read_files: int = 0
    read_bytes: int = 0
    resumed_files: int = 0
    resumed_bytes: int = 0


class Failed(Frame, frozen=True):
    """The request failed; `message` says why, in a line for the person that is to follow the name of `path`."""

    errno: int
    message: str
    path: bytes = b""  # that it is about; the root: the volume as a whole


Answer = Facts | Status | Progress | Done | Findings | Failed | Version | Content | Garbage
Last = Status | Done | Findings

_encoder = msgspec.msgpack.Encoder()
_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_answers: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)


# --- framing ---------------------------------------------------------------------------------------------


def send(sock: socket.socket, frame: Frame) -> None:
    """Send one frame. Raises OSError."""
    try:
        data = _encoder.encode(frame)
    except UnicodeEncodeError:  # a message that names something whose name is no text
        data = _encoder.encode(_spelled(msgspec.to_builtins(frame, builtin_types=(bytes,))))
    sock.sendall(_LENGTH.pack(len(data)) + data)


def _spelled(value: Any) -> Any:
    match value:
        case str():
            return shown(value)
        case list():
            return [_spelled(each) for each in value]
        case dict():
            return {key: _spelled(each) for key, each in value.items()}
    return value


def receive_request(sock: socket.socket) -> Request | None:
    """The next request, None at the end of the stream. Raises UsageError for nonsense, OSError."""
    data = _receive(sock)
    try:
        return None if data is None else _requests.decode(data)
    except msgspec.MsgspecError as exc:
        raise UsageError(f"the request is not understood: {exc}") from exc


def receive_answer(sock: socket.socket) -> Answer | None:
    """The next answer, None at the end of the stream. Raises UsageError for nonsense, OSError."""
    data = _receive(sock)
    try:
        return None if data is None else _answers.decode(data)
    except msgspec.MsgspecError as exc:
        raise UsageError(f"the daemon's answer is not understood: {exc}") from exc


def _receive(sock: socket.socket) -> bytes | None:
    head = _receive_exactly(sock, _LENGTH.size)
    if head is None:
        return None
    (length,) = _LENGTH.unpack(head)
    if length > MAX_FRAME:
        raise UsageError(f"a frame of {length} bytes is too long")
    body = _receive_exactly(sock, length)
    if body is None:
        raise ConnectionResetError("the connection ended inside a frame")
    return body


def _receive_exactly(sock: socket.socket, size: int) -> bytes | None:
    parts: list[bytes] = []
    left = size
    while left:
        part = sock.recv(min(left, 1 << 20))
        if not part:
            if parts:
                raise ConnectionResetError("the connection ended inside a frame")
            return None
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


# --- where the socket is ---------------------------------------------------------------------------------


def runtime_directory(uid: int) -> str:
    """The directory in which a daemon of this user has its socket."""
    if uid == 0:
        return "/run/tierfs"
    given = os.environ.get("XDG_RUNTIME_DIR", "")
    for base in (given, f"/run/user/{uid}"):
        if base.startswith("/") and _belongs(base, uid):
            return os.path.join(base, "tierfs")
    return f"/tmp/tierfs-{uid}"


def runtime_directories(uid: int) -> list[str]:
    """Where a daemon of this user may have its socket: also one that was begun outside of a login."""
    places = dict.fromkeys([runtime_directory(uid), *([f"/tmp/tierfs-{uid}"] if uid else [])])
    return [place for place in places if _belongs(place, uid)]


def socket_path(volume: str, uid: int) -> str:
    """The control socket of a volume whose daemon runs as `uid`."""
    return os.path.join(runtime_directory(uid), f"{volume}.sock")


def make_runtime_directory(uid: int) -> str:
    """Create the directory for the socket. Raises VolumeError where it is not safe to use."""
    path = runtime_directory(uid)
    mode = 0o755 if uid == 0 else 0o700
    try:
        os.makedirs(path, mode, exist_ok=True)
        if not _belongs(path, uid):
            raise VolumeError(f"{path}: belongs to another user: remove it, or set XDG_RUNTIME_DIR")
        os.chmod(path, mode)
    except OSError as exc:
        raise VolumeError(f"{path}: cannot be made: {exc.strerror}") from exc
    return path


def _belongs(path: str, uid: int) -> bool:
    try:
        status = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == uid


# --- the client ------------------------------------------------------------------------------------------


def connect(mount: Mount) -> socket.socket:
    """Connect to the daemon of a mount, and make sure that it is the mount owner's.

    Raises VolumeError where nobody listens, NotPermittedError.
    """
    candidates = [socket_path(mount.volume, mount.uid), f"/tmp/tierfs-{mount.uid}/{mount.volume}.sock"]
    for path in candidates:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            sock.connect(path)
        except PermissionError as exc:
            sock.close()
            raise NotPermittedError(
                f"{mount.mountpoint}: its daemon belongs to another user: act as that user or as root"
            ) from exc
        except OSError:
            sock.close()
            continue
        _, uid, _ = peer_credentials(sock)
        if uid in (0, mount.uid):
            return sock
        sock.close()
    raise VolumeError(
        f"{mount.mountpoint}: its daemon does not answer: unmount it with `umount -l`, then mount it again"
    )


def peer_credentials(sock: socket.socket) -> tuple[int, int, int]:
    """(pid, uid, gid) of the process at the other end; for a client that is the supervisor, which listens."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, gid = _CREDENTIALS.unpack(raw)
    return pid, uid, gid


def converse(mount: Mount, request: Request) -> Iterator[Answer]:
    """Send one request and yield its answers, the last one included. Closing the iterator cancels the request.

    What only looks is asked once more where the mover ends beneath it, as with a server that has just died.
    Raises the error that the daemon reports, VolumeError where the daemon goes away.
    """
    seconds = _QUICK_SECONDS if isinstance(request, GetStatus | GetFacts | ListNames | GetPins) else None
    answers = _ask(mount, request, seconds)
    if seconds is not None:
        try:
            first = next(answers)
        except _GoneError:
            answers = _ask(mount, request, seconds)
        else:
            yield first
    yield from answers


class _GoneError(VolumeError):
    """The connection has ended."""


def _ask(mount: Mount, request: Request, seconds: float | None) -> Iterator[Answer]:
    """`seconds`: how long each answer is waited for."""
    with connect(mount) as sock:
        try:
            sock.settimeout(seconds)
            send(sock, request)
            while (answer := receive_answer(sock)) is not None:
                if isinstance(answer, Failed):
                    raise error_of(answer, mount)
                yield answer
                if isinstance(answer, Last):
                    return
        except TimeoutError as exc:
            raise VolumeError(
                f"{mount.mountpoint}: its mover does not answer: see log/tierfs.log in the state directory"
            ) from exc
        except OSError as exc:
            raise _GoneError(f"{mount.mountpoint}: its daemon went away: see its log") from exc
    raise _GoneError(f"{mount.mountpoint}: its daemon was restarted: try again")


def error_of(answer: Failed, mount: Mount) -> TierError:
    """The error that a `Failed` stands for; it names the path as it is seen in this mount."""
    classes: dict[int, type[TierError]] = {
        NotPermittedError.errno: NotPermittedError,
        PathError.errno: PathError,
    }
    text = f"{mount.shown(answer.path)}: {answer.message}"
    error = classes.get(answer.errno, TierError)(text)
    error.errno = answer.errno
    return error


def to_json(frame: Any) -> dict[str, Any]:
    """The fields of an answer for `--json`: paths as text, no tag."""
    fields: dict[str, Any] = msgspec.to_builtins(frame, builtin_types=(bytes,))
    fields.pop("type", None)
    return {key: os.fsdecode(value) if isinstance(value, bytes) else value for key, value in fields.items()}
