/* The server's state as the compiled form sees and changes it: objects, the ledger's records, nodes. */
#include "_hot.h"

#include <stddef.h>
#include <string.h>
#include <structmember.h>
#include <unistd.h>

#define DIRECTORY (O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC)
#define MOST_STEPS 64 /* directories above one that have no descriptor; deeper ones are rare */
#define MOST_LOOKUPS 0x7FFFFFFFU

#ifdef TIERFS_POINTS
#include <stdlib.h>

/* End the process at the point of this number. */
void hot_point(void)
{
    static long left = -2;
    const char *which = left == -2 ? getenv("TIERFS_POINT") : NULL;
    if (left == -2)
        left = which ? atol(which) : -1;
    if (left >= 0 && !left--)
        _exit(0);
}
#endif

/* --- objects --------------------------------------------------------------------------------------------- */

Py_ssize_t slot_of(PyTypeObject *type, struct attribute *attribute)
{
    for (int each = 0; each < KNOWN_TYPES && attribute->known[each].type; each++)
        if (attribute->known[each].type == type)
            return attribute->known[each].at;
    PyObject *found = _PyType_Lookup(type, attribute->word);
    PyMemberDef *member = found && Py_IS_TYPE(found, &PyMemberDescr_Type) ? ((PyMemberDescrObject *)found)->d_member : NULL;
    Py_ssize_t at = member && member->type == T_OBJECT_EX && !(member->flags & READONLY) ? member->offset : -1;
    for (int each = 0; each < KNOWN_TYPES; each++)
        if (!attribute->known[each].type) {
            attribute->known[each].type = (PyTypeObject *)Py_NewRef(type);
            attribute->known[each].at = at;
            break;
        }
    return at;
}

/* A number in an attribute; (uint64_t)-1 with an exception set where there is none. */
uint64_t number_of(PyObject *object, struct attribute *attribute)
{
    PyObject **place = place_of(object, attribute);
    if (place)
        return PyLong_AsUnsignedLongLong(*place);
    PyObject *value = PyObject_GetAttr(object, attribute->word);
    uint64_t number = value ? PyLong_AsUnsignedLongLong(value) : (uint64_t)-1;
    Py_XDECREF(value);
    return number;
}

/* 0, or -1 with an exception. */
int set_number(PyObject *object, struct attribute *attribute, uint64_t number)
{
    PyObject *value = PyLong_FromUnsignedLongLong(number);
    int failed = value ? put_of(object, attribute, value) : -1;
    Py_XDECREF(value);
    return failed;
}

/* A new object of the same type with the same attributes; all of them are slots (see hot_init). */
PyObject *copy_of(PyObject *plain)
{
    PyTypeObject *type = Py_TYPE(plain);
    PyObject *made = type->tp_alloc(type, 0);
    if (!made)
        return NULL;
    for (size_t at = sizeof(PyObject); at < (size_t)type->tp_basicsize; at += sizeof(PyObject *)) {
        PyObject *value = *(PyObject **)((char *)plain + at);
        *(PyObject **)((char *)made + at) = Py_XNewRef(value);
    }
    return made;
}

/* Resident, and nobody is to be waited for. */
int is_plain(PyObject *inode)
{
    return attribute_is(inode, s_guard, Py_None) && attribute_is(inode, s_content, Py_None);
}

/* Remove it if it is there. 0, or -1 with an exception. */
int discard(PyObject *dict, PyObject *key)
{
    int there = PyDict_Contains(dict, key);
    return there == 1 ? PyDict_DelItem(dict, key) : there;
}

/* It shows what it showed before some of its content came; -1 with an exception. */
int is_late(Hot *hot, PyObject *ino)
{
    return PyDict_GET_SIZE(hot->late) ? PyDict_Contains(hot->late, ino) : 0;
}

/* appearance.changed. */
int no_longer_late(Hot *hot, PyObject *ino)
{
    int there = is_late(hot, ino);
    if (there <= 0)
        return there;
    PyObject *done = PyObject_CallOneArg(hot->changed, ino);
    Py_XDECREF(done);
    return done ? 0 : -1;
}

/* Count up or down in a dictionary of counts, which keeps none of 0. The new count; -1 with an exception. */
int count_in(PyObject *dict, PyObject *key, int by)
{
    PyObject *value = PyDict_GetItemWithError(dict, key);
    if (!value && PyErr_Occurred())
        return -1;
    int count = (value ? (int)PyLong_AsLong(value) : 0) + by;
    if (count <= 0)
        return value && PyDict_DelItem(dict, key) ? -1 : 0;
    PyObject *now = PyLong_FromLong(count);
    int failed = now ? PyDict_SetItem(dict, key, now) : -1;
    Py_XDECREF(now);
    return failed ? -1 : count;
}

/* --- the ledger ------------------------------------------------------------------------------------------ */

/* The words of its header. */
uint64_t *words_of(Hot *hot)
{
    return hot->memory.buf;
}

void *record_at(Hot *hot, enum part part, uint64_t slot)
{
    static const size_t sizes[] = {
        sizeof(struct kept_node), sizeof(struct kept_file), sizeof(struct kept_inode),
    };
    return (char *)hot->memory.buf + hot->parts[part].at + slot * sizes[part];
}

/* Whether there is a free slot. */
int has_slot(Hot *hot, enum part part)
{
    return PyList_GET_SIZE(hot->parts[part].free) || (Py_ssize_t)words_of(hot)[hot->parts[part].word] < hot->parts[part].most;
}

/* Those that were given back are not looked at: until nearly all have been taken, it makes no difference. */
int has_longs(Hot *hot, Py_ssize_t count)
{
    return hot->longs.most - (Py_ssize_t)words_of(hot)[hot->longs.word] >= count * MOST_UNITS;
}

/* Whether there are slots for a node of this name. */
int has_node_slots(Hot *hot, size_t length)
{
    return has_slot(hot, NODES) && (length <= INLINE || has_longs(hot, 1));
}

/* The last of these numbers, which are not none, taken from them; -1 with an exception. */
static int64_t taken_of(PyObject *free)
{
    Py_ssize_t count = PyList_GET_SIZE(free);
    int64_t last = PyLong_AsLongLong(PyList_GET_ITEM(free, count - 1));
    return PyList_SetSlice(free, count - 1, count, NULL) ? -1 : last;
}

/* One number more. 0, or -1 with an exception. */
static int given_to(PyObject *free, uint64_t value)
{
    PyObject *number = PyLong_FromUnsignedLongLong(value);
    int failed = number ? PyList_Append(free, number) : -1;
    Py_XDECREF(number);
    return failed;
}

/* A free slot, which there is; -1 with an exception. */
int64_t take_slot(Hot *hot, enum part part)
{
    PyObject *free = hot->parts[part].free;
    if (!PyList_GET_SIZE(free))
        return words_of(hot)[hot->parts[part].word]++;
    POINT();
    return taken_of(free);
}

/* 0, or -1 with an exception. */
int give_slot(Hot *hot, enum part part, uint64_t slot)
{
    return given_to(hot->parts[part].free, slot);
}

/* A free place of so many units, which there is (ledger._Longs.take); -1 with an exception. */
static int64_t take_long(Hot *hot, int units)
{
    PyObject **free = hot->longs.free;
    if (PyList_GET_SIZE(free[units]))
        return taken_of(free[units]);
    for (int larger = units + 2; larger <= MOST_UNITS; larger++)
        if (PyList_GET_SIZE(free[larger])) {
            int64_t place = taken_of(free[larger]);
            return place < 0 || given_to(free[larger - units], place) ? -1 : place + larger - units;
        }
    uint64_t *never_taken = words_of(hot) + hot->longs.word;
    *never_taken += units;
    return *never_taken - units;
}

/* --- nodes ----------------------------------------------------------------------------------------------- */

/* The node of this number, borrowed; NULL where it is not in use. */
PyObject *node_at(Hot *hot, uint64_t nodeid)
{
    uint64_t slot = nodeid & SLOT;
    if (slot >= (uint64_t)PyList_GET_SIZE(hot->by_slot))
        return NULL;
    PyObject *node = PyList_GET_ITEM(hot->by_slot, slot);
    return node != Py_None && number_of(node, s_id) == nodeid ? node : NULL;
}

/* nodes._open_dir: a new descriptor of a directory, by its name in the one above; -1 where Python is to say. */
static int opened_directory(Hot *hot, PyObject *node, int above)
{
    struct stat st;
    char name[NAME_ROOM];
    if (!attribute_is(node, s_anchor, Py_None) || !name_of(hot, number_of(node, s_id), name))
        return -1;
    int fd = openat(above, name, DIRECTORY);
    if (fd < 0 && errno == EACCES)
        fd = openat(above, name, DIRECTORY | O_PATH);
    if (fd >= 0 && (fstat(fd, &st) || st.st_ino != number_of(node, s_ino))) {
        close(fd);
        fd = -1;
    }
    return fd;
}

/* The descriptor that is kept of a directory; -1 where none is. */
static int kept_descriptor(Hot *hot, PyObject *node)
{
    if (node == hot->root)
        return hot->root_fd;
    PyObject *id = get_of(node, s_id);
    PyObject *kept = id ? PyDict_GetItemWithError(hot->dirs, id) : NULL;
    Py_XDECREF(id);
    return kept ? (int)PyLong_AsLong(kept) : -1;
}

/* nodes._walk_to: a new descriptor, from the nearest of at most so many above that has one; -1: Python is to do it. */
static int walked_to(Hot *hot, PyObject *node, int most)
{
    PyObject *parent = get_of(node, s_parent);
    int kept = parent && parent != Py_None ? kept_descriptor(hot, parent) : -1, above = kept;
    if (above < 0 && parent && parent != Py_None && most > 0 && !PyErr_Occurred())
        above = walked_to(hot, parent, most - 1);
    int fd = above < 0 ? -1 : opened_directory(hot, node, above);
    if (kept < 0 && above >= 0)
        close(above);
    Py_XDECREF(parent);
    return fd;
}

/* Keep one descriptor more, and of those that were used longest ago no more than is allowed. 0, or -1 with an
 * exception. */
static int keep_descriptor(Hot *hot, PyObject *id, int fd)
{
    while (PyDict_GET_SIZE(hot->dirs) >= hot->directory_fds) {
        PyObject *pair = PyObject_CallMethodOneArg(hot->dirs, s_popitem->word, Py_False);
        if (!pair)
            return -1;
        close((int)PyLong_AsLong(PyTuple_GET_ITEM(pair, 1)));
        Py_DECREF(pair);
    }
    PyObject *number = PyLong_FromLong(fd);
    int failed = number ? PyODict_SetItem(hot->dirs, id, number) : -1;
    Py_XDECREF(number);
    return failed;
}

/* It is the one that was used last. 0, or -1 with an exception. */
static int moved_to_end(Hot *hot, PyObject *id)
{
    PyObject *done = PyObject_CallMethodOneArg(hot->dirs, s_move_to_end->word, id);
    Py_XDECREF(done);
    return done ? 0 : -1;
}

/* nodes.dirfd: the descriptor of a directory, which is kept from now on; -1 where Python is to say. Valid until the
 * next but one is asked for. */
int directory_of(Hot *hot, PyObject *node)
{
    if (node == hot->root)
        return hot->root_fd;
    PyObject *id = get_of(node, s_id);
    PyObject *kept = id ? PyDict_GetItemWithError(hot->dirs, id) : NULL;
    int fd = kept ? (int)PyLong_AsLong(kept) : -1;
    if (fd >= 0 && hot->used_last != number_of(node, s_id) && moved_to_end(hot, id)) {
        fd = -1;
    } else if (id && fd < 0 && !PyErr_Occurred() && (fd = walked_to(hot, node, MOST_STEPS)) >= 0
               && keep_descriptor(hot, id, fd)) {
        close(fd);
        fd = -1;
    }
    hot->used_last = fd < 0 ? 0 : number_of(node, s_id);
    Py_XDECREF(id);
    return fd;
}

/* nodes._put and the index by inode number. 0, or -1 with an exception. */
static int put(Hot *hot, uint64_t slot, PyObject *ino, PyObject *node)
{
    if (PyDict_SetItem(hot->by_ino, ino, node))
        return -1;
    while (slot >= (uint64_t)PyList_GET_SIZE(hot->by_slot))
        if (PyList_Append(hot->by_slot, Py_None))
            return -1;
    return PyList_SetItem(hot->by_slot, slot, Py_NewRef(node));
}

/* How many units content of this length takes, beside its node; 0: none. */
static int units_of(size_t length)
{
    return length > INLINE ? (length + UNIT - 1) / UNIT : 0;
}

/* The place of a node's long content, in units, and how many: 0 where it has none (any more: it was forgotten, before a
 * hard link in it). */
static int long_place(const struct kept_node *kept, uint32_t *place)
{
    if (kept->length <= INLINE || !kept->lookups)
        return 0;
    memcpy(place, kept->content, sizeof *place);
    int units = *place & IN_UNITS ? units_of(kept->length) : MOST_UNITS;
    *place = *place & IN_UNITS ? *place & ~IN_UNITS : *place * MOST_UNITS; /* of the form before */
    return units;
}

static char *long_at(Hot *hot, uint32_t place)
{
    return (char *)hot->memory.buf + hot->longs.at + (size_t)place * UNIT;
}

/* The name by which a node is reached, zero-terminated, and its length; 0 where it is not reached by one. */
size_t name_of(Hot *hot, uint64_t nodeid, char name[NAME_ROOM])
{
    uint64_t slot = nodeid & SLOT;
    struct kept_node *kept = (Py_ssize_t)slot < hot->parts[NODES].most ? record_at(hot, NODES, slot) : NULL;
    if (!kept || kept->number != nodeid || kept->kind)
        return 0;
    uint32_t place;
    if (kept->length > INLINE && !long_place(kept, &place))
        return 0;
    memcpy(name, kept->length > INLINE ? long_at(hot, place) : kept->content, kept->length);
    name[kept->length] = 0;
    return kept->length;
}

/* What one store changes of a record: its kind, its length and where long content is (ledger.node). */
typedef uint64_t __attribute__((may_alias, aligned(1))) way;
enum { WAY = offsetof(struct kept_node, kind), WAY_END = WAY + sizeof(way) };

/* Put long content in a place of its own, never in the one before, and give that back. `where`: what stands in the
 * node. 0, or -1 with an exception. */
static int content_put(Hot *hot, const struct kept_node *kept, const char *content, size_t length, uint32_t *where)
{
    uint32_t before = 0;
    int had = long_place(kept, &before), units = units_of(length);
    int64_t place = units ? take_long(hot, units) : 0;
    if (place < 0 || (had && given_to(hot->longs.free[had], before)))
        return -1;
    if (units)
        memcpy(long_at(hot, place), content, length);
    *where = (uint32_t)place | IN_UNITS;
    return 0;
}

/* ledger.node: `node` with this content. Needs a free slot for long content. 0, or -1 with an exception. */
int note_node(Hot *hot, struct kept_node node, const char *content, size_t length)
{
    struct kept_node *kept = record_at(hot, NODES, node.number & SLOT);
    uint32_t where;
    if (content_put(hot, kept, content, length, &where))
        return -1;
    hot->absent.above = 0; /* it may be there now */
    node.length = length;
    memset(node.content, 0, sizeof node.content);
    memcpy(node.content, length > INLINE ? (char *)&where : content, length > INLINE ? sizeof where : length);
    POINT();
    if (length <= INLINE) /* of long content nothing is there: what is there stays whole until then */
        memcpy((char *)kept + WAY_END, (char *)&node + WAY_END, sizeof node - WAY_END);
    POINT();
    /* Killed between these two, it is stale: the kernel looks it up anew. */
    memcpy(kept, &node, offsetof(struct kept_node, lookups));
    *(volatile way *)((char *)kept + WAY) = *(way *)((char *)&node + WAY);
    POINT();
    *(volatile uint32_t *)&kept->lookups = node.lookups;
    POINT();
    return 0;
}

/* nodes._enter: the number of a new node of an inode that is not known, with one lookup. 0: with an exception, or
 * where Python is to do it. */
uint64_t enter(Hot *hot, PyObject *ino, PyObject *parent, const char *name, Py_ssize_t length)
{
    uint64_t above = number_of(parent, s_id), inode = PyLong_AsUnsignedLongLong(ino);
    if (!has_node_slots(hot, length) || PyErr_Occurred())
        return 0;
    int64_t slot = take_slot(hot, NODES);
    if (slot < 0)
        return 0;
    struct kept_node *kept = record_at(hot, NODES, slot);
    uint64_t number = kept->number ? ((kept->number >> 32) + 1) << 32 | slot : (uint64_t)slot;
    PyObject *id = PyLong_FromUnsignedLongLong(number);
    PyObject *of[] = {id, ino, parent};
    PyObject *node = id ? PyObject_Vectorcall(hot->node, of, 3, NULL) : NULL;
    int failed = !node || put(hot, slot, ino, node)
                 || note_node(hot, (struct kept_node){number, inode, above, 1, 0, 0, ""}, name, length);
    Py_XDECREF(id);
    Py_XDECREF(node);
    hot->entered = failed ? 0 : number;
    return hot->entered;
}

/* nodes._drop_directory: close what is kept of it. 0, or -1 with an exception. */
int drop_directory(Hot *hot, PyObject *id)
{
    PyObject *kept = PyDict_GetItemWithError(hot->dirs, id);
    int fd = kept ? (int)PyLong_AsLong(kept) : -1;
    if (PyErr_Occurred() || (kept && PyODict_DelItem(hot->dirs, id)))
        return -1;
    if (fd >= 0)
        close(fd);
    return 0;
}

/* nodes.forget of the last lookup. 0, -1 with an exception, 1 where Python is to do it. */
static int dropped(Hot *hot, uint64_t nodeid, PyObject *node)
{
    uint64_t slot = nodeid & SLOT;
    PyObject *anchor = get_of(node, s_anchor), *id = get_of(node, s_id);
    PyObject *ino = get_of(node, s_ino);
    int failed = !anchor || !id || !ino ? -1 : PyLong_Check(anchor); /* a descriptor of its own */
    if (!failed) {
        struct kept_node *kept = record_at(hot, NODES, slot);
        uint32_t place;
        int units = long_place(kept, &place);
        failed = discard(hot->former, id) || PyList_SetItem(hot->by_slot, slot, Py_NewRef(Py_None));
        *(volatile uint32_t *)&kept->lookups = 0;
        POINT();
        failed = failed || (units && given_to(hot->longs.free[units], place)) || give_slot(hot, NODES, slot);
        if (!failed && PyDict_GetItemWithError(hot->by_ino, ino) == node)
            failed = PyDict_DelItem(hot->by_ino, ino) || ended(hot, ino);
        failed = failed || drop_directory(hot, id) ? -1 : 0;
    }
    Py_XDECREF(anchor);
    Py_XDECREF(id);
    Py_XDECREF(ino);
    return failed;
}

/* ledger.looked_up. */
void looked_up(Hot *hot, uint64_t nodeid)
{
    struct kept_node *kept = record_at(hot, NODES, nodeid & SLOT);
    if (kept->lookups < MOST_LOOKUPS)
        *(volatile uint32_t *)&kept->lookups = kept->lookups + 1;
}

/* The kernel gives back so many lookups. 0, or -1 with an exception. */
int forget(Hot *hot, uint64_t nodeid, uint64_t count)
{
    PyObject *node = node_at(hot, nodeid);
    if (PyErr_Occurred())
        return -1;
    if (!node || node == hot->root)
        return 0;
    struct kept_node *kept = record_at(hot, NODES, nodeid & SLOT);
    if (kept->lookups > count && kept->lookups < MOST_LOOKUPS) {
        *(volatile uint32_t *)&kept->lookups = kept->lookups - count;
        return 0;
    }
    Py_INCREF(node);
    int failed = kept->lookups == MOST_LOOKUPS ? 0 : dropped(hot, nodeid, node);
    Py_DECREF(node);
    if (failed <= 0)
        return failed;
    PyObject *done = PyObject_CallFunction(hot->forget, "KK", (unsigned long long)nodeid, (unsigned long long)count);
    Py_XDECREF(done);
    return done ? 0 : -1;
}
