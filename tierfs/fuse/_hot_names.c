/* UNLINK, RMDIR and RENAME to a name that is free: what names.Names does with files of one name that nobody has open,
 * with directories, and with names that change.
 */
#include "_hot.h"

#include <fcntl.h>
#include <string.h>
#include <unistd.h>

/* Where a request's name is; 0 where Python is to say. */
int found_place(Hot *hot, uint64_t nodeid, const char *name, size_t length, struct place *place)
{
    PyObject *parent = node_at(hot, nodeid);
    if (!parent || !length || length > 255)
        return 0;
    *place = (struct place){parent, directory_of(hot, parent), name, length, number_of(parent, s_ino)};
    return place->fd >= 0 && !PyErr_Occurred();
}

/* The file handle of a name ("": of the descriptor); 0 where there is none. */
int handle_at(int fd, const char *name, struct handle *handle)
{
    struct { struct file_handle head; unsigned char bytes[MAX_HANDLE_SZ]; } found = {.head.handle_bytes = MAX_HANDLE_SZ};
    int mount;
    if (name_to_handle_at(fd, name, &found.head, &mount, *name ? 0 : AT_EMPTY_PATH))
        return 0;
    handle->length = sizeof found.head.handle_type + found.head.handle_bytes;
    memcpy(handle->bytes, &found.head.handle_type, sizeof found.head.handle_type);
    memcpy(handle->bytes + sizeof found.head.handle_type, found.head.f_handle, found.head.handle_bytes);
    return 1;
}

/* The node of an inode, and its state in the gate; NULL where there is none. Borrowed. */
struct known { PyObject *ino, *node, *inode; };

static int found_known(Hot *hot, uint64_t number, struct known *known)
{
    known->ino = PyLong_FromUnsignedLongLong(number);
    known->node = known->ino ? PyDict_GetItemWithError(hot->by_ino, known->ino) : NULL;
    known->inode = known->ino ? PyDict_GetItemWithError(hot->inodes, known->ino) : NULL;
    return !PyErr_Occurred();
}

/* The node is reached by a name that the ledger holds itself, and nobody has it open; or there is none. */
static int is_simple(Hot *hot, PyObject *node)
{
    if (!node)
        return 1;
    if (node == hot->root || !attribute_is(node, s_anchor, Py_None) || !kept_of(hot, number_of(node, s_id)))
        return 0;
    return !PyErr_Occurred();
}

static int is_open(Hot *hot, PyObject *node)
{
    PyObject *id = node ? get_of(node, s_id) : NULL;
    int there = id ? PyDict_Contains(hot->opens, id) : 0;
    Py_XDECREF(id);
    return there;
}

/* gate.entry. 0, or -1 with an exception. */
static int entry_marked(Hot *hot, const struct place *place, uint64_t removed)
{
    struct mark_of of = {.parent = place->ino, .a = removed, .name = place->name, .length = place->length};
    return append_mark(hot, ENTRY, &of) < 0 ? -1 : 0;
}

/* --- names that go --------------------------------------------------------------------------------------- */

/* nodes._bury: no name is left, and nobody has it open. 0, or -1 with an exception. */
static int buried(Hot *hot, PyObject *node, PyObject *ino, const struct stat *st)
{
    uint64_t number = number_of(node, s_id), slot = number & SLOT;
    struct kept_node *kept = record_at(hot, NODES, slot);
    struct kept_node now = {number, st->st_ino, kept->parent, kept->lookups ? kept->lookups : 1, GONE_NODE, 0, ""};
    int64_t place = take_slot(hot, LONGS);
    if (place < 0)
        return -1;
    struct kept_long *last = record_at(hot, LONGS, place);
    now.length = last->length = packed_stat(st, last->content);
    PyObject *former = PyBytes_FromStringAndSize(kept->content, kept->length);
    PyObject *packed = PyBytes_FromStringAndSize(last->content, last->length);
    PyObject *anchor = packed ? PyObject_CallOneArg(hot->gone_stat, packed) : NULL;
    PyObject *id = PyLong_FromUnsignedLongLong(number), *at = PyLong_FromUnsignedLongLong(slot);
    PyObject *where = PyLong_FromLongLong(place);
    int failed = !former || !anchor || !id || !at || !where || PyDict_SetItem(hot->former, id, former)
                 || PyDict_SetItem(hot->long_of, at, where) || put_of(node, s_anchor, anchor)
                 || drop_directory(hot, id) || PyDict_DelItem(hot->by_ino, ino);
    memcpy(now.content, &(uint32_t){place}, sizeof(uint32_t));
    POINT();
    *kept = now;
    POINT();
    Py_XDECREF(former);
    Py_XDECREF(packed);
    Py_XDECREF(anchor);
    Py_XDECREF(id);
    Py_XDECREF(at);
    Py_XDECREF(where);
    return failed ? -1 : 0;
}

/* gate.gone. 0, or -1 with an exception. */
static int end_marked(Hot *hot, const struct place *place, const struct known *known, const struct stat *st,
                      const struct handle *handle)
{
    struct mark_of of = {.ino = st->st_ino, .parent = place->ino, .a = (int64_t)st->st_uid << 16 | st->st_mode,
                         .b = st->st_gid, .handle = handle, .name = place->name, .length = place->length};
    if (discard(hot->late, known->ino))
        return -1;
    if (known->inode && (put_of(known->inode, s_gone, Py_True) || idle_dropped(hot, known->ino)))
        return -1;
    return mark(hot, GONE, known->ino, &of);
}

static enum outcome removed(Hot *hot, uint64_t request, const struct place *place, const struct stat *st,
                            const struct known *known)
{
    int directory = S_ISDIR(st->st_mode), regular = S_ISREG(st->st_mode);
    struct handle handle;
    if ((!directory && st->st_nlink != 1) || !is_simple(hot, known->node) || is_open(hot, known->node)
        || !has_slot(hot, LONGS) || (regular && !handle_at(place->fd, place->name, &handle)))
        return PYTHONS;
    intend(hot, request, directory ? DOING_RMDIR : DOING_UNLINK, st, regular ? &handle : NULL);
    if (unlinkat(place->fd, place->name, directory ? AT_REMOVEDIR : 0))
        return PYTHONS;
    POINT();
    int failed = known->node && buried(hot, known->node, known->ino, st);
    failed = failed || (regular ? end_marked(hot, place, known, st, &handle)
                                : entry_marked(hot, place, directory ? st->st_ino : 0));
    return failed ? FAILED : FOUND;
}

enum outcome remove_name(Hot *hot, const struct in_header *in, const char *name, size_t length, int directory)
{
    struct place place;
    struct known known;
    struct stat st;
    if (!found_place(hot, in->nodeid, name, length, &place) || !has_marks_room(hot))
        return PYTHONS;
    if (fstatat(place.fd, name, &st, AT_SYMLINK_NOFOLLOW))
        return errno == ENOENT ? ABSENT : PYTHONS;
    if (!S_ISDIR(st.st_mode) != !directory)
        return PYTHONS;
    enum outcome outcome = found_known(hot, st.st_ino, &known) ? PYTHONS : FAILED;
    if (outcome == PYTHONS) {
        Py_XINCREF(known.node);
        Py_XINCREF(known.inode);
        outcome = removed(hot, in->unique, &place, &st, &known);
        Py_XDECREF(known.node);
        Py_XDECREF(known.inode);
    }
    Py_XDECREF(known.ino);
    return outcome;
}

/* --- names that change ----------------------------------------------------------------------------------- */

/* nodes.moved. 0, or -1 with an exception. */
static int moved(Hot *hot, PyObject *node, const struct place *to)
{
    uint64_t number = number_of(node, s_id);
    struct kept_node *kept = record_at(hot, NODES, number & SLOT);
    struct kept_node now = {number, kept->ino, number_of(to->parent, s_id), kept->lookups ? kept->lookups : 1, 0,
                            to->length, ""};
    PyObject *id = get_of(node, s_id);
    int failed = !id || PyErr_Occurred() || discard(hot->former, id) || put_of(node, s_parent, to->parent);
    Py_XDECREF(id);
    memcpy(now.content, to->name, to->length);
    POINT();
    *kept = now;
    POINT();
    return failed ? -1 : 0;
}

/* gate.named and gate.after_change, or gate.made_dir, or gate.entry. 0, or -1 with an exception. */
static int new_name_marked(Hot *hot, const struct place *to, const struct known *known, const struct stat *st)
{
    struct mark_of of = {.ino = st->st_ino, .parent = to->ino, .name = to->name, .length = to->length};
    if (S_ISDIR(st->st_mode))
        return mark(hot, DIRECTORY, known->ino, &of);
    if (!S_ISREG(st->st_mode))
        return entry_marked(hot, to, 0);
    if (known->inode) {
        PyObject *name = PyBytes_FromStringAndSize(to->name, to->length);
        int failed = !name || put_of(known->inode, s_name, name)
                     || set_number(known->inode, s_parent, to->ino);
        Py_XDECREF(name);
        if (failed)
            return -1;
    }
    return mark(hot, NAMED, known->ino, &of) || discard(hot->late, known->ino) ? -1 : 0;
}

static enum outcome renamed(Hot *hot, uint64_t request, const struct place *from, const struct place *to,
                            const struct stat *st, struct known *known)
{
    if (!is_simple(hot, known->node) || (known->inode && (!is_plain(known->inode)
                                                          || !attribute_is(known->inode, s_shown, Py_None))))
        return PYTHONS;
    if (S_ISREG(st->st_mode) && idle_dropped(hot, known->ino))
        return PYTHONS;
    intend(hot, request, DOING_RENAME, st, NULL);
    if (renameat(from->fd, from->name, to->fd, to->name))
        return PYTHONS;
    POINT();
    int failed = (known->node && moved(hot, known->node, to)) || new_name_marked(hot, to, known, st)
                 || entry_marked(hot, from, 0);
    return failed ? FAILED : FOUND;
}

enum outcome rename_name(Hot *hot, const struct in_header *in, const char *name, uint64_t above, const char *new_name)
{
    struct place from, to;
    struct known known;
    struct stat st, there;
    size_t length = strlen(new_name);
    if (length > INLINE || !found_place(hot, in->nodeid, name, strlen(name), &from)
        || !found_place(hot, above, new_name, length, &to) || !has_marks_room(hot))
        return PYTHONS;
    if (fstatat(from.fd, name, &st, AT_SYMLINK_NOFOLLOW))
        return errno == ENOENT ? ABSENT : PYTHONS;
    if (!fstatat(to.fd, new_name, &there, AT_SYMLINK_NOFOLLOW) || errno != ENOENT)
        return PYTHONS;
    enum outcome outcome = found_known(hot, st.st_ino, &known) ? PYTHONS : FAILED;
    if (outcome == PYTHONS) {
        Py_XINCREF(known.node);
        Py_XINCREF(known.inode);
        outcome = renamed(hot, in->unique, &from, &to, &st, &known);
        Py_XDECREF(known.node);
        Py_XDECREF(known.inode);
    }
    Py_XDECREF(known.ino);
    return outcome;
}
