/* The commonest requests, compiled: they would cost the interpreter more than the kernel. LOOKUP and GETATTR of what
 * is plainly there, OPEN for reading and RELEASE of resident files, FORGET. Everything else, and whatever is not quite
 * plain, is left to Python, before anything has been changed: there is no meaning here that vfs, nodes, openfiles and
 * gate do not have.
 *
 * SOURCES says from which files it was built: a module of other sources is not used (tierfs/fuse/compiled.py).
 */
#include "_hot.h"

#include <fcntl.h>
#include <poll.h>
#include <structmember.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#ifndef TIERFS_SOURCES
#define TIERFS_SOURCES ""
#endif

enum { LOOKUP = 1, FORGET = 2, GETATTR = 3, OPEN = 14, RELEASE = 18, BATCH_FORGET = 42 }; /* opcodes */
enum { GETATTR_FH = 1 };
#define RESENT (1ULL << 63)
#define MOST_LOOKUPS 0x7FFFFFFFU

#define NAME(word) PyObject *s_##word;
NAMES(NAME)
#undef NAME

/* --- attributes ------------------------------------------------------------------------------------------ */

static int status(int fd, const char *name, struct stat *st)
{
    int failed;
    Py_BEGIN_ALLOW_THREADS
    failed = name ? fstatat(fd, name, st, AT_SYMLINK_NOFOLLOW) : fstat(fd, st);
    if (failed)
        failed = errno;
    Py_END_ALLOW_THREADS
    return failed;
}

static int pack(struct attr *to, const struct stat *st)
{
    if (st->st_rdev > UINT32_MAX || st->st_nlink > UINT32_MAX)
        return 0;
    *to = (struct attr){
        .ino = st->st_ino, .size = st->st_size, .blocks = st->st_blocks,
        .atime = st->st_atim.tv_sec, .mtime = st->st_mtim.tv_sec, .ctime = st->st_ctim.tv_sec,
        .atimensec = st->st_atim.tv_nsec, .mtimensec = st->st_mtim.tv_nsec, .ctimensec = st->st_ctim.tv_nsec,
        .mode = st->st_mode, .nlink = st->st_nlink, .uid = st->st_uid, .gid = st->st_gid,
        .rdev = st->st_rdev, .blksize = st->st_blksize,
    };
    return 1;
}

/* For how many seconds the kernel may keep these attributes; -1 where they are not what is to be shown. */
static long seconds_of(Hot *hot, const struct stat *st)
{
    if (!S_ISREG(st->st_mode))
        return hot->attr_seconds;
    PyObject *ino = PyLong_FromUnsignedLongLong(st->st_ino);
    if (!ino)
        return -1;
    long seconds = -1;
    if (PySet_Contains(hot->plain, ino) == 1) {
        PyObject *inode = PyDict_GetItemWithError(hot->inodes, ino);
        int changing = inode && number_of(inode, s_writers) && attribute_is(inode, s_passthrough, Py_True);
        seconds = PyErr_Occurred() ? -1 : changing ? 0 : (long)hot->attr_seconds;
    } else if (!PyErr_Occurred()) {
        long long ctime = (long long)st->st_ctim.tv_sec * 1000000000 + st->st_ctim.tv_nsec;
        PyObject *said = PyObject_CallFunction(hot->holds, "OLL", ino, ctime, (long long)st->st_blocks);
        seconds = said ? PyLong_AsLong(said) : -1;
        Py_XDECREF(said);
    }
    Py_DECREF(ino);
    return seconds;
}

/* --- requests -------------------------------------------------------------------------------------------- */

/* The number of the node that a name means now, one lookup counted; 0 where Python is to say. */
static uint64_t counted(Hot *hot, PyObject *parent, const char *name, Py_ssize_t length, const struct stat *st)
{
    PyObject *ino = PyLong_FromUnsignedLongLong(st->st_ino);
    PyObject *node = ino ? PyDict_GetItemWithError(hot->by_ino, ino) : NULL;
    uint64_t nodeid = 0;
    if (node) {
        uint64_t number = number_of(node, s_id);
        struct kept_node *kept = PyErr_Occurred() ? NULL : kept_of(hot, number);
        if (kept && node != hot->root && attribute_is(node, s_anchor, Py_None) && attribute_is(node, s_parent, parent)
            && kept->length == length && !memcmp(kept->content, name, length)) {
            if (kept->lookups < MOST_LOOKUPS)
                *(volatile uint32_t *)&kept->lookups = kept->lookups + 1;
            nodeid = number;
        }
    } else if (ino && !PyErr_Occurred() && (!S_ISDIR(st->st_mode) || st->st_dev == hot->device)) {
        nodeid = enter(hot, ino, parent, name, length);
    }
    Py_XDECREF(ino);
    return PyErr_Occurred() ? 0 : nodeid;
}

static enum outcome look_up(Hot *hot, uint64_t above, const char *name, Py_ssize_t length, struct entry_out *out)
{
    struct stat st;
    PyObject *parent = node_at(hot, above);
    int fd = parent ? directory_of(hot, parent) : -1;
    if (fd < 0 || length < 1 || (Py_ssize_t)strnlen(name, length) != length)
        return PYTHONS;
    int failed = status(fd, name, &st);
    if (failed)
        return failed == ENOENT ? ABSENT : PYTHONS;
    memset(out, 0, sizeof *out);
    long seconds = pack(&out->attr, &st) ? seconds_of(hot, &st) : -1;
    if (seconds < 0)
        return PYTHONS;
    out->nodeid = counted(hot, parent, name, length, &st);
    out->entry_valid = hot->entry_seconds;
    out->attr_valid = seconds;
    return out->nodeid ? FOUND : PYTHONS;
}

static enum outcome get_attributes(Hot *hot, uint64_t nodeid, struct attr_out *out)
{
    struct stat st;
    PyObject *node = node_at(hot, nodeid);
    if (!node || !attribute_is(node, s_anchor, Py_None))
        return PYTHONS;
    if (node == hot->root) {
        if (status(hot->root_fd, NULL, &st))
            return PYTHONS;
    } else {
        struct kept_node *kept = kept_of(hot, nodeid);
        char name[INLINE + 1] = "";
        if (kept)
            memcpy(name, kept->content, kept->length);
        PyObject *parent = PyObject_GetAttr(node, s_parent);
        int fd = kept && *name && parent && parent != Py_None ? directory_of(hot, parent) : -1;
        int failed = fd < 0 || status(fd, name, &st);
        Py_XDECREF(parent);
        if (failed || st.st_ino != number_of(node, s_ino))
            return PYTHONS;
    }
    memset(out, 0, sizeof *out);
    long seconds = pack(&out->attr, &st) ? seconds_of(hot, &st) : -1;
    out->attr_valid = seconds;
    return seconds < 0 ? PYTHONS : FOUND;
}

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

union body { struct entry_out entry; struct attr_out attr; struct open_out open; };

/* Carry out a request; `body` is filled in, and *size of it is to be sent. */
static enum outcome carried_out(Hot *hot, const struct in_header *in, const char *message, Py_ssize_t length,
                                union body *body, size_t *size)
{
    struct { uint32_t flags, more; uint64_t fh; } ask;
    uint64_t fh;
    switch (in->opcode) {
    case LOOKUP:
        *size = sizeof body->entry;
        return message[length - 1] ? PYTHONS
               : look_up(hot, in->nodeid, message + sizeof *in, length - sizeof *in - 1, &body->entry);
    case GETATTR:
        *size = sizeof body->attr;
        return !fields(message, length, &ask, sizeof ask) || ask.flags & GETATTR_FH ? PYTHONS
               : get_attributes(hot, in->nodeid, &body->attr);
    case OPEN:
        *size = sizeof body->open;
        return !fields(message, length, &ask, 8) ? PYTHONS : open_file(hot, in, ask.flags, &body->open);
    case RELEASE:
        *size = 0;
        return !fields(message, length, &fh, sizeof fh) ? PYTHONS : release_file(hot, fh);
    case FORGET:
    case BATCH_FORGET:
        return forget_all(hot, in, message, length);
    default:
        return PYTHONS;
    }
}

/* Tell Python what has become of a request. 0, or -1 with an exception. */
static int told(PyObject *whom, uint64_t unique, PyObject *what)
{
    PyObject *done = what ? PyObject_CallFunction(whom, "KO", (unsigned long long)unique, what) : NULL;
    Py_XDECREF(what);
    Py_XDECREF(done);
    return done ? 0 : -1;
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
    if (in.unique & RESENT || in.len != size)
        return 0;
    enum outcome outcome = carried_out(hot, &in, hot->buffer.buf, size, &reply.body, &body);
    if (outcome == FAILED)
        return failed(hot, in.unique) ? -1 : 1;
    if (outcome == PYTHONS) {
        PyErr_Clear(); /* Python's own way meets the same, and says it. */
        return 0;
    }
    if (in.opcode == FORGET || in.opcode == BATCH_FORGET)
        return 1;
    body = outcome == FOUND ? body : 0;
    reply.head = (struct out_header){sizeof reply.head + body, outcome == FOUND ? 0 : -ENOENT, in.unique};
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

/* Sleep until the kernel has a request: 1. 0: something else has come, a signal, or it is `until`. */
static int awaited(Hot *hot, double until)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    double left = until - now.tv_sec - now.tv_nsec * 1e-9;
    struct pollfd fds[] = {{hot->fd, POLLIN, 0}, {hot->others, POLLIN, 0}};
    if (left <= 0)
        return 0;
    int ready;
    Py_BEGIN_ALLOW_THREADS
    ready = poll(fds, 2, left < 3600 ? (int)(left * 1000) + 1 : 3600000);
    Py_END_ALLOW_THREADS
    return ready > 0 && fds[0].revents && !fds[1].revents;
}

static PyObject *hot_receive(Hot *hot, PyObject *arguments)
{
    Py_ssize_t most;
    double until;
    hot->answered = 0;
    if (!PyArg_ParseTuple(arguments, "nd", &most, &until))
        return NULL;
    if (!is_open(hot))
        return NULL;
    while (hot->answered < most) {
        ssize_t size = read(hot->fd, hot->buffer.buf, hot->buffer.len);
        if (size < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
            if (until > 0 && awaited(hot, until))
                continue;
            if (hot->answered)
                break;
            Py_RETURN_NONE;
        }
        if (size < 0)
            return PyErr_SetFromErrno(PyExc_OSError);
        if (!size)
            Py_RETURN_NONE; /* the end of a file or socket, which the device has not */
        int done = size > (ssize_t)sizeof(struct in_header) ? answer(hot, size) : 0;
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
    if (!PyArg_ParseTuple(arguments, "Ky#", &nodeid, &name, &length))
        return NULL;
    if (!is_open(hot))
        return NULL;
    if (look_up(hot, nodeid, name, length, &out) == FOUND)
        return PyBytes_FromStringAndSize((char *)&out, sizeof out);
    PyErr_Clear();
    Py_RETURN_NONE;
}

/* --- the object ------------------------------------------------------------------------------------------ */

static PyObject *hot_close(Hot *hot, PyObject *Py_UNUSED(none))
{
    PyBuffer_Release(&hot->buffer);
    PyBuffer_Release(&hot->memory);
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
        sizeof(struct kept_node), sizeof(struct kept_long), sizeof(struct kept_file), sizeof(struct kept_inode),
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
        "entry_seconds", "attr_seconds", "idle_seconds", "objects", NULL,
    };
    PyObject *parts, *free, *objects;
    if (hot->by_slot) {
        PyErr_SetString(PyExc_TypeError, "made already");
        return -1;
    }
    hot->others = -1;
    if (!PyArg_ParseTupleAndKeywords(arguments, named, "iw*iKw*OOkkdO!", names, &hot->fd, &hot->buffer, &hot->root_fd,
                                     &hot->device, &hot->memory, &parts, &free, &hot->entry_seconds,
                                     &hot->attr_seconds, &hot->idle_seconds, &PyDict_Type, &objects)
        || take_form(hot, parts, free))
        return -1;
#define TAKE(name, type) if (take_object(objects, #name, type, &hot->name)) return -1;
    OBJECTS(TAKE)
#undef TAKE
    if (!has_slots_only(hot->inode) || !has_slots_only(hot->handle)) {
        PyErr_SetString(PyExc_TypeError, "an Inode or a Handle has more than slots");
        return -1;
    }
    return 0;
}

static int hot_traverse(Hot *hot, visitproc visit, void *arg)
{
#define VISIT(name, type) Py_VISIT(hot->name);
    OBJECTS(VISIT)
#undef VISIT
    for (int each = 0; each < PARTS; each++)
        Py_VISIT(hot->parts[each].free);
    return 0;
}

static int hot_clear(Hot *hot)
{
#define CLEAR(name, type) Py_CLEAR(hot->name);
    OBJECTS(CLEAR)
#undef CLEAR
    for (int each = 0; each < PARTS; each++)
        Py_CLEAR(hot->parts[each].free);
    return 0;
}

static void hot_dealloc(Hot *hot)
{
    PyObject_GC_UnTrack(hot);
    PyBuffer_Release(&hot->buffer);
    PyBuffer_Release(&hot->memory);
    hot_clear(hot);
    Py_TYPE(hot)->tp_free((PyObject *)hot);
}

static PyMethodDef hot_methods[] = {
    {"receive", (PyCFunction)hot_receive, METH_VARARGS, "Answer what can be answered here; the size of what cannot."},
    {"entry", (PyCFunction)hot_entry, METH_VARARGS, "A name's packed entry, counted; None: Python is to say."},
    {"close", (PyCFunction)hot_close, METH_NOARGS, "Let go of the buffers. Not to be used after."},
    {NULL},
};
static PyMemberDef hot_members[] = {
    {"answered", T_PYSSIZET, offsetof(Hot, answered), READONLY, "Requests that the last receive has answered."},
    {"others", T_INT, offsetof(Hot, others), 0, "A descriptor that ends a sleep when it can be read; -1: none."},
    {NULL},
};
static PyTypeObject HotType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "tierfs.fuse._hot.Hot",
    .tp_basicsize = sizeof(Hot),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .tp_new = PyType_GenericNew,
    .tp_init = (initproc)hot_init,
    .tp_dealloc = (destructor)hot_dealloc,
    .tp_traverse = (traverseproc)hot_traverse,
    .tp_clear = (inquiry)hot_clear,
    .tp_methods = hot_methods,
    .tp_members = hot_members,
    .tp_doc = "See tierfs.fuse.hot, which makes it.",
};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "tierfs.fuse._hot", NULL, -1, NULL};

PyMODINIT_FUNC PyInit__hot(void)
{
#define INTERN(word) if (!(s_##word = PyUnicode_InternFromString(#word))) return NULL;
    NAMES(INTERN)
#undef INTERN
    if (PyType_Ready(&HotType) < 0)
        return NULL;
    PyObject *made = PyModule_Create(&module);
    if (!made || PyModule_AddObjectRef(made, "Hot", (PyObject *)&HotType) < 0
        || PyModule_AddStringConstant(made, "SOURCES", TIERFS_SOURCES) < 0) {
        Py_XDECREF(made);
        return NULL;
    }
    return made;
}
