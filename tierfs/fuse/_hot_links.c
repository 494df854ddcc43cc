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

/* Give it this name, and say so to everyone. */
static enum outcome linked(Hot *hot, const struct in_header *in, const struct place *to, struct target *at)
{
    struct known known = {at->ino, at->node, at->inode};
    if (!is_still(known.inode))
        return PYTHONS;
    intend(hot, in->unique, DOING_LINK, NULL, NULL, NULL);
    if (linkat(at->fd, "", to->fd, to->name, AT_EMPTY_PATH))
        return PYTHONS;
    POINT();
    if (fstat(at->fd, &at->st)) {
        PyErr_SetFromErrno(PyExc_OSError);
        return FAILED;
    }
    int failed = new_name_marked(hot, to, &known, &at->st) || leave_name(hot, known.node) || moved(hot, known.node, to);
    return failed ? FAILED : FOUND;
}

/* Of a regular file that has been reached. */
static enum outcome link_reached(Hot *hot, const struct in_header *in, const struct place *to, struct target *at,
                                 struct entry_out *out)
{
    if (!S_ISREG(at->st.st_mode) || PyDict_GetItemWithError(hot->by_ino, at->ino) != at->node)
        return PYTHONS;
    long seconds = seconds_of(hot, &at->st);
    enum outcome outcome = seconds >= 0 ? linked(hot, in, to, at) : PYTHONS;
    if (outcome != FOUND)
        return outcome;
    uint64_t nodeid = number_of(at->node, s_id);
    looked_up(hot, nodeid);
    POINT();
    pack_attr(&out->attr, &at->st);
    out->nodeid = nodeid;
    out->entry_valid = hot->entry_seconds;
    out->attr_valid = for_now(hot, seconds);
    return FOUND;
}

enum outcome link_file(Hot *hot, const struct in_header *in, uint64_t nodeid, const char *name, struct entry_out *out)
{
    struct place to;
    struct target at;
    memset(out, 0, sizeof *out);
    if (hot->privileged != Py_True || !has_longs(hot, 1) || !has_marks_room(hot)
        || !found_place(hot, in->nodeid, name, strlen(name), &to))
        return PYTHONS;
    int reached = found_target(hot, nodeid, &at) && reached_target(hot, &at);
    enum outcome outcome = reached ? link_reached(hot, in, &to, &at, out) : PYTHONS;
    let_target_go(&at);
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
