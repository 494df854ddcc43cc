"""Bringing content back (custody rules 10, 11, 13, 14): what the mount server asks for, and how it ends.

    Fetch → Arrival opened: stub, record, digests, bits → ranges through the pool → digest checked
      → page cache and times → Filled (readers go on) → every 2 s: fdatasync, bits committed
      → all here: settling.py

A request ends with FetchEnd as soon as all it covers is here, or at its first failure. What fails while
the mover is ending does not end: the server asks the next mover for all that it has heard no end of.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Generator
from concurrent import futures
from functools import partial

from tierfs import failpoints, wire
from tierfs.arrivals import Arrival, Range, Request
from tierfs.breadth import MANY, Breadth
from tierfs.digests import have_digests, sha256
from tierfs.errors import BusyError, FetchTimeoutError, ObjectCorruptError, TierError
from tierfs.kit import Kit
from tierfs.model import LEAF, leaf_count
from tierfs.opening import AlreadyResident, Opener, note_pending
from tierfs.passing import Passer
from tierfs.store.base import Body
from tierfs.transfer import Urgency

log = logging.getLogger("mover")

_FULL = (errno.ENOSPC, errno.EDQUOT)


class Filler:
    """One flight a chunk: what is coming is known per file, and nothing is asked for twice."""

    def __init__(
        self,
        kit: Kit,
        settle: Callable[[Arrival], None],
        make_room: Callable[[int, bool], None],
        hurry: Callable[[], None] = lambda: None,
        asked: Callable[[int, int], None] = lambda fd, pid: None,
        ended: Callable[[int, int], None] = lambda ino, number: None,
    ) -> None:
        """`settle` takes a file of which every leaf is here; `make_room` frees so many bytes of local disk,
        where (True) a write has just failed for want of them. `asked` hears of each small file (by a
        descriptor) that somebody waits for, and whose thread that is; `ended` of each that was asked for as a
        whole how that ended (errno)."""
        self._kit = kit
        self._settle = settle
        self._make_room = make_room
        self._hurry = hurry
        self._asked = asked
        self._ended = ended
        self._lock = threading.Lock()
        self._arrivals: dict[int, Arrival | None] = {}  # None: being opened
        self._waiting: dict[int, list[Request]] = {}  # for one that is being opened
        self._requests: dict[int, Request] = {}
        self._opener = Opener(kit)
        self._passer = Passer(kit, self._fetched)
        self._breadth = Breadth()

    # --- the server's messages, in the link's thread ------------------------------------------------------

    def on_fetch(self, message: wire.Fetch, opath: int, lent: bool = False) -> None:
        """Take a request; the descriptor is ours. `lent`: it comes for a scan."""
        request = Request(
            message.id, message.ino, message.stub, message.size, message.start,
            min(message.start + message.length, message.size), message.whole, message.ahead,
            time.monotonic() + self._kit.config.fetch_timeout, message.passable,
            (message.mtime, message.ctime), message.ordered, lent, message.pid,
        )  # fmt: skip
        with self._lock:
            self._requests[request.id] = request
        try:
            self._kit.fetches.post(self._urgency(request), partial(self._begin, request, opath))
        except BusyError as error:
            self._note(request.ino, self._kit.name_of(opath), error)
            os.close(opath)
            self._end(request, error)

    def on_cancel(self, message: wire.CancelFetch) -> None:
        """End a request; when this returns nothing is written for it any more."""
        with self._lock:
            request = self._requests.get(message.id)
            if request is None:
                return
            request.cancelled = True
            arrival = self._arrivals.get(request.ino)
        if arrival is not None:
            with arrival.lock:  # a write that is under way has ended now
                if request in arrival.requests:
                    arrival.requests.remove(request)
        self._end(request, OSError(errno.ECANCELED, "cancelled"))

    def stop(self) -> None:
        """Give up waiting for a store that does not answer, and leave what fails from now on to the next mover.

        Before anything else of this one is stopped: nobody shall hear of that as an error.
        """
        self._opener.stopping.set()

    @property
    def waiting(self) -> int:
        """Requests that have not ended."""
        return len(self._requests)

    @property
    def is_waited_for(self) -> bool:
        """Somebody waits for content, and no order does it for him."""
        with self._lock:
            return any(not request.ordered for request in self._requests.values())

    def arrival(self, ino: int) -> Arrival | None:
        """The file's state, if something of it is being fetched."""
        with self._lock:
            return self._arrivals.get(ino)

    def is_wanted(self, ino: int) -> bool:
        """Somebody waits for content of this file: it does not leave before that has come."""
        with self._lock:
            arrival = self._arrivals.get(ino)
            return ino in self._arrivals and (arrival is None or bool(arrival.requests))

    def times_set(self, ino: int, mtime: int, ctime: int) -> None:
        """Somebody has changed the attributes of a file that may be coming in: it shows these times."""
        arrival = self.arrival(ino)
        if arrival is not None:
            with arrival.lock:
                arrival.shown.mtime, arrival.shown.ctime = mtime, ctime

    def unsynced(self) -> list[Arrival]:
        """Files with leaves whose bits are not committed, or that nobody asks for any more."""
        with self._lock:
            return [a for a in self._arrivals.values() if a is not None and not a.settling]

    def drop(self, arrival: Arrival, former: bool = False) -> bool:
        """Forget a file that nobody asks for, and give up its claim; False where somebody still does, or where
        something has come that the index does not know of. `former`: its content is no longer this inode's.
        """
        with self._lock, arrival.lock:
            if arrival.moved and not former:
                return False  # whoever opens it next would take the times that we have left for somebody's
            # One of which every leaf is here is about to be settled, or already queued for it.
            if arrival.requests or arrival.ranges or arrival.closed or arrival.settling or arrival.complete:
                return False
            self._close(arrival)
            # Nothing is written any more; what was noted at the opening is over if the times are right again.
            if arrival.times_right:
                self._kit.index.post(lambda w: w.drop_pending(arrival.ino))
            return True

    def settled(self, arrival: Arrival) -> None:
        """It is resident, or (it says so itself) could not be made so: whoever joined meanwhile has ended."""
        with self._lock, arrival.lock:
            requests, arrival.requests = arrival.requests, []
            self._close(arrival)
        for request in requests:
            self._end(request, None)

    def _close(self, arrival: Arrival) -> None:
        if arrival.closed:
            return  # its descriptor's number may be another file's by now
        arrival.closed = True
        if self._arrivals.get(arrival.ino) is arrival:
            del self._arrivals[arrival.ino]
        os.close(arrival.fd)
        self._kit.claims.give(arrival.ino)

    def _urgency(self, request: Request) -> Urgency:
        large = request.whole and request.size > 1 << self._kit.chunk_shift
        behind = request.ahead or request.ordered or request.lent or large
        return Urgency.AHEAD if behind else Urgency.READER

    def _most(self, request: Request) -> int:
        """How many ranges of its file may be under way. Who waits for these very bytes waits for no others."""
        return self._breadth.count if request.ahead or request.whole else MANY

    # --- beginning, in the pool ---------------------------------------------------------------------------

    def _begin(self, request: Request, opath: int) -> None:
        try:
            if not request.cancelled:
                self._take(request, opath)
        except (TierError, OSError) as error:
            self._note(request.ino, self._kit.name_of(opath), error)
            self._end(request, error)
        except Exception as error:  # a defect: whoever waits has to hear of it
            log.exception("a request for inode %d", request.ino)
            self._end(request, _defect(error))
        finally:
            os.close(opath)

    def _note(self, ino: int, name: str, error: Exception, what: str = "fetched") -> None:
        """Whoever is told EIO finds the reason in `status` and the log."""
        if not self._opener.stopping.is_set():
            self._kit.troubles.note(f"{name} cannot be {what}: {_text(error)}", ino)

    def _take(self, request: Request, opath: int) -> None:
        ino = request.ino
        with self._lock:
            arrival = self._arrivals.get(ino)
            opening = ino in self._arrivals and arrival is None
            if opening:
                self._waiting.setdefault(ino, []).append(request)
            elif arrival is None:
                self._arrivals[ino] = None
        if opening:
            return
        if arrival is None:
            self._open_for(request, opath)
        elif not self._join(arrival, request):
            # Of a former content of this inode, or closed just now.
            self._again(arrival, request, opath)

    def _again(self, arrival: Arrival, request: Request, opath: int) -> None:
        self.drop(arrival, former=arrival.stub.pack() != request.stub)
        time.sleep(0.001)
        self._begin_soon(Urgency.READER, request, opath)

    def _begin_soon(self, urgency: Urgency, request: Request, opath: int) -> None:
        """In the pool, by a descriptor of its own. Raises BusyError, OSError."""
        own = os.dup(opath)
        try:
            self._kit.fetches.post(urgency, partial(self._begin, request, own))
        except BusyError:
            os.close(own)
            raise

    def _join(self, arrival: Arrival, request: Request) -> bool:
        with arrival.lock:
            if arrival.closed or arrival.stub.pack() != request.stub:
                return False
            if request.cancelled:
                return True
            arrival.requests.append(request)
            arrival.lent &= request.lent
            arrival.awaited |= request.whole and not request.passable
        self._serve(arrival, request)
        return True

    def _open_for(self, request: Request, opath: int) -> None:
        """Open the file's state, then serve this request and those that came meanwhile."""
        ino, arrival = request.ino, None
        problem: Exception | None = None
        try:
            arrival = self._opener.open(request, opath)
            # Waited for before the first write, not before the first request.
            arrival.noted = self._kit.index.commit(partial(note_pending, arrival), later=True)
        except AlreadyResident:
            log.debug("inode %d is resident already", ino)
        except (TierError, OSError) as error:
            problem = error
        except Exception as error:  # a defect: nobody else may wait for this opening for ever
            log.exception("the opening of inode %d", ino)
            problem = _defect(error)
        with self._lock:
            requests = [request, *self._waiting.pop(ino, [])]
            if arrival is None:
                del self._arrivals[ino]
            else:
                self._arrivals[ino] = arrival
        if arrival is None:
            if problem is not None:
                self._note(ino, self._kit.name_of(opath), problem)
            for each in requests:
                self._end(each, problem)
            if problem is None:
                self._kit.server.send(wire.Settled(ino))
                self._kit.outcomes.tell(ino, 0, "")
            return
        # Serving the first one waits for its content, which the others need not.
        for each in requests[1:]:
            try:
                self._begin_soon(self._urgency(each), each, opath)
            except (BusyError, OSError) as error:
                self._end(each, error)
        if not self._join(arrival, request):
            self._again(arrival, request, opath)

    # --- serving ------------------------------------------------------------------------------------------

    def _serve(self, arrival: Arrival, request: Request) -> None:
        """Say what is here, fetch what is not: the first range in this thread, the others in the pool."""
        if arrival.small and not request.ordered:
            self._asked(arrival.fd, request.pid)
        with arrival.lock:
            here = arrival.runs(request)
            ranges = arrival.next_ranges(request, self._most(request))
        for start, end in here:
            self._kit.server.send(wire.Filled(arrival.ino, start, end - start))
        if arrival.complete:
            self._finish(arrival)
            return
        for piece in ranges[1:]:
            self._kit.fetches.post(self._urgency(request), partial(self._bring, arrival, piece, request))
        if ranges:
            self._bring(arrival, ranges[0], request)
        else:
            self._end_done(arrival)

    def _bring(self, arrival: Arrival, piece: Range, request: Request) -> None:
        """Fetch, check and write one range. `request` is the first that asked for it."""
        data: Body | None = None
        try:
            if piece.ahead and self._passer.is_full(piece.end - piece.start):
                raise self._passer.found_full()
            while piece.start < piece.end:
                data = self._opener.patiently(partial(self._stream, arrival, piece), request)
                if data is None or not self._squeeze_in(arrival, piece, data):
                    break
                data = None
        except (TierError, OSError) as error:
            if isinstance(error, OSError) and error.errno in _FULL:
                self._pass_on(arrival, piece, data, error)
            else:
                self._failed(arrival, piece, error)
            return
        except Exception as error:  # a defect: others that wait for this file are served all the same
            log.exception("a range of inode %d", arrival.ino)
            self._failed(arrival, piece, _defect(error))
            return
        with arrival.lock:
            arrival.ended(piece)
        self._continue(arrival)

    def _stream(self, arrival: Arrival, piece: Range) -> Body | None:
        """Write the rest of a range as it comes, for as long as somebody wants it. What has come stays.

        Returns checked bytes of its beginning for which there is no room. Raises TierError, OSError.
        """
        with arrival.lock:
            if not arrival.wanted(piece):
                return None
        with contextlib.closing(self._parts(arrival, piece)) as parts:
            for data in parts:
                self._check(arrival, piece, data)
                self._kit.fetched.add(len(data))
                try:
                    if not self._kit.has_room(len(data)):
                        return bytes(data)  # the next range may come in its place
                    if not self._fill(arrival, piece, data):
                        return None
                except OSError as error:
                    if error.errno not in _FULL:
                        raise
                    return bytes(data)
        if piece.start < piece.end:
            raise ObjectCorruptError(f"{arrival.stub.key}: bytes at {piece.start} are missing")
        return None

    def _parts(self, arrival: Arrival, piece: Range) -> Generator[Body]:
        """The range in parts that can be checked each by itself."""
        store, key, count = self._kit.store, arrival.stub.key, piece.end - piece.start
        if arrival.small:
            yield store.get(key, piece.start, count)
        else:
            yield from store.pieces(key, piece.start, count)

    def _fetched(self, arrival: Arrival, piece: Range, request: Request) -> Body:
        """The checked bytes, which nothing is done with. Raises TierError."""

        def get() -> Body:
            data = self._kit.store.get(arrival.stub.key, piece.start, piece.end - piece.start)
            self._check(arrival, piece, data, whole=True)
            self._kit.fetched.add(len(data))
            return data

        return self._opener.patiently(get, request)

    def _check(self, arrival: Arrival, piece: Range, data: Body, whole: bool = False) -> None:
        """Whether these bytes are those with which the range begins, or (`whole`) all of it."""
        left = piece.end - piece.start - len(data)
        if arrival.small:
            good = len(data) == arrival.size and sha256(data) == arrival.stub.digest
        else:
            first = piece.start // LEAF
            wanted = arrival.digests[first * 32 : (first + leaf_count(len(data))) * 32]
            good = bool(data) and have_digests(data, wanted)
        if not good or left < 0 or (whole and left):
            raise ObjectCorruptError(f"{arrival.stub.key}: bytes at {piece.start} do not match their digest")

    def _squeeze_in(self, arrival: Arrival, piece: Range, data: Body) -> bool:
        """As `_fill`, for what has found no room. Nothing is asked of the store meanwhile: it may be needed to
        make room."""
        if not self._kit.has_room(len(data)):
            if not self._passer.is_full(len(data)):
                self._make_room(len(data), False)
            if not self._kit.has_room(len(data)):
                raise self._passer.found_full()
        try:
            return self._fill(arrival, piece, data)
        except OSError as error:
            if error.errno not in _FULL:
                raise
        self._make_room(len(data), True)
        return self._fill(arrival, piece, data)

    def _fill(self, arrival: Arrival, piece: Range, data: Body) -> bool:
        """Write the bytes with which the range begins; False where nobody wants them. Raises as `fill`."""
        if arrival.noted is not None and not arrival.noted.done():
            # An index that cannot be written must not keep content away: then a crash may move times.
            self._kit.index.hurry()
            futures.wait([arrival.noted])
        with arrival.lock:
            if not arrival.wanted(piece):
                return False
            start, reach = piece.start, piece.end
            if piece.allocated or start + len(data) >= reach:
                reach = 0
            piece.allocated = True  # also where that fails: without it there may be room for these bytes
            arrival.fill(self._kit.tree, start, data, reach)
            under_way = len(arrival.ranges)
            arrival.landed(piece, len(data))
            arrival.unsynced += len(data)
            arrival.used = time.monotonic()
            self._breadth.came(len(data), under_way, arrival.used)
            failpoints.hit(failpoints.FILL_WRITTEN)
            self._kit.server.send(wire.Filled(arrival.ino, start, len(data)))
        return True

    def _continue(self, arrival: Arrival) -> None:
        """After a range: end who has all, ask for more on behalf of the others, or settle."""
        self._end_done(arrival)
        more: list[tuple[Request, Range]] = []
        with arrival.lock:
            complete = arrival.complete
            for request in arrival.requests:
                if not request.passing:
                    ranges = arrival.next_ranges(request, self._most(request))
                    more += [(request, piece) for piece in ranges]
        for request, piece in more:
            self._kit.fetches.post(self._urgency(request), partial(self._bring, arrival, piece, request))
        if complete:
            self._finish(arrival)

    def _finish(self, arrival: Arrival) -> None:
        self._end_done(arrival)
        with arrival.lock:
            if arrival.closed:
                return
            begun, arrival.settling = arrival.settling, True
        if not begun:
            self._settle(arrival)
        elif arrival.awaited:
            self._hurry()

    # --- ending -------------------------------------------------------------------------------------------

    def _end_done(self, arrival: Arrival) -> None:
        with arrival.lock:
            done = [request for request in arrival.requests if not arrival.lacks(request)]
            for request in done:
                arrival.requests.remove(request)
        for request in done:
            self._end(request, None)

    def _pass_on(self, arrival: Arrival, piece: Range, data: Body | None, error: OSError) -> None:
        """There is no room on the disk: who only reads gets the content in memory, others the error."""
        with arrival.lock:
            name = self._kit.name_of(arrival.fd)
            arrival.ended(piece)
            arrival.used = time.monotonic()
            hit = [r for r in arrival.requests if r.start < piece.end and r.end > piece.start and not r.passing]
            for request in hit:
                request.passing = True
        for request in hit:
            if not request.ahead:
                self._note(arrival.ino, name, error, "brought to this disk")
            problem: Exception | None = error
            try:
                if self._passer.serve(arrival, request, piece, data):
                    problem = None
            except (TierError, OSError) as failure:
                problem = failure
                self._note(arrival.ino, name, failure)
            except Exception as failure:
                log.exception("a range of inode %d, past a full disk", arrival.ino)
                problem = _defect(failure)
            with arrival.lock:
                if request in arrival.requests:
                    arrival.requests.remove(request)
            self._end(request, problem)
        self._end_done(arrival)

    def _failed(self, arrival: Arrival, piece: Range, error: Exception) -> None:
        with arrival.lock:
            name = self._kit.name_of(arrival.fd)  # its descriptor may be closed when nobody asks any more
            arrival.ended(piece)
            hit = [r for r in arrival.requests if r.start < piece.end and r.end > piece.start]
            for request in hit:
                arrival.requests.remove(request)
        if hit:
            self._note(arrival.ino, name, error)
        for request in hit:
            self._end(request, error)
        self._end_done(arrival)

    def _end(self, request: Request, error: Exception | None) -> None:
        """Say FetchEnd, once; of an error not where the next mover may do better."""
        with self._lock:
            if self._requests.pop(request.id, None) is None:
                return
        number, left = 0, False
        if error is not None:
            number = getattr(error, "errno", None) or errno.EIO
            if number != errno.ECANCELED and number not in _FULL:
                number = errno.EIO
            left = self._opener.stopping.is_set() and number != errno.ECANCELED
        reason = _text(error) if error is not None else ""
        if number and request.whole:
            late = isinstance(error, FetchTimeoutError)
            self._kit.outcomes.tell(request.ino, errno.ETIMEDOUT if late else number, reason)
        try:
            if not left:
                self._kit.server.send(wire.FetchEnd(request.id, request.ino, number, reason))
        except BusyError:
            log.debug("the server is gone; a new one asks a new mover")
        if request.whole:
            self._ended(request.ino, number)


def _defect(error: Exception) -> OSError:
    """What those are told who wait for something that has failed in a way that nobody has thought of."""
    return OSError(errno.EIO, str(error))


def _text(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
