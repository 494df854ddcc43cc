/* LOOKUP and GETATTR of what is plainly there, compiled: the commonest requests, which would cost the interpreter
 * more than the kernel. Everything else, and whatever is not quite plain, is left to Python, before anything has
 * been changed: there is no meaning here that vfs.lookup, vfs.getattr and nodes.found do not have.
 *
 * Works on the node table's own Python objects, under the interpreter's lock. SOURCES says from which files it was
 * built: a module of other sources is not used (tierfs/fuse/compiled.py).
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdint.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#ifndef TIERFS_SOURCES
#define TIERFS_SOURCES ""
#endif

enum { LOOKUP = 1, GETATTR = 3 }; /* opcodes */
enum { GETATTR_FH = 1 };
#define RESENT (1ULL << 63)
#define SLOT 0xFFFFFFFFULL
#define MOST_LOOKUPS 0x7FFFFFFFU
#define INLINE 34

/* The layouts of linux/fuse.h. */
struct in_header { uint32_t len, opcode; uint64_t unique, nodeid; uint32_t uid, gid, pid; uint16_t extlen, padding; };
struct out_header { uint32_t len; int32_t error; uint64_t unique; };
struct attr {
    uint64_t ino, size, blocks, atime, mtime, ctime;
    uint32_t atimensec, mtimensec, ctimensec, mode, nlink, uid, gid, rdev, blksize, flags;
};
struct entry_out {
    uint64_t nodeid, generation, entry_valid, attr_valid;
    uint32_t entry_valid_nsec, attr_valid_nsec;
    struct attr attr;
};
struct attr_out { uint64_t attr_valid; uint32_t attr_valid_nsec, dummy; struct attr attr; };

/* A node in the ledger (tierfs/ledger.py). */
struct kept_node {
    uint64_t number, ino, parent;
    uint32_t lookups;
    uint8_t kind, length;
    char name[INLINE];
};

/* What became of a request here. */
enum outcome { PYTHONS, ABSENT, FOUND };

typedef struct {
    PyObject_HEAD
    int fd, root_fd, others;
    unsigned long long device;
    Py_buffer buffer, table;
    unsigned long entry_seconds, attr_seconds;
    PyObject *by_slot, *by_ino, *dirs, *plain, *inodes, *root;
    PyObject *holds, *enter, *refused;
    Py_ssize_t answered;
} Hot;

static PyObject *s_id, *s_ino, *s_parent, *s_anchor, *s_move_to_end;

/* --- nodes ----------------------------------------------------------------------------------------------- */

/* A number in an attribute; (uint64_t)-1 with an exception set where there is none. */
static uint64_t number_of(PyObject *node, PyObject *attribute)
{
    PyObject *value = PyObject_GetAttr(node, attribute);
    if (!value)
        return (uint64_t)-1;
    uint64_t number = PyLong_AsUnsignedLongLong(value);
    Py_DECREF(value);
    return number;
}

/* Whether an attribute is this very object. */
static int attribute_is(PyObject *node, PyObject *attribute, PyObject *wanted)
{
    PyObject *value = PyObject_GetAttr(node, attribute);
    int same = value == wanted;
    Py_XDECREF(value);
    return same;
}

/* What the ledger has of a node that is reached by a name which it holds itself; NULL of others. */
static struct kept_node *kept_of(Hot *hot, uint64_t nodeid)
{
    size_t at = (size_t)(nodeid & SLOT) * sizeof(struct kept_node);
    if (at + sizeof(struct kept_node) > (size_t)hot->table.len)
        return NULL;
    struct kept_node *kept = (struct kept_node *)((char *)hot->table.buf + at);
    return kept->number == nodeid && !kept->kind && kept->length <= INLINE ? kept : NULL;
}

/* The node of this number, borrowed; NULL where it is not in use. */
static PyObject *node_at(Hot *hot, uint64_t nodeid)
{
    uint64_t slot = nodeid & SLOT;
    if (slot >= (uint64_t)PyList_GET_SIZE(hot->by_slot))
        return NULL;
    PyObject *node = PyList_GET_ITEM(hot->by_slot, slot);
    return node != Py_None && number_of(node, s_id) == nodeid ? node : NULL;
}

/* The descriptor kept of a directory, which counts as a use of it; -1 where none is. */
static int directory_of(Hot *hot, PyObject *node)
{
    if (node == hot->root)
        return hot->root_fd;
    PyObject *id = PyObject_GetAttr(node, s_id);
    PyObject *kept = id ? PyDict_GetItemWithError(hot->dirs, id) : NULL;
    int fd = kept ? (int)PyLong_AsLong(kept) : -1;
    if (fd >= 0) {
        PyObject *done = PyObject_CallMethodOneArg(hot->dirs, s_move_to_end, id);
        if (!done)
            fd = -1;
        Py_XDECREF(done);
    }
    Py_XDECREF(id);
    return fd;
}

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
    if (PySet_Contains(hot->plain, ino) == 1 && PyDict_Contains(hot->inodes, ino) == 0)
        seconds = hot->attr_seconds;
    else if (!PyErr_Occurred()) {
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
            && kept->length == length && !memcmp(kept->name, name, length)) {
            if (kept->lookups < MOST_LOOKUPS)
                *(volatile uint32_t *)&kept->lookups = kept->lookups + 1;
            nodeid = number;
        }
    } else if (ino && !PyErr_Occurred() && (!S_ISDIR(st->st_mode) || st->st_dev == hot->device)) {
        PyObject *number = PyObject_CallFunction(hot->enter, "OOy#", ino, parent, name, length);
        if (number)
            nodeid = PyLong_AsUnsignedLongLong(number);
        Py_XDECREF(number);
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
            memcpy(name, kept->name, kept->length);
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

/* Answer the request in the buffer: 1, or 0 where it is Python's. -1: with an exception. */
static int answer(Hot *hot, Py_ssize_t size)
{
    struct { struct out_header head; union { struct entry_out entry; struct attr_out attr; } body; } reply;
    const char *message = hot->buffer.buf;
    struct in_header in;
    memcpy(&in, message, sizeof in);
    enum outcome outcome = PYTHONS;
    size_t body = 0;
    if (in.unique & RESENT || in.len != size)
        return 0;
    if (in.opcode == LOOKUP && !message[size - 1]) {
        outcome = look_up(hot, in.nodeid, message + sizeof in, size - sizeof in - 1, &reply.body.entry);
        body = sizeof reply.body.entry;
    } else if (in.opcode == GETATTR && size >= (Py_ssize_t)(sizeof in + 16)) {
        uint32_t flags;
        memcpy(&flags, message + sizeof in, sizeof flags);
        if (!(flags & GETATTR_FH))
            outcome = get_attributes(hot, in.nodeid, &reply.body.attr);
        body = sizeof reply.body.attr;
    }
    if (outcome == PYTHONS) {
        PyErr_Clear(); /* Python's own way meets the same, and says it. */
        return 0;
    }
    body = outcome == FOUND ? body : 0;
    reply.head = (struct out_header){sizeof reply.head + body, outcome == FOUND ? 0 : -ENOENT, in.unique};
    if (write(hot->fd, &reply, reply.head.len) < 0) {
        PyObject *told = PyObject_CallFunction(hot->refused, "Ki", (unsigned long long)in.unique, errno);
        if (!told)
            return -1;
        Py_DECREF(told);
    }
    return 1;
}

/* 0 with an exception set where it is not. */
static int is_open(Hot *hot)
{
    if (!hot->buffer.obj || !hot->table.obj)
        PyErr_SetString(PyExc_ValueError, "closed");
    return hot->buffer.obj && hot->table.obj;
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
    PyBuffer_Release(&hot->table);
    Py_RETURN_NONE;
}

static int hot_init(Hot *hot, PyObject *arguments, PyObject *named)
{
    static char *names[] = {
        "fd", "buffer", "by_slot", "by_ino", "dirs", "root", "root_fd", "device", "table", "node_size",
        "plain", "inodes", "entry_seconds", "attr_seconds", "holds", "enter", "refused", NULL,
    };
    Py_ssize_t node_size;
    if (hot->by_slot) {
        PyErr_SetString(PyExc_TypeError, "made already");
        return -1;
    }
    PyObject **kept[] = {&hot->by_slot, &hot->by_ino, &hot->dirs, &hot->root, &hot->plain,
                         &hot->inodes, &hot->holds, &hot->enter, &hot->refused};
    if (!PyArg_ParseTupleAndKeywords(
            arguments, named, "iw*O!O!O!OiKw*nO!O!kkOOO", names, &hot->fd, &hot->buffer, &PyList_Type, &hot->by_slot,
            &PyDict_Type, &hot->by_ino, &PyDict_Type, &hot->dirs, &hot->root, &hot->root_fd, &hot->device,
            &hot->table, &node_size, &PySet_Type, &hot->plain, &PyDict_Type, &hot->inodes,
            &hot->entry_seconds, &hot->attr_seconds, &hot->holds, &hot->enter, &hot->refused)) {
        for (size_t each = 0; each < sizeof kept / sizeof *kept; each++)
            *kept[each] = NULL;
        return -1;
    }
    for (size_t each = 0; each < sizeof kept / sizeof *kept; each++)
        Py_INCREF(*kept[each]);
    hot->others = -1;
    if (node_size != sizeof(struct kept_node)) {
        PyErr_SetString(PyExc_ValueError, "the ledger's nodes are of another size");
        return -1;
    }
    return 0;
}

static int hot_traverse(Hot *hot, visitproc visit, void *arg)
{
    Py_VISIT(hot->by_slot);
    Py_VISIT(hot->by_ino);
    Py_VISIT(hot->dirs);
    Py_VISIT(hot->root);
    Py_VISIT(hot->plain);
    Py_VISIT(hot->inodes);
    Py_VISIT(hot->holds);
    Py_VISIT(hot->enter);
    Py_VISIT(hot->refused);
    return 0;
}

static int hot_clear(Hot *hot)
{
    Py_CLEAR(hot->by_slot);
    Py_CLEAR(hot->by_ino);
    Py_CLEAR(hot->dirs);
    Py_CLEAR(hot->root);
    Py_CLEAR(hot->plain);
    Py_CLEAR(hot->inodes);
    Py_CLEAR(hot->holds);
    Py_CLEAR(hot->enter);
    Py_CLEAR(hot->refused);
    return 0;
}

static void hot_dealloc(Hot *hot)
{
    PyObject_GC_UnTrack(hot);
    PyBuffer_Release(&hot->buffer);
    PyBuffer_Release(&hot->table);
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
    s_id = PyUnicode_InternFromString("id");
    s_ino = PyUnicode_InternFromString("ino");
    s_parent = PyUnicode_InternFromString("parent");
    s_anchor = PyUnicode_InternFromString("anchor");
    s_move_to_end = PyUnicode_InternFromString("move_to_end");
    if (!s_id || !s_ino || !s_parent || !s_anchor || !s_move_to_end)
        return NULL;
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
