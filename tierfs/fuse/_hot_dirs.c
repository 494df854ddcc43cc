/* READDIR and READDIRPLUS of directories that nobody has opened: what dirs.Directories.entries does, and operations with
 * it. Of an open directory, on a filesystem that wants that, Python gives the listing.
 */
#include "_hot.h"

#include <dirent.h>
#include <stddef.h>
#include <string.h>
#include <unistd.h>

#define END INT64_MAX /* an offset behind which nothing can be, and at which not to ask (dirs._Reader) */

/* The layout of linux/fuse.h. */
struct listed { uint64_t ino, following; uint32_t length, kind; };

/* Where in a directory its reader is: one who goes on elsewhere seeks. */
struct reading {
    uint64_t nodeid, offset;
    size_t at, size; /* in the block, where the entry at `offset` begins */
    char block[1 << 15];
};

/* Whoever reads this directory from this offset on. NULL with an exception. */
static struct reading *reading_from(Hot *hot, uint64_t nodeid, uint64_t offset)
{
    if (!hot->reading && !(hot->reading = PyMem_Calloc(1, sizeof *hot->reading)))
        return (struct reading *)PyErr_NoMemory();
    struct reading *reading = hot->reading;
    if (!offset || reading->nodeid != nodeid || reading->offset != offset) {
        reading->nodeid = nodeid;
        reading->offset = offset;
        reading->at = reading->size = 0;
    }
    return reading;
}

/* Read the next block: how many bytes, 0 at the end; -1: it cannot be read. */
static ssize_t read_on(struct reading *reading, int fd)
{
    ssize_t size;
    if (reading->offset == END)
        return 0;
    Py_BEGIN_ALLOW_THREADS
    size = getdents64(fd, reading->block, sizeof reading->block);
    if (size < 0 && errno == ENOENT)
        size = 0; /* it was removed behind the mount */
    Py_END_ALLOW_THREADS
    reading->at = 0;
    reading->size = size > 0 ? size : 0;
    return size;
}

/* vfs.told_lately. */
static int need_not_be_told(Hot *hot, PyObject *directory, uint64_t number, const char *name, size_t length)
{
    char known[NAME_ROOM];
    PyObject *ino = number_object(hot, number);
    PyObject *node = ino ? PyDict_GetItemWithError(hot->by_ino, ino) : NULL;
    uint64_t nodeid = node ? number_of(node, s_id) : 0;
    int need_not = nodeid && told_lately(hot, nodeid) && attribute_is(node, s_parent, directory)
                   && attribute_is(node, s_anchor, Py_None) && name_of(hot, nodeid, known) == length
                   && !memcmp(known, name, length);
    Py_XDECREF(ino);
    return need_not;
}

/* What the kernel may know of an entry, counted; zeros where it learns no node from it, or knows it. 0, or -1 with an
 * exception. */
static int entry_known(Hot *hot, PyObject *node, int fd, const struct dirent64 *entry, struct entry_out *out)
{
    enum outcome outcome = ABSENT;
    const char *name = entry->d_name;
    size_t length = strlen(name);
    if (strcmp(name, ".") && strcmp(name, "..") && !need_not_be_told(hot, node, entry->d_ino, name, length))
        outcome = look_up_in(hot, node, fd, name, length, 1, out);
    if (outcome == FOUND)
        return 0;
    memset(out, 0, sizeof *out);
    if (outcome == ABSENT)
        return 0;
    PyErr_Clear();
    PyObject *id = get_of(node, s_id);
    PyObject *packed = id ? PyObject_CallFunction(hot->listed, "Oy#", id, name, (Py_ssize_t)length) : NULL;
    hot->used_last = 0;
    if (packed && PyBytes_Check(packed) && PyBytes_GET_SIZE(packed) == sizeof *out)
        memcpy(out, PyBytes_AS_STRING(packed), sizeof *out);
    Py_XDECREF(id);
    Py_XDECREF(packed);
    return packed ? 0 : -1;
}

/* Take back the lookups of what has been packed: it will not be sent. */
static void uncount(Hot *hot, const char *packed, size_t size)
{
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    for (size_t at = 0; at < size;) {
        struct entry_out entry;
        struct listed listed;
        memcpy(&entry, packed + at, sizeof entry);
        memcpy(&listed, packed + at + sizeof entry, sizeof listed);
        at += sizeof entry + sizeof listed + ((listed.length + 7) & ~7U);
        if (entry.nodeid && forget(hot, entry.nodeid, 1))
            PyErr_WriteUnraisable(hot->forget);
    }
    PyErr_Restore(type, value, trace);
}

/* Pack entries while they fit. */
static enum outcome packed(Hot *hot, PyObject *node, int fd, struct reading *reading, int plus, size_t room, char *to,
                           size_t *size)
{
    for (*size = 0;;) {
        ssize_t more = reading->at < reading->size ? 1 : read_on(reading, fd);
        if (more <= 0)
            return more ? PYTHONS : FOUND;
        struct dirent64 *entry = (struct dirent64 *)(reading->block + reading->at);
        size_t length = strlen(entry->d_name), padded = (length + 7) & ~7UL;
        struct listed listed = {entry->d_ino, entry->d_off, length, entry->d_type};
        char *at = to + *size + (plus ? sizeof(struct entry_out) : 0);
        if (*size + (plus ? sizeof(struct entry_out) : 0) + sizeof listed + padded > room)
            return FOUND;
        if (plus) {
            struct entry_out known;
            if (entry_known(hot, node, fd, entry, &known))
                return FAILED;
            memcpy(to + *size, &known, sizeof known);
        }
        memcpy(at, &listed, sizeof listed);
        memset(at + sizeof listed, 0, padded);
        memcpy(at + sizeof listed, entry->d_name, length);
        *size = at + sizeof listed + padded - to;
        reading->at += entry->d_reclen;
        reading->offset = entry->d_off;
        POINT();
    }
}

enum outcome list_directory(Hot *hot, uint64_t nodeid, uint64_t offset, size_t room, int plus, char *to, size_t *size)
{
    PyObject *node = node_at(hot, nodeid);
    int fd = node ? directory_of(hot, node) : -1;
    struct reading *reading = fd < 0 ? NULL : reading_from(hot, nodeid, offset);
    if (!reading || (reading->at >= reading->size && offset != END && lseek(fd, offset, SEEK_SET) < 0))
        return PYTHONS;
    Py_INCREF(node);
    enum outcome outcome = packed(hot, node, fd, reading, plus, room, to, size);
    if (outcome != FOUND && plus)
        uncount(hot, to, *size);
    Py_DECREF(node);
    return outcome;
}
