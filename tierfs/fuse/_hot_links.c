/* LINK and READLINK of what is plainly there: what vfs.link and vfs.readlink do with nodes.reach and nodes.found. */
#include "_hot.h"

#include <fcntl.h>
#include <string.h>
#include <unistd.h>

/* The descriptor of the directory in which a node is, and its name there; -1: Python is to say. */
static int directory_above(Hot *hot, PyObject *node, uint64_t nodeid, char name[NAME_ROOM])
{
    if (!node || node == hot->root || !attribute_is(node, s_anchor, Py_None) || !name_of(hot, nodeid, name))
        return -1;
    PyObject *parent = get_of(node, s_parent);
    int fd = parent && parent != Py_None ? directory_of(hot, parent) : -1;
    Py_XDECREF(parent);
    return fd;
}

/* Give it this name, by an O_PATH descriptor, and say so to everyone. */
static enum outcome linked(Hot *hot, const struct in_header *in, int fd, const struct place *to,
                           const struct known *known, struct stat *st)
{
    if (!is_still(known->inode) || idle_dropped(hot, known->ino))
        return PYTHONS;
    intend(hot, in->unique, DOING_LINK, NULL, NULL, NULL);
    if (linkat(fd, "", to->fd, to->name, AT_EMPTY_PATH))
        return PYTHONS;
    POINT();
    if (fstat(fd, st)) {
        PyErr_SetFromErrno(PyExc_OSError);
        return FAILED;
    }
    return new_name_marked(hot, to, known, st) || leave_name(hot, known->node) || moved(hot, known->node, to) ? FAILED
                                                                                                           : FOUND;
}

/* Of a regular file by its descriptor, if it is still this node. */
static enum outcome link_known(Hot *hot, const struct in_header *in, int fd, PyObject *node, const struct place *to,
                               struct entry_out *out)
{
    struct known known = {NULL, NULL, NULL};
    struct stat st;
    enum outcome outcome = PYTHONS;
    if (fstat(fd, &st) || !S_ISREG(st.st_mode) || !found_known(hot, st.st_ino, &known) || known.node != node) {
        drop_known(&known);
        return PYTHONS;
    }
    long seconds = seconds_of(hot, &st);
    if (seconds >= 0)
        outcome = linked(hot, in, fd, to, &known, &st);
    if (outcome == FOUND) {
        uint64_t nodeid = number_of(node, s_id);
        looked_up(hot, nodeid);
        POINT();
        pack_attr(&out->attr, &st);
        out->nodeid = nodeid;
        out->entry_valid = hot->entry_seconds;
        out->attr_valid = for_now(hot, seconds);
    }
    drop_known(&known);
    return outcome;
}

enum outcome link_file(Hot *hot, const struct in_header *in, uint64_t nodeid, const char *name, struct entry_out *out)
{
    struct place to;
    char own[NAME_ROOM];
    PyObject *node = node_at(hot, nodeid);
    memset(out, 0, sizeof *out);
    if (hot->privileged != Py_True || !has_slots(hot, LONGS, 1) || !has_marks_room(hot)
        || !found_place(hot, in->nodeid, name, strlen(name), &to))
        return PYTHONS;
    int above = directory_above(hot, node, nodeid, own);
    int fd = above < 0 ? -1 : openat(above, own, O_PATH | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0)
        return PYTHONS;
    enum outcome outcome = link_known(hot, in, fd, node, &to, out);
    close(fd);
    return outcome;
}

enum outcome read_link(Hot *hot, uint64_t nodeid, char *to, size_t *length)
{
    char name[NAME_ROOM];
    struct stat st;
    PyObject *node = node_at(hot, nodeid);
    int fd = directory_above(hot, node, nodeid, name);
    ssize_t size = fd < 0 ? -1 : readlinkat(fd, name, to, LINK_ROOM);
    /* Whose it was is looked at after: a name that has changed its meaning before says so. */
    if (size < 0 || size == LINK_ROOM || fstatat(fd, name, &st, AT_SYMLINK_NOFOLLOW)
        || st.st_ino != number_of(node, s_ino))
        return PYTHONS;
    *length = size;
    return FOUND;
}
