/* RELEASE of what is in passthrough, and registrations that end: what files.release, gate.release, states.retire and
 * idle.Idle do with resident files.
 */
#include "_hot.h"

#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#define BACKING_CLOSE 0x4004E502

/* Seconds of CLOCK_MONOTONIC. */
double monotonic(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

int backing_closed(Hot *hot, PyObject *backing, PyObject *number)
{
    uint32_t id = (uint32_t)PyLong_AsUnsignedLong(number);
    if ((PyObject *)Py_TYPE(backing) == hot->kernel_backing && !ioctl(hot->fd, BACKING_CLOSE, &id))
        return 0;
    PyObject *done = PyObject_CallMethodOneArg(backing, s_close->word, number);
    Py_XDECREF(done);
    return done ? 0 : -1;
}

/* states.retire of a resident file that nobody has open. 0, or -1 with an exception. */
int let_go(Hot *hot, PyObject *inode, PyObject *ino)
{
    uint64_t slot = number_of(inode, s_slot);
    int opath = (int)number_of(inode, s_opath);
    if (PyErr_Occurred())
        return -1;
    PyObject *backing = get_of(hot->states, s_backing), *number = get_of(inode, s_backing_id);
    PyObject *type = NULL, *error = NULL, *trace = NULL;
    int ended = backing && number && !backing_closed(hot, backing, number);
    if (!ended)
        PyErr_Fetch(&type, &error, &trace);
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

/* states.retire. 0, or -1 with an exception. */
static int retired(Hot *hot, PyObject *inode, PyObject *ino)
{
    if (hot->memory.obj && is_plain(inode) && !number_of(inode, s_opens) && number_of(inode, s_backing_id)
        && number_of(inode, s_slot) && PyDict_GetItemWithError(hot->inodes, ino) == inode
        && !attribute_is(hot->states, s_backing, Py_None))
        return let_go(hot, inode, ino);
    PyObject *done = PyErr_Occurred() ? NULL : PyObject_CallMethodOneArg(hot->states, s_retire->word, inode);
    Py_XDECREF(done);
    return done ? 0 : -1;
}

int retire(Hot *hot, PyObject *inode)
{
    PyObject *ino = get_of(inode, s_ino);
    int failed = !ino || retired(hot, inode, ino);
    Py_XDECREF(ino);
    return failed ? -1 : 0;
}

/* states.idle.drop. 0, or -1 with an exception. */
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

int idle_gives_way(Hot *hot)
{
    if (!PyDict_GET_SIZE(hot->idle_inodes) || (uint64_t)PyDict_GET_SIZE(hot->inodes) < number_of(hot->idle, s_room))
        return PyErr_Occurred() ? -1 : 0;
    return oldest_retired(hot);
}

/* idle.Idle.keep, but for those that are too many then. 0, or -1 with an exception. */
static int kept_idle(Hot *hot, PyObject *inode, PyObject *ino)
{
    PyObject *until = PyFloat_FromDouble(monotonic() + hot->idle_seconds);
    PyObject *entry = until ? PyTuple_Pack(2, inode, until) : NULL;
    Py_XDECREF(until);
    int failed = entry ? PyODict_SetItem(hot->idle_inodes, ino, entry) : -1;
    Py_XDECREF(entry);
    return failed;
}

/* More are idle, or have a descriptor, than may. */
static int is_too_full(Hot *hot)
{
    return (uint64_t)PyDict_GET_SIZE(hot->idle_inodes) > number_of(hot->idle, s_most)
           || (uint64_t)PyDict_GET_SIZE(hot->inodes) > number_of(hot->idle, s_room);
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

/* marking.closed of who was the last that had it open for writing. 0, or -1 with an exception. */
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
    if (!failed && opens == 1 && is_too_full(hot))
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
        int may = writable ? has_marks_room(hot)
                           : attribute_is(inode, s_marked, Py_False) || number_of(inode, s_writers);
        if (may && !PyErr_Occurred())
            outcome = closed(hot, key, fh, PyTuple_GET_ITEM(pair, 0), inode, writable);
    }
    Py_XDECREF(inode);
    Py_XDECREF(pair);
    Py_XDECREF(key);
    return outcome;
}
