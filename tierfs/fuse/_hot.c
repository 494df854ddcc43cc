/* The commonest requests, compiled: they would cost the interpreter more than the kernel. LOOKUP and GETATTR of what
 * is plainly there, listings, OPEN and RELEASE of resident files, names and links that come, go or change, FORGET.
 * Everything else, and whatever is not quite plain, is left to Python, before anything has been changed: there is no
 * meaning here that vfs, nodes, names, dirs, openfiles and gate do not have.
 *
 * SOURCES says from which files it was built: a module of other sources is not used (tierfs/fuse/compiled.py).
 */
#include "_hot.h"

#include <string.h>
#include <structmember.h>
#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>

#ifndef TIERFS_SOURCES
#define TIERFS_SOURCES ""
#endif

enum {
    LOOKUP = 1, FORGET = 2, GETATTR = 3, SETATTR = 4, READLINK = 5, SYMLINK = 6, MKDIR = 9, UNLINK = 10, RMDIR = 11,
    RENAME = 12, LINK = 13, OPEN = 14, RELEASE = 18, SETXATTR = 21, GETXATTR = 22, LISTXATTR = 23, REMOVEXATTR = 24,
    READDIR = 28, CREATE = 35, IOCTL = 39, BATCH_FORGET = 42, READDIRPLUS = 44, RENAME2 = 45, COPY_FILE_RANGE = 47,
    COPY_FILE_RANGE_64 = 53,
}; /* opcodes */
enum { GETATTR_FH = 1 };
#define INVAL_INODE 2 /* a notification, in the place of the errno */
#define NO_SLEEP 3e-6 /* seconds: a sleep takes longer, by the switch to another process and back */
#define MOST_EAGER 2 /* vain attempts to read */

#define NAME(name) struct attribute s_##name[1];
NAMES(NAME)
#undef NAME

/* --- requests -------------------------------------------------------------------------------------------- */

/* A body's fields; 0 where it is too short. */
static int fields(const char *message, Py_ssize_t size, void *to, size_t length)
{
    if (size < (Py_ssize_t)(sizeof(struct in_header) + length))
        return 0;
    memcpy(to, message + sizeof(struct in_header), length);
    return 1;
}

/* The nodes that the kernel gives back, one or several. */
static enum outcome forget_all(Hot *hot, const struct in_header *in, const char *message, Py_ssize_t size)
{
    uint64_t count;
    struct { uint32_t count, padding; } batch;
    if (in->opcode == FORGET)
        return !fields(message, size, &count, sizeof count) ? PYTHONS
               : forget(hot, in->nodeid, count) ? FAILED : FOUND;
    size_t at = sizeof *in + sizeof batch;
    if (!fields(message, size, &batch, sizeof batch) || batch.count > (size - at) / (2 * sizeof(uint64_t)))
        return PYTHONS;
    for (; batch.count; batch.count--, at += 2 * sizeof(uint64_t)) {
        uint64_t one[2];
        memcpy(one, message + at, sizeof one);
        if (forget(hot, one[0], one[1]))
            return FAILED;
    }
    return FOUND;
}

union body {
    struct entry_out entry;
    struct attr_out attr;
    struct open_out open;
    struct create_out create;
    char value[MOST_VALUE];
    char target[LINK_ROOM];
    uint64_t copied;
    char entries[1 << 16];
};

/* The name at this place of a message; NULL where it does not end within. */
static const char *name_at(const char *message, Py_ssize_t length, size_t at)
{
    return (Py_ssize_t)at < length && memchr(message + at, 0, length - at) ? message + at : NULL;
}

/* The name that is all of a message's body; NULL where something else is in it. */
static const char *only_name(const char *message, Py_ssize_t length)
{
    const char *name = message + sizeof(struct in_header);
    return strnlen(name, message + length - name) + 1 == (size_t)(message + length - name) ? name : NULL;
}

/* RENAME, and RENAME2 without flags. */
static enum outcome rename_one(Hot *hot, const struct in_header *in, const char *message, Py_ssize_t length)
{
    struct { uint64_t parent; uint32_t flags, padding; } to = {0, 0, 0};
    size_t fixed = in->opcode == RENAME ? sizeof to.parent : sizeof to;
    if (!fields(message, length, &to, fixed) || to.flags)
        return PYTHONS;
    const char *name = name_at(message, length, sizeof *in + fixed);
    const char *new_name = name ? name_at(message, length, name - message + strlen(name) + 1) : NULL;
    return new_name ? rename_name(hot, in, name, to.parent, new_name) : PYTHONS;
}

/* LINK and SYMLINK. */
static enum outcome link_one(Hot *hot, const struct in_header *in, const char *message, Py_ssize_t length,
                             struct entry_out *entry)
{
    uint64_t linked = 0;
    size_t fixed = in->opcode == LINK ? sizeof linked : 0;
    const char *name = fields(message, length, &linked, fixed) ? name_at(message, length, sizeof *in + fixed) : NULL;
    if (!name || in->opcode == LINK)
        return name ? link_file(hot, in, linked, name, entry) : PYTHONS;
    const char *target = name_at(message, length, name - message + strlen(name) + 1);
    return target ? make_symlink(hot, in, name, target, entry) : PYTHONS;
}

/* MKDIR and CREATE. */
static enum outcome make_one(Hot *hot, const struct in_header *in, const char *message, Py_ssize_t length,
                             union body *body)
{
    uint32_t how[4];
    size_t fixed = in->opcode == MKDIR ? 8 : 16;
    const char *name = fields(message, length, how, fixed) ? name_at(message, length, sizeof *in + fixed) : NULL;
    if (!name)
        return PYTHONS;
    return in->opcode == MKDIR ? make_directory(hot, in, how[0], how[1], name, &body->entry)
                               : create_file(hot, in, how[0], how[1], how[2], name, &body->create);
}

/* Tell Python what has become of a request. 0, or -1 with an exception. */
static int told(PyObject *whom, uint64_t unique, PyObject *what)
{
    PyObject *done = what ? PyObject_CallFunction(whom, "KO", (unsigned long long)unique, what) : NULL;
    Py_XDECREF(what);
    Py_XDECREF(done);
    return done ? 0 : -1;
}

/* Whether the kernel knows the node; -1 with an exception. */
static int knows_outdated(Hot *hot, uint64_t nodeid)
{
    struct { struct out_header head; uint64_t nodeid; int64_t offset, length; } notice = {
        {sizeof notice, INVAL_INODE, 0}, nodeid, -1, 0,
    };
    if (write(hot->fd, &notice, sizeof notice) >= 0)
        return 1;
    int number = errno;
    return told(hot->refused, 0, PyLong_FromLong(number)) ? -1 : number != ENOENT;
}

int outdated(Hot *hot, uint64_t nodeid)
{
    return knows_outdated(hot, nodeid) < 0 ? -1 : 0;
}

/* What a request that was answered changes of the node that it is about, which the kernel then takes for outdated, but
 * not what it was told before and has yet to take in (operations.Operations._changed). 0, or -1 with an exception. */
static int node_outdated(Hot *hot, const struct in_header *in)
{
    switch (in->opcode) {
    case SYMLINK: case MKDIR: case UNLINK: case RMDIR: case RENAME: case LINK: case SETXATTR: case REMOVEXATTR:
    case CREATE: case RENAME2:
        return hot->long_seconds && !has_taken_in(hot, in->nodeid, in->pid) ? outdated(hot, in->nodeid) : 0;
    default:
        return 0;
    }
}

/* Of which nodes an answer has the attributes. */
static void note_told(Hot *hot, const struct in_header *in, const union body *body)
{
    switch (in->opcode) {
    case MKDIR: case SYMLINK: case LINK: case CREATE:
        told_for(hot, body->entry.nodeid, entry_lasts(&body->entry));
        /* fall through */
    case LOOKUP:
        told_to(hot, body->entry.nodeid, in->pid);
        break;
    case GETATTR: case SETATTR:
        told_for_now(hot, in->nodeid, body->attr.attr_valid);
        told_to(hot, in->nodeid, in->pid);
        break;
    case READDIRPLUS:
        anybody_told(hot);
    }
}

/* Python is to answer it: of any node, to anybody, and perhaps later. */
static void left_to_python(Hot *hot)
{
    anybody_told(hot);
    none_is_new(hot);
}

/* OPEN. What the kernel was told before knows nothing of a write through a mapping (operations.open). */
static enum outcome open_one(Hot *hot, const struct in_header *in, uint32_t flags, struct open_out *out)
{
    enum outcome outcome = open_file(hot, in, flags, out);
    int writable = (flags & O_ACCMODE) != O_RDONLY;
    return outcome == FOUND && writable && outdated(hot, in->nodeid) ? FAILED : outcome;
}

/* SETXATTR. */
static enum outcome set_one(Hot *hot, const struct in_header *in, const char *message, Py_ssize_t length)
{
    struct setxattr_in ask;
    const char *name = NULL;
    if (fields(message, length, &ask, sizeof ask))
        name = name_at(message, length, sizeof *in + sizeof ask);
    const char *value = name ? name + strlen(name) + 1 : NULL;
    int whole = name && ask.size <= (size_t)(message + length - value);
    return whole ? set_xattr(hot, in->nodeid, &ask, name, value) : PYTHONS;
}

/* LOOKUP. That a name is absent is believed for a moment (operations.lookup). */
static enum outcome look_one(Hot *hot, uint64_t above, const char *message, Py_ssize_t length, struct entry_out *entry)
{
    const char *name = only_name(message, length);
    enum outcome outcome = name ? look_up(hot, above, name, strlen(name), 0, entry) : PYTHONS;
    if (outcome == ABSENT)
        *entry = (struct entry_out){.entry_valid = hot->entry_seconds};
    return outcome == ABSENT ? FOUND : outcome;
}

/* READDIR and READDIRPLUS. */
static enum outcome list_one(Hot *hot, const struct in_header *in, const char *message, Py_ssize_t length,
                             union body *body, size_t *size)
{
    struct read_in ask;
    if (!fields(message, length, &ask, sizeof ask) || ask.fh)
        return PYTHONS;
    size_t room = ask.size < sizeof body->entries ? ask.size : sizeof body->entries;
    return list_directory(hot, in->nodeid, ask.offset, room, in->opcode == READDIRPLUS, body->entries, size);
}

/* Carry out a request; `body` is filled in, and *size of it is to be sent. */
static enum outcome carried_out(Hot *hot, const struct in_header *in, const char *message, Py_ssize_t length,
                                union body *body, size_t *size)
{
    struct { uint32_t flags, more; uint64_t fh; } ask;
    struct setattr_in set;
    struct copy_in copy;
    struct release_in release;
    const char *name;
    switch (in->opcode) {
    case LOOKUP:
        *size = sizeof body->entry;
        return look_one(hot, in->nodeid, message, length, &body->entry);
    case GETATTR:
        *size = sizeof body->attr;
        if (!fields(message, length, &ask, sizeof ask))
            return PYTHONS;
        return ask.flags & GETATTR_FH ? get_attributes_of_file(hot, in->nodeid, ask.fh, &body->attr)
                                      : get_attributes(hot, in->nodeid, &body->attr);
    case SETATTR:
        *size = sizeof body->attr;
        return !fields(message, length, &set, sizeof set) ? PYTHONS
               : set_attributes(hot, in->nodeid, &set, &body->attr);
    case OPEN:
        *size = sizeof body->open;
        return !fields(message, length, &ask, 8) ? PYTHONS : open_one(hot, in, ask.flags, &body->open);
    case RELEASE:
        *size = 0;
        return !fields(message, length, &release, sizeof release) ? PYTHONS : release_file(hot, release.fh);
    case GETXATTR:
        name = fields(message, length, &ask, 8) ? name_at(message, length, sizeof *in + 8) : NULL;
        return name ? get_xattr(hot, in->nodeid, ask.flags, name, body->value, size) : PYTHONS;
    case SETXATTR:
        *size = 0;
        return set_one(hot, in, message, length);
    case REMOVEXATTR:
        *size = 0;
        name = only_name(message, length);
        return name ? remove_xattr(hot, in, name) : PYTHONS;
    case LISTXATTR:
        return !fields(message, length, &ask, 8) ? PYTHONS
               : list_xattrs(hot, in->nodeid, ask.flags, body->value, size);
    case COPY_FILE_RANGE:
    case COPY_FILE_RANGE_64:
        *size = sizeof body->copied; /* the former's 32 bits are followed by as many of nothing */
        return !fields(message, length, &copy, sizeof copy) ? PYTHONS : copy_range(hot, in, &copy, &body->copied);
    case IOCTL:
        return NO_TERMINAL; /* no file of ours is one, nor knows another */
    case UNLINK:
    case RMDIR:
        *size = 0;
        name = only_name(message, length);
        return name ? remove_name(hot, in, name, strlen(name), in->opcode == RMDIR) : PYTHONS;
    case RENAME:
    case RENAME2:
        *size = 0;
        return rename_one(hot, in, message, length);
    case LINK:
    case SYMLINK:
        *size = sizeof body->entry;
        return link_one(hot, in, message, length, &body->entry);
    case READLINK:
        return read_link(hot, in->nodeid, body->target, size);
    case MKDIR:
    case CREATE:
        *size = in->opcode == MKDIR ? sizeof body->entry : sizeof body->create;
        return make_one(hot, in, message, length, body);
    case READDIR:
    case READDIRPLUS:
        return list_one(hot, in, message, length, body, size);
    case FORGET:
    case BATCH_FORGET:
        return forget_all(hot, in, message, length);
    default:
        return PYTHONS;
    }
}

/* The error that is set is the answer to this request. 0, or -1 with an exception. */
static int failed(Hot *hot, uint64_t unique)
{
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    PyErr_NormalizeException(&type, &value, &trace);
    Py_XDECREF(type);
    Py_XDECREF(trace);
    return told(hot->failed, unique, value);
}

/* Answer the request in the buffer: 1, or 0 where it is Python's. -1: with an exception. */
static int answer(Hot *hot, Py_ssize_t size)
{
    struct { struct out_header head; union body body; } reply;
    struct in_header in;
    memcpy(&in, hot->buffer.buf, sizeof in);
    size_t body = 0;
    asks(hot, &in);
    if (in.unique & RESENT || in.len != size || (in.len == sizeof in && in.opcode != READLINK)) {
        left_to_python(hot);
        return 0;
    }
    enum outcome outcome = carried_out(hot, &in, hot->buffer.buf, size, &reply.body, &body);
    if (outcome == FOUND && node_outdated(hot, &in))
        outcome = FAILED;
    if (outcome == FAILED)
        return failed(hot, in.unique) ? -1 : 1;
    if (outcome == PYTHONS) {
        PyErr_Clear(); /* Python's own way meets the same, and says it. */
        left_to_python(hot);
        return 0;
    }
    if (outcome == FOUND)
        note_told(hot, &in, &reply.body);
    if (in.opcode == FORGET || in.opcode == BATCH_FORGET)
        return 1;
    body = outcome == FOUND ? body : 0;
    static const int errors[] = {[ABSENT] = ENOENT, [NO_DATA] = ENODATA, [NO_TERMINAL] = ENOTTY, [FOUND] = 0};
    reply.head = (struct out_header){sizeof reply.head + body, -errors[outcome], in.unique};
    if (write(hot->fd, &reply, reply.head.len) < 0 && told(hot->refused, in.unique, PyLong_FromLong(errno)))
        return -1;
    return 1;
}

/* 0 with an exception set where it is not. */
static int is_open(Hot *hot)
{
    if (!hot->buffer.obj || !hot->memory.obj)
        PyErr_SetString(PyExc_ValueError, "closed");
    return hot->buffer.obj && hot->memory.obj;
}

/* What tells of a request of the kernel, and of what else ends a sleep; -1: nothing does. */
static int sleeper(Hot *hot)
{
    if (hot->sleeper >= 0 && hot->watched == hot->others)
        return hot->sleeper;
    if (hot->sleeper >= 0)
        close(hot->sleeper);
    hot->sleeper = epoll_create1(EPOLL_CLOEXEC);
    hot->watched = hot->others;
    int fds[] = {hot->fd, hot->others};
    for (int each = 0; each < 2 && fds[each] >= 0 && hot->sleeper >= 0; each++)
        if (epoll_ctl(hot->sleeper, EPOLL_CTL_ADD, fds[each], &(struct epoll_event){EPOLLIN, {.fd = fds[each]}})) {
            close(hot->sleeper);
            hot->sleeper = -1;
        }
    return hot->sleeper;
}

static double seconds_now(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec + now.tv_nsec * 1e-9;
}

/* Sleep until the kernel has a request: 1. 0: something else has come, a signal, or it is `until`. */
static int awaited(Hot *hot, double until)
{
    struct epoll_event events[2];
    double begun = seconds_now(), left = until - begun;
    int fd = left > 0 ? sleeper(hot) : -1;
    if (fd < 0)
        return 0;
    PyThreadState *state = paused();
    int ready = epoll_wait(fd, events, 2, left < 3600 ? (int)(left * 1000) + 1 : 3600000);
    resumed(state);
    /* Nobody has slept where the request was there already. */
    int quick = seconds_now() - begun < NO_SLEEP;
    hot->eager = quick ? MOST_EAGER : hot->eager;
    return ready == 1 && events[0].data.fd == hot->fd;
}

static PyObject *hot_receive(Hot *hot, PyObject *arguments)
{
    Py_ssize_t most;
    double until;
    hot->answered = 0;
    hot->used_last = 0;
    if (!PyArg_ParseTuple(arguments, "nd", &most, &until))
        return NULL;
    if (!is_open(hot))
        return NULL;
    for (int ready = 0; hot->answered < most;) {
        /* Who has just been answered asks for more as soon as it runs: it has where it displaced us at once, as is
         * usual on one processor, and else not. As it was it will be. */
        if (hot->answered && until > 0 && !ready && hot->eager <= 0 && !awaited(hot, until))
            break;
        ready = 0;
        ssize_t size = read(hot->fd, hot->buffer.buf, hot->buffer.len);
        if (size < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
            hot->eager -= hot->eager > 0;
            if (until > 0 && (ready = awaited(hot, until)))
                continue;
            if (hot->answered)
                break;
            Py_RETURN_NONE;
        }
        if (size < 0)
            return PyErr_SetFromErrno(PyExc_OSError);
        if (!size)
            Py_RETURN_NONE; /* the end of a file or socket, which the device has not */
        int done = size >= (ssize_t)sizeof(struct in_header) ? answer(hot, size) : 0;
        if (done < 0)
            return NULL;
        if (!done)
            return PyLong_FromSsize_t(size);
        hot->answered++;
    }
    return PyLong_FromLong(0);
}

static PyObject *hot_entry(Hot *hot, PyObject *arguments)
{
    unsigned long long nodeid;
    const char *name;
    Py_ssize_t length;
    struct entry_out out;
    hot->used_last = 0;
    if (!PyArg_ParseTuple(arguments, "Ky#", &nodeid, &name, &length))
        return NULL;
    if (!is_open(hot))
        return NULL;
    if (look_up(hot, nodeid, name, length, 1, &out) == FOUND)
        return PyBytes_FromStringAndSize((char *)&out, sizeof out);
    PyErr_Clear();
    Py_RETURN_NONE;
}

/* Of what is believed, so many inodes at most: a new list, or NULL with an exception. */
static PyObject *some_believed(Hot *hot, Py_ssize_t most)
{
    PyObject *some = PyList_New(0), *ino;
    for (Py_ssize_t at = 0; some && PyList_GET_SIZE(some) < most && PyDict_Next(hot->believed, &at, &ino, NULL);)
        if (PyList_Append(some, ino))
            Py_CLEAR(some);
    return some;
}

/* vfs.disbelieve of one inode, and the kernel is told; a node that it does not know is appended to `unknown`. 0, or -1
 * with an exception. */
static int disbelieved(Hot *hot, PyObject *ino, PyObject *unknown)
{
    PyObject *node = PyDict_GetItemWithError(hot->by_ino, ino);
    if (PyErr_Occurred() || PyDict_DelItem(hot->believed, ino))
        return -1;
    if (!node)
        return 0;
    uint64_t nodeid = number_of(node, s_id);
    if (PyErr_Occurred() || PySet_Add(hot->unproven, ino))
        return -1;
    int known = knows_outdated(hot, nodeid);
    PyObject *number = known ? NULL : PyLong_FromUnsignedLongLong(nodeid);
    int failed = known < 0 || (!known && (!number || PyList_Append(unknown, number)));
    Py_XDECREF(number);
    return failed ? -1 : 0;
}

static PyObject *hot_disbelieve(Hot *hot, PyObject *arguments)
{
    Py_ssize_t most;
    if (!PyArg_ParseTuple(arguments, "n", &most) || !is_open(hot))
        return NULL;
    PyObject *some = some_believed(hot, most), *unknown = some ? PyList_New(0) : NULL;
    int failed = !unknown;
    for (Py_ssize_t each = 0; !failed && each < PyList_GET_SIZE(some); each++)
        failed = disbelieved(hot, PyList_GET_ITEM(some, each), unknown);
    Py_XDECREF(some);
    if (failed)
        Py_CLEAR(unknown);
    return unknown;
}

/* --- the object ------------------------------------------------------------------------------------------ */

static void let_all_go(Hot *hot)
{
    PyBuffer_Release(&hot->buffer);
    PyBuffer_Release(&hot->memory);
    PyBuffer_Release(&hot->told);
    int *fds[] = {&hot->sleeper, &hot->descriptors};
    for (int each = 0; each < 2; each++) {
        if (*fds[each] >= 0)
            close(*fds[each]);
        *fds[each] = -1;
    }
}

static PyObject *hot_close(Hot *hot, PyObject *Py_UNUSED(none))
{
    let_all_go(hot);
    Py_RETURN_NONE;
}

/* All that an object of this type has are slots, which copy_of can copy. */
static int has_slots_only(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    return !type->tp_dictoffset && !type->tp_weaklistoffset && !type->tp_itemsize;
}

/* The ledger's form (ledger.Form). 0, or -1 with an exception. */
static int take_form(Hot *hot, PyObject *parts, PyObject *free)
{
    static const Py_ssize_t sizes[] = {
        sizeof(struct kept_node), sizeof(struct kept_file), sizeof(struct kept_inode),
    };
    int fits = PyTuple_Check(parts) && PyTuple_GET_SIZE(parts) == PARTS && PyTuple_Check(free)
               && PyTuple_GET_SIZE(free) == PARTS;
    for (int each = 0; fits && each < PARTS; each++) {
        Py_ssize_t size;
        if (!PyArg_ParseTuple(PyTuple_GET_ITEM(parts, each), "nnnn", &hot->parts[each].word, &hot->parts[each].at,
                              &size, &hot->parts[each].most))
            return -1;
        hot->parts[each].free = Py_NewRef(PyTuple_GET_ITEM(free, each));
        fits = size == sizes[each] && PyList_Check(hot->parts[each].free)
               && hot->parts[each].at + size * hot->parts[each].most <= hot->memory.len;
    }
    if (!fits)
        PyErr_SetString(PyExc_ValueError, "the ledger's records are of another form");
    return fits ? 0 : -1;
}

/* Its places of long names. 0, or -1 with an exception. */
static int take_longs(Hot *hot, PyObject *longs, PyObject *free)
{
    Py_ssize_t unit;
    if (!PyArg_ParseTuple(longs, "nnnn", &hot->longs.word, &hot->longs.at, &unit, &hot->longs.most))
        return -1;
    int fits = unit == UNIT && hot->longs.at + unit * hot->longs.most <= hot->memory.len && PyTuple_Check(free)
               && PyTuple_GET_SIZE(free) == MOST_UNITS + 1;
    for (int each = 0; fits && each <= MOST_UNITS; each++) {
        hot->longs.free[each] = Py_NewRef(PyTuple_GET_ITEM(free, each));
        fits = PyList_Check(hot->longs.free[each]);
    }
    if (!fits)
        PyErr_SetString(PyExc_ValueError, "the ledger's long names are of another form");
    return fits ? 0 : -1;
}

/* One of the objects, by its name. 0, or -1 with an exception. */
static int take_object(PyObject *named, const char *name, PyTypeObject *type, PyObject **to)
{
    PyObject *given = PyDict_GetItemString(named, name);
    if (!given || (type && !PyObject_TypeCheck(given, type))) {
        PyErr_Format(PyExc_TypeError, "%s: %s", name, given ? "of another type" : "missing");
        return -1;
    }
    *to = Py_NewRef(given);
    return 0;
}

static int hot_init(Hot *hot, PyObject *arguments, PyObject *named)
{
    static char *names[] = {
        "fd", "buffer", "root_fd", "device", "memory", "parts", "free",
        "longs", "free_longs", "intents_at", "segment", "directory_fds", "low", "entry_seconds", "attr_seconds",
        "long_seconds", "file_seconds", "fresh", "restless", "most_believed", "most_proven", "idle_seconds", "told",
        "told_left", "objects", NULL,
    };
    PyObject *parts, *free, *longs, *free_longs, *objects;
    if (hot->by_slot) {
        PyErr_SetString(PyExc_TypeError, "made already");
        return -1;
    }
    hot->descriptors = open("/proc/self/fd", O_PATH | O_DIRECTORY | O_CLOEXEC);
    hot->umask = umask(0);
    umask(hot->umask);
    hot->euid = geteuid();
    hot->egid = getegid();
    if (!PyArg_ParseTupleAndKeywords(arguments, named, "iw*iKw*OOO!OnnnKkkkkllnndw*kO!", names,
                                     &hot->fd, &hot->buffer, &hot->root_fd,
                                     &hot->device, &hot->memory, &parts, &free, &PyTuple_Type, &longs, &free_longs,
                                     &hot->intents_at, &hot->segment,
                                     &hot->directory_fds, &hot->low, &hot->entry_seconds, &hot->attr_seconds,
                                     &hot->long_seconds, &hot->file_seconds, &hot->fresh,
                                     &hot->restless, &hot->most_believed, &hot->most_proven, &hot->idle_seconds,
                                     &hot->told, &hot->told_left, &PyDict_Type, &objects)
        || take_form(hot, parts, free) || take_longs(hot, longs, free_longs))
        return -1;
#define TAKE(name, type) if (take_object(objects, #name, type, &hot->name)) return -1;
    OBJECTS(TAKE)
#undef TAKE
    if (hot->records != Py_None && !Py_IS_TYPE(hot->records, &RecordsType)) {
        PyErr_SetString(PyExc_TypeError, "records: of another type");
        return -1;
    }
    if (!has_slots_only(hot->inode) || !has_slots_only(hot->handle) || !has_slots_only(hot->gone_stat)) {
        PyErr_SetString(PyExc_TypeError, "an Inode, a Handle or a GoneStat has more than slots");
        return -1;
    }
    return 0;
}

static PyObject *hot_new(PyTypeObject *type, PyObject *arguments, PyObject *named)
{
    Hot *hot = (Hot *)PyType_GenericNew(type, arguments, named);
    if (hot)
        hot->others = hot->sleeper = hot->watched = hot->descriptors = -1;
    return (PyObject *)hot;
}

static int hot_traverse(Hot *hot, visitproc visit, void *arg)
{
#define VISIT(name, type) Py_VISIT(hot->name);
    OBJECTS(VISIT)
#undef VISIT
    for (int each = 0; each < PARTS; each++)
        Py_VISIT(hot->parts[each].free);
    for (int each = 0; each <= MOST_UNITS; each++)
        Py_VISIT(hot->longs.free[each]);
    return 0;
}

static int hot_clear(Hot *hot)
{
    Py_CLEAR(hot->number);
#define CLEAR(name, type) Py_CLEAR(hot->name);
    OBJECTS(CLEAR)
#undef CLEAR
    for (int each = 0; each < PARTS; each++)
        Py_CLEAR(hot->parts[each].free);
    for (int each = 0; each <= MOST_UNITS; each++)
        Py_CLEAR(hot->longs.free[each]);
    return 0;
}

static void hot_dealloc(Hot *hot)
{
    PyObject_GC_UnTrack(hot);
    let_all_go(hot);
    hot_clear(hot);
    PyMem_Free(hot->reading);
    Py_TYPE(hot)->tp_free((PyObject *)hot);
}

static PyObject *hot_anybody_told(Hot *hot, PyObject *Py_UNUSED(arguments))
{
    anybody_told(hot);
    Py_RETURN_NONE;
}

static PyObject *hot_retire(Hot *hot, PyObject *inode)
{
    if (retire(hot, inode))
        return NULL;
    Py_RETURN_NONE;
}

static PyMethodDef hot_methods[] = {
    {"receive", (PyCFunction)hot_receive, METH_VARARGS, "Answer what can be answered here; the size of what cannot."},
    {"entry", (PyCFunction)hot_entry, METH_VARARGS, "A name's packed entry, counted; None: Python is to say."},
    {"disbelieve", (PyCFunction)hot_disbelieve, METH_VARARGS, "See vfs.Vfs.disbelieve; tells the kernel; the nodes it does not know."},
    {"retire", (PyCFunction)hot_retire, METH_O, "See tierfs.states.States.retire."},
    {"anybody_told", (PyCFunction)hot_anybody_told, METH_NOARGS, "See tierfs.fuse.hot.Receiver."},
    {"close", (PyCFunction)hot_close, METH_NOARGS, "Let go of the buffers. Not to be used after."},
    {NULL},
};
static PyMemberDef hot_members[] = {
    {"answered", T_PYSSIZET, offsetof(Hot, answered), READONLY, "Requests that the last receive has answered."},
    {"others", T_INT, offsetof(Hot, others), 0, "A descriptor that ends a sleep when it can be read; -1: none."},
    {"low", T_ULONGLONG, offsetof(Hot, low), 0, "With fewer bytes of room nothing is begun here."},
    {NULL},
};
static PyTypeObject HotType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "tierfs.fuse._hot.Hot",
    .tp_basicsize = sizeof(Hot),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .tp_new = hot_new,
    .tp_init = (initproc)hot_init,
    .tp_dealloc = (destructor)hot_dealloc,
    .tp_traverse = (traverseproc)hot_traverse,
    .tp_clear = (inquiry)hot_clear,
    .tp_methods = hot_methods,
    .tp_members = hot_members,
    .tp_doc = "See tierfs.fuse.hot, which makes it.",
};
static PyMethodDef functions[] = {
    {"foreign", hot_foreign, METH_VARARGS, "See tierfs.fuse.watching.foreign."},
    {"time_slice", hot_time_slice, METH_VARARGS, "See tierfs.slices."},
    {NULL},
};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "tierfs.fuse._hot", NULL, -1, functions};

PyMODINIT_FUNC PyInit__hot(void)
{
#define INTERN(name) if (!(s_##name->word = PyUnicode_InternFromString(#name))) return NULL;
    NAMES(INTERN)
#undef INTERN
    if (PyType_Ready(&HotType) < 0 || PyType_Ready(&RecordsType) < 0)
        return NULL;
    PyObject *made = PyModule_Create(&module);
    if (!made || PyModule_AddObjectRef(made, "Hot", (PyObject *)&HotType) < 0
        || PyModule_AddObjectRef(made, "Records", (PyObject *)&RecordsType) < 0
        || PyModule_AddStringConstant(made, "SOURCES", TIERFS_SOURCES) < 0) {
        Py_XDECREF(made);
        return NULL;
    }
    return made;
}
