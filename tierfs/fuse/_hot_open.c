/* OPEN of a resident file: what vfs.open and gate.open or gate.reopen do where nothing has to be waited for or fetched. */
#include "_hot.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/xattr.h>
#include <unistd.h>

#ifndef GETXATTRAT
#define GETXATTRAT 464 /* its number everywhere */
#endif
#define CAPABILITY "security.capability"
#define BACKING_OPEN 0x4010E501
#define MOST_BESIDES 4096 /* report.MOST_BESIDES */

/* Whether these flags of open(2) ask for writing. */
static int is_writing(uint32_t flags)
{
    return (flags & O_ACCMODE) != O_RDONLY;
}

/* report.HeatReport.touch. 0, or -1 with an exception. */
int touch(Hot *hot, PyObject *inode, PyObject *ino, uint32_t pid)
{
    PyObject *where = hot->touched, *key = Py_NewRef(ino), *before = PyDict_GetItemWithError(where, key);
    if (before && PyLong_AsUnsignedLong(PyTuple_GET_ITEM(before, 5)) != pid) {
        where = hot->besides;
        Py_SETREF(key, Py_BuildValue("(OI)", ino, pid));
        before = key ? PyDict_GetItemWithError(where, key) : NULL;
        if (key && !before && PyDict_GET_SIZE(where) >= MOST_BESIDES) {
            Py_DECREF(key);
            return PyErr_Occurred() ? -1 : 0;
        }
    }
    long count = before ? PyLong_AsLong(PyTuple_GET_ITEM(before, 0)) : 0;
    PyObject *of[] = {
        PyLong_FromLong(count + 1), PyFloat_FromDouble(monotonic()), get_of(inode, s_size), get_of(inode, s_parent),
        get_of(inode, s_name), PyLong_FromUnsignedLong(pid),
    };
    PyObject *entry = PyErr_Occurred() ? NULL : PyTuple_Pack(6, of[0], of[1], of[2], of[3], of[4], of[5]);
    for (int each = 0; each < 6; each++)
        Py_XDECREF(of[each]);
    int failed = entry ? PyDict_SetItem(where, key, entry) : -1;
    Py_XDECREF(entry);
    Py_XDECREF(key);
    return failed;
}

/* --- opening --------------------------------------------------------------------------------------------- */

/* states.backing.open: the id; NULL with an exception. */
PyObject *backing_id_of(Hot *hot, PyObject *backing, PyObject *opath)
{
    struct { int32_t fd; uint32_t flags; uint64_t padding; } map = {(int32_t)PyLong_AsLong(opath), 0, 0};
    if ((PyObject *)Py_TYPE(backing) != hot->kernel_backing)
        return PyObject_CallMethodOneArg(backing, s_open->word, opath);
    int id = ioctl(hot->fd, BACKING_OPEN, &map);
    return id > 0 ? PyLong_FromLong(id) : PyErr_SetFromErrno(PyExc_OSError);
}

/* Another descriptor of what an O_PATH descriptor is of; -1 where there is none. */
int reopened(Hot *hot, int opath, int flags)
{
    char name[16];
    snprintf(name, sizeof name, "%d", opath);
    return openat(hot->descriptors, name, flags | O_CLOEXEC);
}

/* An O_PATH descriptor of a file that can be opened in passthrough and is no stub; -1: Python is to look. */
static int reached(Hot *hot, PyObject *node, uint64_t nodeid, uint64_t ino, struct stat *st)
{
    char name[NAME_ROOM];
    PyObject *parent = get_of(node, s_parent);
    int above = name_of(hot, nodeid, name) && parent && parent != Py_None ? directory_of(hot, parent) : -1;
    Py_XDECREF(parent);
    int fd = above < 0 ? -1 : openat(above, name, O_PATH | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0)
        return -1;
    if (!fstat(fd, st) && st->st_ino == ino && S_ISREG(st->st_mode) && !(st->st_mode & (S_ISUID | S_ISGID))
        && lacks(hot, fd, PyBytes_AS_STRING(hot->stub_name))
        && (!(st->st_mode & 0111) || lacks(hot, fd, CAPABILITY)))
        return fd;
    close(fd);
    return -1;
}

/* The slot of a new record of a registered inode; NULL with an exception. */
PyObject *noted_inode(Hot *hot, uint64_t ino, PyObject *backing_id)
{
    int64_t slot = take_slot(hot, INODES);
    if (slot < 0)
        return NULL;
    struct kept_inode *kept = record_at(hot, INODES, slot);
    *kept = (struct kept_inode){0, PyLong_AsUnsignedLong(backing_id), 0, 0, 0, 0};
    POINT();
    *(volatile uint64_t *)&kept->ino = ino;
    POINT();
    return PyLong_FromLongLong(slot);
}

/* The new state of an inode that is reached by this descriptor, registered; NULL where Python is to try. */
static PyObject *registered(Hot *hot, PyObject *node, PyObject *name, int fd, const struct stat *st)
{
    PyObject *backing = get_of(hot->states, s_backing), *number = NULL, *slot = NULL;
    PyObject *parent = get_of(node, s_parent), *inode = NULL, *above = NULL, *descriptor = NULL;
    if (backing && backing != Py_None && parent)
        inode = copy_of(hot->inode);
    if (inode && (above = get_of(parent, s_ino)) && (descriptor = PyLong_FromLong(fd))
        && !set_number(inode, s_ino, st->st_ino) && !put_of(inode, s_parent, above)
        && !put_of(inode, s_name, name) && !put_of(inode, s_opath, descriptor)
        && !set_number(inode, s_size, st->st_size) && !put_of(inode, s_passthrough, Py_True))
        number = backing_id_of(hot, backing, descriptor);
    if (number)
        slot = noted_inode(hot, st->st_ino, number);
    int failed = !number || !slot || put_of(inode, s_backing_id, number)
                 || put_of(inode, s_slot, slot);
    Py_XDECREF(backing);
    Py_XDECREF(number);
    Py_XDECREF(slot);
    Py_XDECREF(parent);
    Py_XDECREF(above);
    Py_XDECREF(descriptor);
    if (failed)
        Py_CLEAR(inode);
    return inode;
}

/* The state of a resident file that nobody has open, entered. NULL: Python is to open it. */
static PyObject *entered(Hot *hot, PyObject *node, uint64_t nodeid, PyObject *ino)
{
    struct stat st;
    int fd = reached(hot, node, nodeid, PyLong_AsUnsignedLongLong(ino), &st);
    if (fd < 0)
        return NULL;
    char content[NAME_ROOM];
    PyObject *name = PyBytes_FromStringAndSize(content, name_of(hot, nodeid, content));
    PyObject *inode = name ? registered(hot, node, name, fd, &st) : NULL;
    Py_XDECREF(name);
    if (!inode)
        close(fd);
    else if (PyDict_SetItem(hot->inodes, ino, inode))
        Py_CLEAR(inode);
    return inode;
}

/* An open file that could not be counted is none: a successor would have it open for good. */
static void file_undone(Hot *hot, uint64_t number)
{
    uint64_t slot = number & ((1 << HANDLE_BITS) - 1);
    PyObject *type, *error, *trace;
    PyErr_Fetch(&type, &error, &trace);
    *(volatile uint64_t *)record_at(hot, FILES, slot) = 0;
    PyObject *key = PyLong_FromUnsignedLongLong(number);
    if (!key || discard(hot->files, key) || give_slot(hot, FILES, slot))
        PyErr_Clear(); /* what had come before is the request's error */
    Py_XDECREF(key);
    PyErr_Restore(type, error, trace);
}

/* The number of a new open file, known to the ledger and to files.OpenFiles; 0 with an exception. */
uint64_t noted_file(Hot *hot, const struct in_header *in, uint64_t nodeid, PyObject *node, PyObject *handle,
                    uint32_t flags, uint32_t backing_id)
{
    int64_t slot = take_slot(hot, FILES);
    if (slot < 0)
        return 0;
    uint64_t number = ++words_of(hot)[SERIAL] << HANDLE_BITS | slot;
    struct kept_file *kept = record_at(hot, FILES, slot);
    *kept = (struct kept_file){0, nodeid, in->unique, flags, in->uid, backing_id, 0};
    POINT();
    *(volatile uint64_t *)&kept->number = number;
    POINT();
    PyObject *key = PyLong_FromUnsignedLongLong(number), *pair = PyTuple_Pack(2, node, handle);
    PyObject *id = get_of(node, s_id);
    int failed = !key || !pair || !id || PyDict_SetItem(hot->files, key, pair) || count_in(hot->opens, id, 1) < 0;
    Py_XDECREF(key);
    Py_XDECREF(pair);
    Py_XDECREF(id);
    if (failed)
        file_undone(hot, number);
    return failed ? 0 : number;
}

/* A passthrough handle. NULL with an exception. */
PyObject *new_handle(Hot *hot, PyObject *inode, uint32_t uid, uint32_t flags, uint64_t backing_id)
{
    PyObject *handle = copy_of(hot->handle), *faults = get_of(inode, s_faults);
    if (handle && (!faults || put_of(handle, s_heard, faults) || put_of(handle, s_inode, inode)
                   || set_number(handle, s_flags, flags) || set_number(handle, s_backing_id, backing_id)
                   || set_number(handle, s_uid, uid)
                   || put_of(handle, s_writable, (flags & O_ACCMODE) == O_RDONLY ? Py_False : Py_True)))
        Py_CLEAR(handle);
    Py_XDECREF(faults);
    return handle;
}

/* One more handle of a registered inode. */
static enum outcome admitted(Hot *hot, const struct in_header *in, PyObject *node, PyObject *ino, PyObject *inode,
                             uint32_t flags, struct open_out *out)
{
    uint64_t backing_id = number_of(inode, s_backing_id), opens = number_of(inode, s_opens);
    uint64_t writers = number_of(inode, s_writers) + is_writing(flags);
    PyObject *handle = PyErr_Occurred() ? NULL : new_handle(hot, inode, in->uid, flags, backing_id);
    PyObject *more = PyLong_FromUnsignedLongLong(opens + 1), *writing = PyLong_FromUnsignedLongLong(writers);
    int failed = !handle || !more || !writing || touch(hot, inode, ino, in->pid);
    if (!failed) {
        *out = (struct open_out){0, OPEN_PASSTHROUGH | OPEN_NOFLUSH, backing_id};
        out->fh = noted_file(hot, in, in->nodeid, node, handle, flags, backing_id);
        failed = !out->fh;
    }
    if (!failed) /* what follows needs no memory */
        failed = put_of(inode, s_opens, more) || put_of(inode, s_writers, writing)
                 || (PyDict_Contains(hot->idle_inodes, ino) == 1 && PyODict_DelItem(hot->idle_inodes, ino));
    Py_XDECREF(handle);
    Py_XDECREF(more);
    Py_XDECREF(writing);
    return failed ? FAILED : FOUND;
}

/* The name by which a node is reached is still its own; *st is what is there. */
static int is_there(Hot *hot, PyObject *node, uint64_t nodeid, struct stat *st)
{
    char name[NAME_ROOM];
    PyObject *parent = get_of(node, s_parent);
    int above = name_of(hot, nodeid, name) && parent && parent != Py_None ? directory_of(hot, parent) : -1;
    Py_XDECREF(parent);
    return above >= 0 && !fstatat(above, name, st, AT_SYMLINK_NOFOLLOW) && st->st_ino == number_of(node, s_ino);
}

/* marking.write of an inode that is not sealed. 0, or -1 with an exception. */
static int write_marked(Hot *hot, PyObject *inode, PyObject *ino)
{
    struct handle handle;
    PyObject *known = get_of(inode, s_handle), *name = get_of(inode, s_name);
    if (known && !PyBytes_GET_SIZE(known)) {
        Py_CLEAR(known);
        if (handle_at((int)number_of(inode, s_opath), "", &handle))
            known = PyBytes_FromStringAndSize(handle.bytes, handle.length);
        else
            PyErr_SetFromErrno(PyExc_OSError);
    }
    int failed = !known || !name || put_of(inode, s_handle, known);
    if (!failed) {
        handle.length = PyBytes_GET_SIZE(known);
        memcpy(handle.bytes, PyBytes_AS_STRING(known), handle.length);
        struct mark_of of = {.ino = PyLong_AsUnsignedLongLong(ino), .generation = ++words_of(hot)[GENERATION],
                             .parent = number_of(inode, s_parent), .handle = &handle,
                             .name = PyBytes_AS_STRING(name), .length = PyBytes_GET_SIZE(name)};
        POINT();
        failed = mark(hot, WRITTEN, ino, &of) || put_of(inode, s_marked, Py_True) || put_of(inode, s_shown, Py_None)
                 || no_longer_late(hot, ino);
    }
    Py_XDECREF(known);
    Py_XDECREF(name);
    return failed ? -1 : 0;
}

/* contents.cut, by a descriptor that is open for writing. 0, or -1 with an exception. */
static int cut(Hot *hot, PyObject *inode, PyObject *ino, int fd)
{
    if (attribute_is(inode, s_marked, Py_False) && write_marked(hot, inode, ino))
        return -1;
    if (ftruncate(fd, 0)) {
        PyErr_SetFromErrno(PyExc_OSError);
        return -1;
    }
    POINT();
    return 0;
}

/* What an open for writing does to an inode before it has a handle. PYTHONS: nothing has been changed. */
static enum outcome begun_to_write(Hot *hot, PyObject *node, uint64_t nodeid, PyObject *inode, PyObject *ino,
                                   uint32_t flags, int is_new)
{
    struct stat st = {.st_mode = 0};
    if (!is_writing(flags))
        return FOUND;
    if (!(flags & O_TRUNC))
        return attribute_is(inode, s_marked, Py_False) && write_marked(hot, inode, ino) ? FAILED : FOUND;
    /* By the descriptor, not the name: it must be no other file that loses its content. */
    if (!is_new && (!is_there(hot, node, nodeid, &st) || st.st_mode & (S_ISUID | S_ISGID)))
        return PYTHONS;
    int fd = reopened(hot, (int)number_of(inode, s_opath), O_WRONLY);
    if (fd < 0)
        return PYTHONS;
    int failed = cut(hot, inode, ino, fd) || (!is_new && set_number(inode, s_size, st.st_size));
    close(fd);
    return failed ? FAILED : FOUND;
}

/* An open for writing can be done here: it waits for no room, breaks no seal, and its marks have a place. */
static int may_write(Hot *hot, PyObject *ino, uint32_t flags)
{
    if ((flags & O_ACCMODE) == O_ACCMODE || !is_ample(hot) || !has_marks_room(hot))
        return 0;
    return !PySet_Contains(hot->seals, ino);
}

void undone(Hot *hot, PyObject *inode, PyObject *ino)
{
    PyObject *type, *error, *trace;
    PyErr_Fetch(&type, &error, &trace);
    if (let_go(hot, inode, ino))
        PyErr_Clear(); /* what had come before is the request's error */
    PyErr_Restore(type, error, trace);
}

/* An inode with its handle. `is_new`: it was entered for this. */
static enum outcome opened(Hot *hot, const struct in_header *in, PyObject *node, PyObject *ino, PyObject *inode,
                           uint32_t flags, int is_new, struct open_out *out)
{
    enum outcome outcome = begun_to_write(hot, node, in->nodeid, inode, ino, flags, is_new);
    if (outcome == FOUND)
        outcome = admitted(hot, in, node, ino, inode, flags, out);
    if (outcome != FOUND && is_new)
        undone(hot, inode, ino);
    return outcome;
}

/* The inode's state, a new reference, entered where there was none; NULL: Python is to open it. */
static PyObject *found_or_entered(Hot *hot, PyObject *node, uint64_t nodeid, PyObject *ino, uint32_t flags, int *is_new)
{
    PyObject *inode = Py_XNewRef(PyDict_GetItemWithError(hot->inodes, ino));
    *is_new = !inode;
    if (!inode)  /* one that is late has a record in the ledger already, which its new state takes */
        return PyErr_Occurred() || is_late(hot, ino) || idle_gives_way(hot) ? NULL : entered(hot, node, nodeid, ino);
    if (!number_of(inode, s_backing_id) || !is_plain(inode)
        || (is_writing(flags) && !attribute_is(inode, s_shown, Py_None)))
        Py_CLEAR(inode);
    return inode;
}

enum outcome open_file(Hot *hot, const struct in_header *in, uint32_t flags, struct open_out *out)
{
    PyObject *node = node_at(hot, in->nodeid);
    if (!node || (!is_writing(flags) && flags & O_TRUNC) || !attribute_is(node, s_anchor, Py_None))
        return PYTHONS;
    PyObject *ino = get_of(node, s_ino);
    enum outcome outcome = PYTHONS;
    if (ino && PyDict_GetItemWithError(hot->by_ino, ino) == node && has_slot(hot, FILES) && has_slot(hot, INODES)
        && (!is_writing(flags) || may_write(hot, ino, flags))) {
        int is_new;
        Py_INCREF(node);
        PyObject *inode = found_or_entered(hot, node, in->nodeid, ino, flags, &is_new);
        if (inode && !PyErr_Occurred())
            outcome = opened(hot, in, node, ino, inode, flags, is_new, out);
        Py_XDECREF(inode);
        Py_DECREF(node);
    }
    Py_XDECREF(ino);
    return outcome;
}
