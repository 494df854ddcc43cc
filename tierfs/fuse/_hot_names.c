/* UNLINK, RMDIR and RENAME: what names.Names does with names that go, are replaced or change. */
#include "_hot.h"

#include <fcntl.h>
#include <stdio.h>
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

/* What is known of an inode. 0 with an exception. To be dropped in any case. */
int found_known(Hot *hot, uint64_t number, struct known *known)
{
    known->ino = number_object(hot, number);
    known->node = known->ino ? Py_XNewRef(PyDict_GetItemWithError(hot->by_ino, known->ino)) : NULL;
    known->inode = known->ino ? Py_XNewRef(PyDict_GetItemWithError(hot->inodes, known->ino)) : NULL;
    return !PyErr_Occurred();
}

void drop_known(struct known *known)
{
    Py_CLEAR(known->ino);
    Py_CLEAR(known->node);
    Py_CLEAR(known->inode);
}

/* The node is reached by a name; or there is none. */
static int is_simple(Hot *hot, PyObject *node)
{
    char name[NAME_ROOM];
    if (!node)
        return 1;
    if (node == hot->root || !attribute_is(node, s_anchor, Py_None) || !name_of(hot, number_of(node, s_id), name))
        return 0;
    return !PyErr_Occurred();
}

/* Its metadata may change now, and it shows what it is. */
int is_still(PyObject *inode)
{
    return !inode || (is_plain(inode) && attribute_is(inode, s_shown, Py_None));
}

static int is_open(Hot *hot, PyObject *node)
{
    PyObject *id = node ? get_of(node, s_id) : NULL;
    int there = id ? PyDict_Contains(hot->opens, id) : 0;
    Py_XDECREF(id);
    return there;
}

/* What the ledger has of a node that is about to be written down anew. */
static struct kept_node former_of(Hot *hot, PyObject *node)
{
    uint64_t number = number_of(node, s_id);
    struct kept_node *kept = record_at(hot, NODES, number & SLOT);
    return (struct kept_node){number, kept->ino, kept->parent, kept->lookups ? kept->lookups : 1, 0, 0, ""};
}

/* marking.entry. 0, or -1 with an exception. */
int entry_marked(Hot *hot, const struct place *place, uint64_t removed)
{
    struct mark_of of = {.parent = place->ino, .a = removed, .name = place->name, .length = place->length};
    return append_mark(hot, ENTRY, &of) < 0 ? -1 : 0;
}

/* --- names that go --------------------------------------------------------------------------------------- */

/* A name that is about to go (names._Going). */
struct going { struct known known; struct stat st; struct handle handle; int open, last; };

/* The file handle of a regular file: the gate knows that of one that was written, and its descriptor pins the inode. By
 * that the kernel finds it in half the time that it takes by name. */
static int found_handle(const struct place *place, PyObject *inode, struct handle *handle)
{
    PyObject *known = inode ? get_of(inode, s_handle) : NULL;
    int opath = known ? (int)number_of(inode, s_opath) : -1;
    size_t length = known && opath >= 0 ? PyBytes_GET_SIZE(known) : 0;
    if (length && length <= sizeof handle->bytes) {
        handle->length = length;
        memcpy(handle->bytes, PyBytes_AS_STRING(known), length);
    }
    Py_XDECREF(known);
    PyErr_Clear(); /* no descriptor: -1 is no number */
    return length || handle_at(opath >= 0 ? opath : place->fd, opath >= 0 ? "" : place->name, handle);
}

/* Whether it is plain enough; nothing is changed. */
static int may_go(Hot *hot, const struct place *place, struct going *going)
{
    int regular = S_ISREG(going->st.st_mode);
    going->last = S_ISDIR(going->st.st_mode) || going->st.st_nlink <= 1;
    going->open = is_open(hot, going->known.node);
    if (!is_simple(hot, going->known.node) || !has_longs(hot, 1))
        return 0;
    if (!going->last && (!regular || hot->privileged != Py_True || !is_still(going->known.inode)))
        return 0;
    return !regular || found_handle(place, going->known.inode, &going->handle);
}

/* Whether it is by this name that the node is reached. */
static int is_own_name(Hot *hot, PyObject *node, const struct place *place)
{
    char name[NAME_ROOM];
    size_t length = name_of(hot, number_of(node, s_id), name);
    return length == place->length && !memcmp(name, place->name, length) && attribute_is(node, s_parent, place->parent);
}

/* The name by which a node was reached is to be remembered. 0, or -1 with an exception. */
static int former_kept(Hot *hot, PyObject *node)
{
    char name[NAME_ROOM];
    PyObject *id = get_of(node, s_id);
    PyObject *former = PyBytes_FromStringAndSize(name, name_of(hot, number_of(node, s_id), name));
    int failed = !id || !former || PyDict_SetItem(hot->former, id, former);
    Py_XDECREF(id);
    Py_XDECREF(former);
    return failed ? -1 : 0;
}

/* From now on the node is reached by file handle. 0, or -1 with an exception. */
static int anchored_by_handle(Hot *hot, PyObject *node, const struct handle *handle)
{
    struct kept_node now = former_of(hot, node);
    PyObject *anchor = PyBytes_FromStringAndSize(handle->bytes, handle->length);
    now.kind = HANDLE_NODE;
    int failed = !anchor || former_kept(hot, node) || put_of(node, s_anchor, anchor)
                 || note_node(hot, now, handle->bytes, handle->length);
    Py_XDECREF(anchor);
    return failed ? -1 : 0;
}

/* From now on the node, which is open, is reached by a descriptor. 0, -1 with an exception, 1: Python is to do it. */
static int anchored_by_descriptor(Hot *hot, PyObject *node, const struct place *place)
{
    int fd = openat(place->fd, place->name, O_PATH | O_NOFOLLOW | O_CLOEXEC);
    PyObject *number = fd < 0 ? NULL : PyLong_FromLong(fd);
    if (!number)
        return 1;
    PyObject *done = PyObject_CallMethodObjArgs(hot->nodes, s_anchor->word, node, number, NULL);
    POINT();
    Py_DECREF(number);
    Py_XDECREF(done);
    return done ? 0 : -1;
}

/* gate.known_by. */
static int is_known_by(PyObject *inode, const struct place *place)
{
    PyObject *name = inode ? get_of(inode, s_name) : NULL;
    int is = name && (size_t)PyBytes_GET_SIZE(name) == place->length
             && !memcmp(PyBytes_AS_STRING(name), place->name, place->length)
             && number_of(inode, s_parent) == place->ino;
    Py_XDECREF(name);
    return is;
}

/* gate.before_change of what has other names, and nodes.unlinking. 0, -1 with an exception, 1: Python is to do it. */
static int prepared(Hot *hot, const struct place *place, struct going *going)
{
    PyObject *node = going->known.node;
    if (!going->last && is_known_by(going->known.inode, place) && idle_dropped(hot, going->known.ino))
        return 1;
    if (!node || (going->last && !going->open) || (!going->last && !is_own_name(hot, node, place)))
        return 0;
    return going->open ? anchored_by_descriptor(hot, node, place) : anchored_by_handle(hot, node, &going->handle);
}

/* nodes._bury: no name is left, and nobody has it open. 0, or -1 with an exception. */
static int buried(Hot *hot, const struct going *going)
{
    char attributes[NAME_ROOM];
    PyObject *node = going->known.node;
    struct kept_node now = former_of(hot, node);
    size_t length = packed_stat(&going->st, attributes);
    PyObject *packed = PyBytes_FromStringAndSize(attributes, length);
    PyObject *anchor = packed ? copy_of(hot->gone_stat) : NULL;
    PyObject *id = get_of(node, s_id);
    now.kind = GONE_NODE;
    int failed = !anchor || !id || put_of(anchor, s__packed, packed) || former_kept(hot, node)
                 || put_of(node, s_anchor, anchor) || drop_directory(hot, id)
                 || PyDict_DelItem(hot->by_ino, going->known.ino) || ended(hot, going->known.ino)
                 || note_node(hot, now, attributes, length);
    Py_XDECREF(packed);
    Py_XDECREF(anchor);
    Py_XDECREF(id);
    return failed ? -1 : 0;
}

/* gate.gone. 0, or -1 with an exception. */
static int end_marked(Hot *hot, const struct place *place, const struct going *going)
{
    const struct stat *st = &going->st;
    const struct known *known = &going->known;
    struct mark_of of = {.ino = st->st_ino, .parent = place->ino, .a = (int64_t)st->st_uid << 16 | st->st_mode,
                         .b = st->st_gid, .handle = &going->handle, .name = place->name, .length = place->length};
    if (no_longer_late(hot, known->ino))
        return -1;
    if (known->inode && (put_of(known->inode, s_gone, Py_True) || idle_dropped(hot, known->ino)))
        return -1;
    return mark(hot, GONE, known->ino, &of);
}

/* gate.after_change and marking.attributes of what has other names. 0, or -1 with an exception. */
static int link_less_marked(Hot *hot, const struct place *place, const struct going *going)
{
    struct mark_of of = {.ino = going->st.st_ino, .parent = place->ino, .a = 1,
                         .name = place->name, .length = place->length};
    return no_longer_late(hot, going->known.ino) || append_mark(hot, ATTRIBUTES, &of) < 0 ? -1 : 0;
}

/* names._Going.gone. 0, or -1 with an exception. */
static int gone(Hot *hot, const struct place *place, const struct going *going)
{
    if (going->known.node && going->last && !going->open && buried(hot, going))
        return -1;
    if (!S_ISREG(going->st.st_mode))
        return 0;
    return going->last ? end_marked(hot, place, going) : link_less_marked(hot, place, going);
}

/* nodes.name_gone. 0, or -1 with an exception. */
static int name_gone(Hot *hot, const struct place *place)
{
    if (!PySet_Check(hot->left) || !PySet_GET_SIZE(hot->left))
        return 0;
    PyObject *left = Py_BuildValue("(Ky#)", (unsigned long long)number_of(place->parent, s_id), place->name,
                                   (Py_ssize_t)place->length);
    int failed = !left || PySet_Discard(hot->left, left) < 0;
    Py_XDECREF(left);
    return failed ? -1 : 0;
}

static enum outcome removed(Hot *hot, uint64_t request, const struct place *place, struct going *going)
{
    int directory = S_ISDIR(going->st.st_mode), regular = S_ISREG(going->st.st_mode);
    int left = may_go(hot, place, going) ? prepared(hot, place, going) : 1;
    if (left)
        return left < 0 ? FAILED : PYTHONS;
    intend(hot, request, directory ? DOING_RMDIR : DOING_UNLINK, &going->st, NULL, regular ? &going->handle : NULL);
    if (unlinkat(place->fd, place->name, directory ? AT_REMOVEDIR : 0))
        return PYTHONS;
    POINT();
    int failed = (!directory && name_gone(hot, place)) || gone(hot, place, going);
    if (!failed && !(regular && going->last)) /* the mark of a file's end names its place */
        failed = entry_marked(hot, place, directory ? going->st.st_ino : 0);
    return failed ? FAILED : FOUND;
}

enum outcome remove_name(Hot *hot, const struct in_header *in, const char *name, size_t length, int directory)
{
    struct place place;
    struct going going;
    if (!found_place(hot, in->nodeid, name, length, &place) || !has_marks_room(hot))
        return PYTHONS;
    if (fstatat(place.fd, name, &going.st, AT_SYMLINK_NOFOLLOW))
        return errno == ENOENT ? ABSENT : PYTHONS;
    if (!S_ISDIR(going.st.st_mode) != !directory)
        return PYTHONS;
    enum outcome outcome = FAILED;
    if (found_known(hot, going.st.st_ino, &going.known))
        outcome = removed(hot, in->unique, &place, &going);
    drop_known(&going.known);
    return outcome;
}

/* --- names that change ----------------------------------------------------------------------------------- */

/* nodes.moved, to a name that is another, of a node that has no descriptor of its own. 0, or -1 with an exception. */
int moved(Hot *hot, PyObject *node, const struct place *to)
{
    struct kept_node now = former_of(hot, node);
    PyObject *id = get_of(node, s_id);
    now.parent = number_of(to->parent, s_id);
    int failed = !id || PyErr_Occurred() || discard(hot->former, id) || put_of(node, s_parent, to->parent)
                 || put_of(node, s_anchor, Py_None) || note_node(hot, now, to->name, to->length);
    Py_XDECREF(id);
    return failed ? -1 : 0;
}

/* nodes._leave_name. 0, or -1 with an exception. */
int leave_name(Hot *hot, PyObject *node)
{
    char name[NAME_ROOM];
    if (!PySet_Check(hot->left) || !attribute_is(node, s_anchor, Py_None))
        return 0;
    Py_ssize_t length = name_of(hot, number_of(node, s_id), name);
    PyObject *parent = get_of(node, s_parent);
    PyObject *place = NULL;
    if (parent && parent != Py_None)
        place = Py_BuildValue("(Ky#)", (unsigned long long)number_of(parent, s_id), name, length);
    int failed = place ? PySet_Add(hot->left, place) : 0;
    Py_XDECREF(parent);
    Py_XDECREF(place);
    return failed || PyErr_Occurred() ? -1 : 0;
}

/* gate.named and gate.after_change, or marking.made_dir, or marking.entry. 0, or -1 with an exception. */
int new_name_marked(Hot *hot, const struct place *to, const struct known *known, const struct stat *st)
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
    return mark(hot, NAMED, known->ino, &of) || no_longer_late(hot, known->ino) ? -1 : 0;
}

/* A rename: of what, from where and to where, and what it replaces; NULL: nothing, which may only be `believed`. */
struct renaming {
    struct place from, to;
    struct stat st;
    struct known known;
    struct going *replaced;
    int believed;
};

/* What is left when the name has changed. 0, or -1 with an exception. */
static int settled(Hot *hot, const struct renaming *each)
{
    const struct going *replaced = each->replaced;
    int failed = (replaced && gone(hot, &each->to, replaced))
                 || (each->known.node && moved(hot, each->known.node, &each->to))
                 || new_name_marked(hot, &each->to, &each->known, &each->st)
                 || (replaced && S_ISDIR(replaced->st.st_mode) && entry_marked(hot, &each->to, replaced->st.st_ino))
                 || entry_marked(hot, &each->from, 0);
    return failed ? -1 : 0;
}

/* The change itself. 0, or -1: what was thought to be free is not, for one. */
static int name_changed(const struct renaming *each)
{
    const struct place *from = &each->from, *to = &each->to;
    if (each->replaced)
        return renameat(from->fd, from->name, to->fd, to->name);
    /* What has come behind the mount in this very moment would go without a mark. */
    if (!renameat2(from->fd, from->name, to->fd, to->name, RENAME_NOREPLACE))
        return 0;
    return errno == EINVAL && !each->believed ? renameat(from->fd, from->name, to->fd, to->name) : -1;
}

static enum outcome renamed(Hot *hot, uint64_t request, struct renaming *each)
{
    struct going *replaced = each->replaced;
    const struct handle *handle = replaced && S_ISREG(replaced->st.st_mode) ? &replaced->handle : NULL;
    if (!is_simple(hot, each->known.node) || !is_still(each->known.inode) || !has_longs(hot, 2)
        || (replaced && !may_go(hot, &each->to, replaced)))
        return PYTHONS;
    int left = replaced ? prepared(hot, &each->to, replaced) : 0;
    if (left)
        return left < 0 ? FAILED : PYTHONS;
    intend(hot, request, DOING_RENAME, &each->st, replaced ? &replaced->st : NULL, handle);
    if (name_changed(each))
        return PYTHONS;
    POINT();
    return settled(hot, each) ? FAILED : FOUND;
}

/* As node_outdated, of what a rename changes besides the directory that it is from. 0, or -1 with an exception. */
static int others_outdated(Hot *hot, const struct in_header *in, uint64_t above, PyObject *node)
{
    if (node)
        told_for(hot, number_of(node, s_id), 0); /* the kernel asks for its attributes again */
    if (!hot->long_seconds)
        return 0;
    if (above != in->nodeid && !has_taken_in(hot, above, in->pid) && outdated(hot, above))
        return -1;
    uint64_t number = node ? number_of(node, s_id) : 0;
    return node && !has_taken_in(hot, number, in->pid) ? outdated(hot, number) : 0;
}

enum outcome rename_name(Hot *hot, const struct in_header *in, const char *name, uint64_t above, const char *new_name)
{
    struct renaming each = {.replaced = NULL};
    struct going there = {.known = {NULL, NULL, NULL}};
    if (!found_place(hot, in->nodeid, name, strlen(name), &each.from)
        || !found_place(hot, above, new_name, strlen(new_name), &each.to) || !has_marks_room(hot))
        return PYTHONS;
    if (fstatat(each.from.fd, name, &each.st, AT_SYMLINK_NOFOLLOW))
        return errno == ENOENT ? ABSENT : PYTHONS;
    /* The kernel has just asked for it, as a rule. */
    each.believed = hot->absent.above == above && !strcmp(hot->absent.name, new_name);
    if (!each.believed && !fstatat(each.to.fd, new_name, &there.st, AT_SYMLINK_NOFOLLOW))
        each.replaced = &there;
    else if (!each.believed && errno != ENOENT)
        return PYTHONS;
    if (each.replaced && there.st.st_ino == each.st.st_ino)
        return PYTHONS; /* two names of one file: both stay */
    enum outcome outcome = FAILED;
    if (found_known(hot, each.st.st_ino, &each.known)
        && (!each.replaced || found_known(hot, there.st.st_ino, &there.known)))
        outcome = renamed(hot, in->unique, &each);
    if (outcome == FOUND && others_outdated(hot, in, above, each.known.node))
        outcome = FAILED;
    drop_known(&each.known);
    drop_known(&there.known);
    return outcome;
}
