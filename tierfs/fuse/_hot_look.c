/* LOOKUP and GETATTR of what is plainly there: what vfs.lookup, vfs.getattr and nodes.found do with names that are what
 * they were, and with files that show what they are.
 */
#include "_hot.h"

#include <string.h>

/* --- attributes ------------------------------------------------------------------------------------------ */

static int status(int fd, const char *name, struct stat *st)
{
    PyThreadState *state = paused();
    int failed = name ? fstatat(fd, name, st, AT_SYMLINK_NOFOLLOW) : fstat(fd, st);
    failed = failed ? errno : 0;
    resumed(state);
    return failed;
}

int pack_attr(struct attr *to, const struct stat *st)
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

/* Appearance.is_itself, as far as that can be said here: 1. 0: Python is to say. */
static int is_itself(Hot *hot, PyObject *ino, PyObject *inode, const struct stat *st)
{
    int64_t ctime;
    if (PySet_Contains(hot->plain, ino) == 1)
        return 1;
    /* Without blocks it is a stub, most likely, if it has a size. */
    if (hot->records == Py_None || (!st->st_blocks && st->st_size) || (inode && !attribute_is(inode, s_shown, Py_None))
        || is_late(hot, ino))
        return 0;
    if (__builtin_mul_overflow((int64_t)st->st_ctim.tv_sec, (int64_t)1000000000, &ctime)
        || __builtin_add_overflow(ctime, st->st_ctim.tv_nsec, &ctime))
        return 0;
    return looked_up_record(hot->records, st->st_ino, ctime) != PYTHONS;
}

/* For how many seconds the kernel may keep these attributes; -1 where they are not what is to be shown. */
long seconds_of(Hot *hot, const struct stat *st)
{
    if (!S_ISREG(st->st_mode))
        return attributes_last(hot, st, NULL, NULL);
    PyObject *ino = number_object(hot, st->st_ino);
    PyObject *inode = ino ? PyDict_GetItemWithError(hot->inodes, ino) : NULL;
    long seconds = -1;
    if (ino && !PyErr_Occurred() && is_itself(hot, ino, inode, st)) {
        int changing = inode && number_of(inode, s_writers);
        seconds = PyErr_Occurred() ? -1 : changing ? 0 : (long)attributes_last(hot, st, ino, inode);
    } else if (ino && !PyErr_Occurred()) {
        PyObject *said = PyObject_CallFunction(hot->holds, "OLL", ino, (long long)nanoseconds(&st->st_ctim),
                                               (long long)st->st_blocks);
        seconds = said ? PyLong_AsLong(said) : -1;
        if (seconds > 0)
            seconds = attributes_last(hot, st, ino, inode);
        Py_XDECREF(said);
    }
    Py_XDECREF(ino);
    return seconds;
}

/* --- looking -------------------------------------------------------------------------------------------- */

/* nodes.found: a known node has this name. 0, or -1 where Python is to do it. */
static int follows(Hot *hot, PyObject *node, const struct place *place, mode_t mode)
{
    char known[NAME_ROOM];
    uint64_t number = number_of(node, s_id);
    size_t has = PyErr_Occurred() ? 0 : name_of(hot, number, known);
    if (node == hot->root)
        return -1;
    if (has == place->length && !memcmp(known, place->name, has) && attribute_is(node, s_parent, place->parent))
        return 0;
    PyObject *anchor = get_of(node, s_anchor);
    int may = anchor && (anchor == Py_None || PyBytes_Check(anchor)) && has_longs(hot, 1);
    Py_XDECREF(anchor);
    if (may && !S_ISDIR(mode) && leave_name(hot, node))
        return -1;
    return may ? moved(hot, node, place) : -1;
}

/* The number of the node that a name means now, one lookup counted; 0 where Python is to say. */
static uint64_t counted(Hot *hot, const struct place *place, const struct stat *st)
{
    PyObject *ino = number_object(hot, st->st_ino);
    PyObject *node = ino ? PyDict_GetItemWithError(hot->by_ino, ino) : NULL;
    uint64_t nodeid = 0;
    if (node) {
        Py_INCREF(node);
        if (!follows(hot, node, place, st->st_mode)) {
            nodeid = number_of(node, s_id);
            looked_up(hot, nodeid);
        }
        Py_DECREF(node);
    } else if (ino && !PyErr_Occurred() && (!S_ISDIR(st->st_mode) || st->st_dev == hot->device)) {
        nodeid = enter(hot, ino, place->parent, place->name, place->length);
    }
    Py_XDECREF(ino);
    return PyErr_Occurred() ? 0 : nodeid;
}

/* The kernel has been told of it before. */
static int is_known(Hot *hot, uint64_t number)
{
    PyObject *ino = hot->long_seconds ? number_object(hot, number) : NULL;
    int known = ino && PyDict_Contains(hot->by_ino, ino) == 1;
    Py_XDECREF(ino);
    return known;
}

/* A name in a directory whose descriptor is at hand. */
enum outcome look_up_in(Hot *hot, PyObject *parent, int fd, const char *name, Py_ssize_t length, int listed,
                        struct entry_out *out)
{
    struct stat st;
    if (length < 1 || length >= NAME_ROOM || (Py_ssize_t)strnlen(name, length) != length)
        return PYTHONS;
    int failed = status(fd, name, &st);
    if (failed)
        return failed == ENOENT ? ABSENT : PYTHONS;
    if (listed || is_known(hot, st.st_ino))
        prove(hot, fd, name, &st);
    else
        believe(hot, &st);
    memset(out, 0, sizeof *out);
    long seconds = pack_attr(&out->attr, &st) ? seconds_of(hot, &st) : -1;
    if (seconds < 0)
        return PYTHONS;
    out->nodeid = counted(hot, &(struct place){parent, fd, name, length, 0}, &st);
    out->entry_valid = name_lasts(hot, st.st_mode, st.st_nlink);
    out->attr_valid = seconds;
    if (out->nodeid)
        told_for(hot, out->nodeid, entry_lasts(out));
    return out->nodeid ? FOUND : PYTHONS;
}

/* A name that is asked for and not there is about to be made, or to be given to another file. */
static void note_absent(Hot *hot, uint64_t above, const char *name, size_t length)
{
    if (length < sizeof hot->absent.name) {
        hot->absent.above = above;
        memcpy(hot->absent.name, name, length + 1);
    }
}

enum outcome look_up(Hot *hot, uint64_t above, const char *name, Py_ssize_t length, int listed, struct entry_out *out)
{
    PyObject *parent = node_at(hot, above);
    int fd = parent ? directory_of(hot, parent) : -1;
    enum outcome outcome = fd < 0 ? PYTHONS : look_up_in(hot, parent, fd, name, length, listed, out);
    if (outcome == ABSENT)
        note_absent(hot, above, name, length);
    return outcome;
}

enum outcome fill_attributes(Hot *hot, const struct stat *st, struct attr_out *out)
{
    memset(out, 0, sizeof *out);
    long seconds = pack_attr(&out->attr, st) ? seconds_of(hot, st) : -1;
    out->attr_valid = seconds;
    return seconds < 0 ? PYTHONS : FOUND;
}

/* nodes.stat_of_kept, where edits behind the mount are seen. */
static int is_kept(Hot *hot, PyObject *node, struct stat *st)
{
    PyObject *id = hot->long_seconds ? get_of(node, s_id) : NULL;
    PyObject *kept = id ? PyDict_GetItemWithError(hot->dirs, id) : NULL;
    int fd = kept ? (int)PyLong_AsLong(kept) : -1;
    Py_XDECREF(id);
    return fd >= 0 && !status(fd, NULL, st) && st->st_nlink;
}

enum outcome get_attributes(Hot *hot, uint64_t nodeid, struct attr_out *out)
{
    struct stat st;
    PyObject *node = node_at(hot, nodeid);
    if (!node || !attribute_is(node, s_anchor, Py_None))
        return PYTHONS;
    if (node == hot->root) {
        if (status(hot->root_fd, NULL, &st))
            return PYTHONS;
    } else if (!is_kept(hot, node, &st)) {
        char name[NAME_ROOM];
        PyObject *parent = get_of(node, s_parent);
        int fd = name_of(hot, nodeid, name) && parent && parent != Py_None ? directory_of(hot, parent) : -1;
        int failed = fd < 0 || status(fd, name, &st);
        if (!failed && is_restless(hot, &st))
            doubt(hot, &st);
        else if (!failed)
            prove(hot, fd, name, &st);
        Py_XDECREF(parent);
        if (failed || st.st_ino != number_of(node, s_ino))
            return PYTHONS;
    }
    return fill_attributes(hot, &st, out);
}
