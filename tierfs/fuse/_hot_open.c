/* OPEN for reading of a resident file, and RELEASE of what is in passthrough: what vfs.open, gate.open or gate.reopen, and
 * files.release with gate.release do where nothing has to be waited for, marked or fetched.
 */
#include "_hot.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/xattr.h>
#include <time.h>
#include <unistd.h>

#define CAPABILITY "security.capability"
#define BACKING_OPEN 0x4010E501
#define BACKING_CLOSE 0x4004E502

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

/* report.HeatReport.touch. 0, or -1 with an exception. */
int touch(Hot *hot, PyObject *inode, PyObject *ino)
{
    PyObject *before = PyDict_GetItemWithError(hot->touched, ino);
    long count = before ? PyLong_AsLong(PyTuple_GET_ITEM(before, 0)) : 0;
    PyObject *size = get_of(inode, s_size), *parent = get_of(inode, s_parent);
    PyObject *name = get_of(inode, s_name), *entry = NULL;
    if (size && parent && name && !PyErr_Occurred())
        entry = Py_BuildValue("ldOOO", count + 1, now(), size, parent, name);
    Py_XDECREF(size);
    Py_XDECREF(parent);
    Py_XDECREF(name);
    int failed = entry ? PyDict_SetItem(hot->touched, ino, entry) : -1;
    Py_XDECREF(entry);
    return failed;
}

/* --- opening --------------------------------------------------------------------------------------------- */

/* gate.backing.open: the id; NULL with an exception. */
PyObject *backing_id_of(Hot *hot, PyObject *backing, PyObject *opath)
{
    struct { int32_t fd; uint32_t flags; uint64_t padding; } map = {(int32_t)PyLong_AsLong(opath), 0, 0};
    if ((PyObject *)Py_TYPE(backing) != hot->kernel_backing)
        return PyObject_CallMethodOneArg(backing, s_open->word, opath);
    int id = ioctl(hot->fd, BACKING_OPEN, &map);
    return id > 0 ? PyLong_FromLong(id) : PyErr_SetFromErrno(PyExc_OSError);
}

/* gate.backing.close. 0, or -1 with an exception. */
static int backing_closed(Hot *hot, PyObject *backing, PyObject *number)
{
    uint32_t id = (uint32_t)PyLong_AsUnsignedLong(number);
    if ((PyObject *)Py_TYPE(backing) == hot->kernel_backing && !ioctl(hot->fd, BACKING_CLOSE, &id))
        return 0;
    PyObject *done = PyObject_CallMethodOneArg(backing, s_close->word, number);
    Py_XDECREF(done);
    return done ? 0 : -1;
}

/* An O_PATH descriptor of a file that can be opened in passthrough and is no stub; -1: Python is to look. */
static int reached(Hot *hot, PyObject *node, uint64_t nodeid, uint64_t ino, struct stat *st)
{
    struct kept_node *kept = kept_of(hot, nodeid);
    char name[INLINE + 1] = "";
    if (!kept)
        return -1;
    memcpy(name, kept->content, kept->length);
    PyObject *parent = get_of(node, s_parent);
    int above = *name && parent && parent != Py_None ? directory_of(hot, parent) : -1;
    Py_XDECREF(parent);
    int fd = above < 0 ? -1 : openat(above, name, O_PATH | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0)
        return -1;
    if (!fstat(fd, st) && st->st_ino == ino && S_ISREG(st->st_mode) && !(st->st_mode & (S_ISUID | S_ISGID))
        && lacks(fd, PyBytes_AS_STRING(hot->stub_name))
        && (!(st->st_mode & 0111) || lacks(fd, CAPABILITY)))
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
    PyObject *backing = get_of(hot->gate, s_backing), *number = NULL, *slot = NULL;
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
    struct kept_node *kept = kept_of(hot, nodeid);
    PyObject *name = PyBytes_FromStringAndSize(kept->content, kept->length);
    PyObject *inode = name ? registered(hot, node, name, fd, &st) : NULL;
    Py_XDECREF(name);
    if (!inode)
        close(fd);
    else if (PyDict_SetItem(hot->inodes, ino, inode))
        Py_CLEAR(inode);
    return inode;
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
    return failed ? 0 : number;
}

/* A passthrough handle. NULL with an exception. */
PyObject *new_handle(Hot *hot, PyObject *inode, uint32_t uid, uint32_t flags, uint64_t backing_id)
{
    PyObject *handle = copy_of(hot->handle);
    if (handle && (put_of(handle, s_inode, inode) || set_number(handle, s_flags, flags)
                   || set_number(handle, s_backing_id, backing_id) || set_number(handle, s_uid, uid)
                   || put_of(handle, s_writable, (flags & O_ACCMODE) == O_RDONLY ? Py_False : Py_True)))
        Py_CLEAR(handle);
    return handle;
}

/* One more handle of a registered inode. */
static enum outcome admitted(Hot *hot, const struct in_header *in, PyObject *node, PyObject *ino, PyObject *inode,
                             uint32_t flags, struct open_out *out)
{
    uint64_t backing_id = number_of(inode, s_backing_id), opens = number_of(inode, s_opens);
    PyObject *handle = PyErr_Occurred() ? NULL : new_handle(hot, inode, in->uid, flags, backing_id);
    int failed = !handle || set_number(inode, s_opens, opens + 1) || touch(hot, inode, ino);
    if (!failed && PyDict_Contains(hot->idle_inodes, ino) == 1)
        failed = PyODict_DelItem(hot->idle_inodes, ino);
    if (!failed) {
        *out = (struct open_out){0, OPEN_PASSTHROUGH | OPEN_NOFLUSH, backing_id};
        out->fh = noted_file(hot, in, in->nodeid, node, handle, flags, backing_id);
        failed = !out->fh;
    }
    Py_XDECREF(handle);
    return failed ? FAILED : FOUND;
}

enum outcome open_file(Hot *hot, const struct in_header *in, uint32_t flags, struct open_out *out)
{
    PyObject *node = node_at(hot, in->nodeid);
    if (!node || (flags & (O_ACCMODE | O_TRUNC)) != O_RDONLY || !attribute_is(node, s_anchor, Py_None))
        return PYTHONS;
    PyObject *ino = get_of(node, s_ino);
    enum outcome outcome = PYTHONS;
    if (ino && PyDict_GetItemWithError(hot->by_ino, ino) == node && has_slot(hot, FILES) && has_slot(hot, INODES)) {
        Py_INCREF(node);
        PyObject *inode = Py_XNewRef(PyDict_GetItemWithError(hot->inodes, ino));
        if (!inode && !PyErr_Occurred())
            inode = entered(hot, node, in->nodeid, ino);
        else if (inode && (!number_of(inode, s_backing_id) || !is_plain(inode)))
            Py_CLEAR(inode);
        if (inode && !PyErr_Occurred())
            outcome = admitted(hot, in, node, ino, inode, flags, out);
        Py_XDECREF(inode);
        Py_DECREF(node);
    }
    Py_XDECREF(ino);
    return outcome;
}

/* --- closing --------------------------------------------------------------------------------------------- */

/* gate._retire of a resident file that nobody has open. 0, or -1 with an exception. */
static int let_go(Hot *hot, PyObject *inode, PyObject *ino)
{
    PyObject *backing = get_of(hot->gate, s_backing), *number = get_of(inode, s_backing_id);
    PyObject *type = NULL, *error = NULL, *trace = NULL;
    int ended = backing && number && !backing_closed(hot, backing, number);
    if (!ended)
        PyErr_Fetch(&type, &error, &trace);
    uint64_t slot = number_of(inode, s_slot);
    int opath = (int)number_of(inode, s_opath);
    *(volatile uint64_t *)record_at(hot, INODES, slot) = 0;
    POINT();
    int failed = PyErr_Occurred() || set_number(inode, s_backing_id, 0) || set_number(inode, s_slot, 0)
                 || put_of(inode, s_passthrough, Py_False) || give_slot(hot, INODES, slot)
                 || PyDict_DelItem(hot->inodes, ino);
    close(opath);
    PyObject *none = PyLong_FromLong(-1);
    failed = failed || !none || put_of(inode, s_opath, none);
    if (!ended && !failed)
        PyErr_Restore(type, error, trace);
    Py_XDECREF(none);
    Py_XDECREF(backing);
    Py_XDECREF(number);
    return failed || PyErr_Occurred() ? -1 : 0;
}

/* gate._retire. 0, or -1 with an exception. */
static int retired(Hot *hot, PyObject *inode, PyObject *ino)
{
    if (is_plain(inode) && !number_of(inode, s_opens) && number_of(inode, s_backing_id) && number_of(inode, s_slot)
        && PyDict_GetItemWithError(hot->inodes, ino) == inode && !attribute_is(hot->gate, s_backing, Py_None))
        return let_go(hot, inode, ino);
    PyObject *done = PyErr_Occurred() ? NULL : PyObject_CallMethodOneArg(hot->idle, s_retire->word, inode);
    Py_XDECREF(done);
    return done ? 0 : -1;
}

/* gate.idle.drop. 0, or -1 with an exception. */
int idle_dropped(Hot *hot, PyObject *ino)
{
    PyObject *entry = Py_XNewRef(PyDict_GetItemWithError(hot->idle_inodes, ino));
    if (!entry)
        return PyErr_Occurred() ? -1 : 0;
    int failed = PyODict_DelItem(hot->idle_inodes, ino) || retired(hot, PyTuple_GET_ITEM(entry, 0), ino);
    Py_DECREF(entry);
    return failed ? -1 : 0;
}

/* Let the one go that was used least recently. 0, or -1 with an exception. */
static int oldest_retired(Hot *hot)
{
    PyObject *each = PyObject_GetIter(hot->idle_inodes), *ino = each ? PyIter_Next(each) : NULL;
    Py_XDECREF(each);
    int failed = ino ? idle_dropped(hot, ino) : -1;
    Py_XDECREF(ino);
    return failed;
}

/* idle.Idle.keep, but for those that are too many then. 0, or -1 with an exception. */
static int kept_idle(Hot *hot, PyObject *inode, PyObject *ino)
{
    PyObject *entry = Py_BuildValue("Od", inode, now() + hot->idle_seconds);
    int failed = entry ? PyODict_SetItem(hot->idle_inodes, ino, entry) : -1;
    Py_XDECREF(entry);
    return failed;
}

/* It stays registered when nobody has it open any more, once its mark is made. */
static int may_stay(PyObject *inode)
{
    PyObject *name = get_of(inode, s_name);
    int named = name && PyObject_IsTrue(name) == 1;
    Py_XDECREF(name);
    return named && number_of(inode, s_backing_id) && !number_of(inode, s_set_id)
           && attribute_is(inode, s_gone, Py_False) && is_plain(inode);
}

/* gate._mark_closed of who was the last that had it open for writing. 0, or -1 with an exception. */
static int close_marked(Hot *hot, PyObject *inode, PyObject *ino)
{
    struct stat st;
    int opath = (int)number_of(inode, s_opath);
    if (PyErr_Occurred() || fstat(opath, &st)) {
        if (!PyErr_Occurred())
            PyErr_SetFromErrno(PyExc_OSError);
        return -1;
    }
    struct mark_of of = {.ino = st.st_ino, .parent = number_of(inode, s_parent), .a = st.st_size, .b = st.st_blocks};
    if (set_number(inode, s_size, st.st_size) || mark(hot, CLOSED, ino, &of))
        return -1;
    return put_of(inode, s_marked, Py_False);
}

/* A writer less. 0, or -1 with an exception. */
static int stopped_writing(Hot *hot, PyObject *inode, PyObject *ino)
{
    uint64_t writers = number_of(inode, s_writers);
    if (PyErr_Occurred() || set_number(inode, s_writers, writers - 1))
        return -1;
    return writers == 1 && attribute_is(inode, s_marked, Py_True) ? close_marked(hot, inode, ino) : 0;
}

/* A node that has a descriptor of its own may end with its last handle. */
static int needs_look(PyObject *node)
{
    PyObject *anchor = get_of(node, s_anchor);
    int descriptor = !anchor || PyLong_Check(anchor);
    Py_XDECREF(anchor);
    return descriptor;
}

static enum outcome closed(Hot *hot, PyObject *key, uint64_t fh, PyObject *node, PyObject *inode, int writable)
{
    uint64_t opens = number_of(inode, s_opens);
    PyObject *ino = get_of(inode, s_ino), *id = get_of(node, s_id);
    uint64_t slot = fh & ((1 << HANDLE_BITS) - 1);
    int failed = !ino || !id || PyErr_Occurred() || PyDict_DelItem(hot->files, key)
                 || set_number(inode, s_opens, opens - 1) || (writable && stopped_writing(hot, inode, ino))
                 || (opens == 1 && kept_idle(hot, inode, ino))
                 || count_in(hot->opens, id, -1) < 0;
    POINT();
    *(volatile uint64_t *)record_at(hot, FILES, slot) = 0;
    POINT();
    failed = failed || give_slot(hot, FILES, slot);
    if (!failed && (uint64_t)PyDict_GET_SIZE(hot->idle_inodes) > number_of(hot->idle, s_most))
        failed = oldest_retired(hot);
    Py_XDECREF(ino);
    Py_XDECREF(id);
    return failed ? FAILED : FOUND;
}

enum outcome release_file(Hot *hot, uint64_t fh)
{
    PyObject *key = PyLong_FromUnsignedLongLong(fh);
    PyObject *pair = key ? Py_XNewRef(PyDict_GetItemWithError(hot->files, key)) : NULL;
    PyObject *handle = pair ? PyTuple_GET_ITEM(pair, 1) : NULL;
    PyObject *inode = handle ? get_of(handle, s_inode) : NULL;
    enum outcome outcome = PYTHONS;
    if (inode && number_of(handle, s_backing_id) && !needs_look(PyTuple_GET_ITEM(pair, 0)) && may_stay(inode)) {
        int writable = attribute_is(handle, s_writable, Py_True);
        int may = writable ? has_marks_room(hot) : attribute_is(inode, s_marked, Py_False);
        if (may && !PyErr_Occurred())
            outcome = closed(hot, key, fh, PyTuple_GET_ITEM(pair, 0), inode, writable);
    }
    Py_XDECREF(inode);
    Py_XDECREF(pair);
    Py_XDECREF(key);
    return outcome;
}
