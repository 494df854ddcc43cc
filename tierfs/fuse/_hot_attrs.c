/* SETATTR, and GETATTR by an open file: what vfs.setattr does with gate.before_change, after_change and attributes, of
 * what is resident and has no set-id bits.
 */
#include "_hot.h"

#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define SET_ID (S_ISUID | S_ISGID)
#define EXECUTABLE (S_IXUSR | S_IXGRP | S_IXOTH)
#define NO_ID 0xFFFFFFFFU
#define NS 1000000000U
#ifndef SYS_fchmodat2
#define SYS_fchmodat2 452
#endif

/* protocol.SET_*: which fields of a setattr_in are meant. */
enum {
    SET_MODE = 1 << 0, SET_UID = 1 << 1, SET_GID = 1 << 2, SET_SIZE = 1 << 3, SET_ATIME = 1 << 4, SET_MTIME = 1 << 5,
    SET_FH = 1 << 6, SET_ATIME_NOW = 1 << 7, SET_MTIME_NOW = 1 << 8, SET_KILL_SUIDGID = 1 << 11,
};

/* --- the node that a request is about -------------------------------------------------------------------- */

void let_target_go(struct target *at)
{
    if (at->own)
        close(at->fd);
    Py_XDECREF(at->node);
    Py_XDECREF(at->parent);
    Py_XDECREF(at->ino);
    Py_XDECREF(at->inode);
}

int found_target(Hot *hot, uint64_t nodeid, struct target *at)
{
    *at = (struct target){.above = -1, .fd = -1};
    at->node = Py_XNewRef(node_at(hot, nodeid));
    if (!at->node || at->node == hot->root || !attribute_is(at->node, s_anchor, Py_None))
        return 0;
    at->parent = get_of(at->node, s_parent);
    at->ino = get_of(at->node, s_ino);
    if (!at->parent || at->parent == Py_None || !at->ino)
        return 0;
    at->number = PyLong_AsUnsignedLongLong(at->ino);
    at->length = name_of(hot, nodeid, at->name);
    at->inode = Py_XNewRef(PyDict_GetItemWithError(hot->inodes, at->ino));
    return at->length && !PyErr_Occurred();
}

int target_is_named(struct target *at)
{
    return !fstatat(at->above, at->name, &at->st, AT_SYMLINK_NOFOLLOW) && at->st.st_ino == at->number;
}

/* The descriptor that the inode's state has, or -1: one that is guarded has none, mostly. */
static int descriptor_of(PyObject *inode)
{
    PyObject *value = get_of(inode, s_opath);
    int fd = value ? (int)PyLong_AsLong(value) : -1;
    Py_XDECREF(value);
    return fd;
}

int reached_target(Hot *hot, struct target *at)
{
    at->above = directory_of(hot, at->parent);
    if (at->above < 0)
        return 0;
    int opath = at->inode ? descriptor_of(at->inode) : -1;
    if (opath >= 0 && PyDict_GetItemWithError(hot->by_ino, at->ino) == at->node) {
        at->fd = opath;
        return !PyErr_Occurred() && target_is_named(at);
    }
    at->fd = openat(at->above, at->name, O_PATH | O_NOFOLLOW | O_CLOEXEC);
    at->own = at->fd >= 0;
    return at->own && !fstat(at->fd, &at->st) && at->st.st_ino == at->number;
}

PyObject *handle_of_file(Hot *hot, uint64_t fh)
{
    PyObject *key = PyLong_FromUnsignedLongLong(fh);
    PyObject *pair = key ? PyDict_GetItemWithError(hot->files, key) : NULL;
    Py_XDECREF(key);
    return pair ? PyTuple_GET_ITEM(pair, 1) : NULL;
}

/* Its inode's state, borrowed; NULL where there is none. */
static PyObject *inode_of_file(Hot *hot, uint64_t fh)
{
    PyObject *handle = handle_of_file(hot, fh), *inode = handle ? get_of(handle, s_inode) : NULL;
    Py_XDECREF(inode); /* its handle has it */
    return inode;
}

/* By an open file's own descriptor (vfs._reach). 0 where it is another's. */
static int reached_by_file(struct target *at, PyObject *of)
{
    at->fd = (int)number_of(of, s_opath);
    return of == at->inode && !PyErr_Occurred() && !fstat(at->fd, &at->st) && at->st.st_ino == at->number;
}

/* --- GETATTR by an open file ----------------------------------------------------------------------------- */

enum outcome get_attributes_of_file(Hot *hot, uint64_t nodeid, uint64_t fh, struct attr_out *out)
{
    struct stat st;
    PyObject *inode = node_at(hot, nodeid) ? inode_of_file(hot, fh) : NULL; /* what is told is noted of the node */
    int opath = inode ? (int)number_of(inode, s_opath) : -1;
    if (PyErr_Occurred() || (inode && fstat(opath, &st)))
        return PYTHONS;
    enum outcome outcome = inode ? fill_attributes(hot, &st, out) : get_attributes(hot, nodeid, out);
    if (outcome == FOUND)
        out->attr_valid = for_now(hot, out->attr_valid); /* nobody has proven that it is at rest */
    return outcome;
}

/* --- SETATTR --------------------------------------------------------------------------------------------- */

int may_change(Hot *hot, const struct target *at)
{
    const struct stat *st = &at->st;
    if (!has_marks_room(hot) || PyErr_Occurred())
        return 0;
    if (!S_ISREG(st->st_mode))
        return 1;
    if (st->st_mode & SET_ID || (!st->st_blocks && st->st_size) || PyDict_Contains(hot->late, at->ino))
        return 0;
    return !at->inode || (is_plain(at->inode) && attribute_is(at->inode, s_shown, Py_None));
}

/* It is registered and idle, and with its new mode perhaps no longer fit for passthrough (vfs._stays_fit). */
static int may_become_unfit(const struct setattr_in *ask, const struct target *at)
{
    int runs = ask->valid & SET_MODE && ask->mode & EXECUTABLE && !(at->st.st_mode & EXECUTABLE);
    return runs && at->inode && !number_of(at->inode, s_opens);
}

/* Nothing is to be taken away with this change. */
static int is_simple(Hot *hot, const struct setattr_in *ask, const struct target *at)
{
    const struct stat *st = &at->st;
    if (ask->atimensec >= NS || ask->mtimensec >= NS || (ask->valid & SET_UID && ask->uid == NO_ID)
        || (ask->valid & SET_GID && ask->gid == NO_ID))
        return 0;
    if (!S_ISREG(st->st_mode) && (ask->valid & SET_SIZE || (ask->valid & SET_KILL_SUIDGID && st->st_mode & SET_ID)))
        return 0;
    if (S_ISREG(st->st_mode) && ((ask->valid & SET_MODE && ask->mode & SET_ID) || may_become_unfit(ask, at)))
        return 0;
    return may_change(hot, at);
}

/* It is open for writing in passthrough, and marked: another size needs nothing but to be set (contents.truncate). */
static int is_being_written(PyObject *inode)
{
    return inode && number_of(inode, s_writers) && number_of(inode, s_backing_id) && attribute_is(inode, s_marked, Py_True)
           && !PyErr_Occurred();
}

static int resized(Hot *hot, int opath, uint64_t size)
{
    /* Not truncate(2), which moves no times where the size stays. */
    int fd = reopened(hot, opath, O_WRONLY);
    int done = fd >= 0 && !ftruncate(fd, size);
    if (fd >= 0)
        close(fd);
    POINT();
    return done;
}

/* What utimensat is to do with a time. */
static struct timespec time_of(uint32_t valid, uint32_t given, uint32_t now, int64_t seconds, uint32_t nanoseconds)
{
    if (!(valid & given))
        return (struct timespec){0, UTIME_OMIT};
    return valid & now ? (struct timespec){0, UTIME_NOW} : (struct timespec){seconds, nanoseconds};
}

static int retimed(int fd, const struct setattr_in *ask)
{
    struct timespec times[] = {
        time_of(ask->valid, SET_ATIME, SET_ATIME_NOW, ask->atime, ask->atimensec),
        time_of(ask->valid, SET_MTIME, SET_MTIME_NOW, ask->mtime, ask->mtimensec),
    };
    int failed = utimensat(fd, "", times, AT_EMPTY_PATH);
    POINT();
    return !failed;
}

/* Make the change, in vfs.setattr's order. 0 where something fails: a second run makes all of it anew, and says it. */
static int changed(Hot *hot, const struct setattr_in *ask, const struct target *at)
{
    uint32_t valid = ask->valid;
    if (valid & SET_SIZE && (!is_being_written(at->inode) || !resized(hot, at->fd, ask->size)))
        return 0;
    if (valid & (SET_UID | SET_GID)) {
        if (fchownat(at->fd, "", valid & SET_UID ? ask->uid : NO_ID, valid & SET_GID ? ask->gid : NO_ID, AT_EMPTY_PATH))
            return 0;
        POINT();
    }
    if (valid & SET_MODE) {
        if (syscall(SYS_fchmodat2, at->fd, "", ask->mode & 07777, AT_EMPTY_PATH))
            return 0;
        POINT();
    }
    return !(valid & (SET_ATIME | SET_MTIME)) || retimed(at->fd, ask);
}

int attributes_marked(Hot *hot, const struct target *at)
{
    struct mark_of of = {.ino = at->st.st_ino, .parent = number_of(at->parent, s_ino), .a = S_ISREG(at->st.st_mode),
                         .name = at->name, .length = at->length};
    return PyErr_Occurred() || append_mark(hot, ATTRIBUTES, &of) < 0 ? -1 : 0;
}

enum outcome set_attributes(Hot *hot, uint64_t nodeid, const struct setattr_in *ask, struct attr_out *out)
{
    struct target at;
    PyObject *file = ask->valid & SET_FH ? inode_of_file(hot, ask->fh) : NULL;
    enum outcome outcome = PYTHONS;
    int reached = found_target(hot, nodeid, &at) && (file ? reached_by_file(&at, file) : reached_target(hot, &at));
    if (reached && is_simple(hot, ask, &at)) {
        if (changed(hot, ask, &at) && !fstat(at.fd, &at.st))
            outcome = fill_attributes(hot, &at.st, out);
        if (outcome == FOUND) {
            out->attr_valid = for_now(hot, out->attr_valid);
            outcome = attributes_marked(hot, &at) ? FAILED : FOUND;
        }
    }
    let_target_go(&at);
    return outcome;
}
