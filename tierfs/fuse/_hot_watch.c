/* Which of fanotify's events are of somebody else's doing, and of an inode that the kernel knows through the mount:
 * watching.foreign. On a busy filesystem there are very many, and next to none of them are.
 */
#include "_hot.h"

#include <string.h>
#include <sys/fanotify.h>

#define RENAME_EVENT 0x10000000ULL /* FAN_RENAME, which older headers lack */

enum { OLD_NAME = 10, NEW_NAME = 12, FILEID_INO32_GEN = 1 }; /* kinds of records, which older headers lack; of handles */
/* struct fanotify_event_info_fid and the struct file_handle in it, up to the handle's bytes. */
struct __attribute__((packed)) info {
    uint8_t kind, padding;
    uint16_t length;
    uint64_t filesystem;
    uint32_t size;
    int32_t type;
};

static int is_of_name(uint8_t kind)
{
    return kind == FAN_EVENT_INFO_TYPE_DFID_NAME || kind == OLD_NAME || kind == NEW_NAME;
}

/* What is known of inodes: their nodes, and those that are unproven. */
struct inodes { PyObject *nodes, *unproven; };

/* The node that an event tells something new of (watching._is_known); NULL: none, or an exception. */
static PyObject *concerned(const struct inodes *inodes, uint64_t mask, uint8_t kind, uint32_t number)
{
    if (is_of_name(kind) && !(mask & (FAN_CREATE | FAN_DELETE | RENAME_EVENT | FAN_ONDIR)))
        return NULL;
    PyObject *ino = PyLong_FromUnsignedLong(number);
    PyObject *node = ino ? PyDict_GetItemWithError(inodes->nodes, ino) : NULL;
    int closed = node && !is_of_name(kind) && (mask & ~(uint64_t)FAN_ONDIR) == FAN_CLOSE_WRITE;
    if (closed && PySet_Contains(inodes->unproven, ino))
        node = NULL;
    Py_XDECREF(ino);
    return node;
}

/* Append what an event's record says, if that concerns a node. 0, or -1 with an exception. */
static int appended(PyObject *found, const struct inodes *inodes, uint64_t mask, const char *at, const struct info *info)
{
    uint32_t number;
    memcpy(&number, at + sizeof *info, sizeof number);
    PyObject *node = concerned(inodes, mask, info->kind, number);
    if (!node)
        return PyErr_Occurred() ? -1 : 0;
    const char *name = at + sizeof *info + info->size;
    Py_ssize_t room = is_of_name(info->kind) ? info->length - sizeof *info - info->size : 0;
    PyObject *entry = Py_BuildValue("KiOy#", (unsigned long long)mask, info->kind, node, name,
                                    (Py_ssize_t)strnlen(name, room));
    int failed = entry ? PyList_Append(found, entry) : -1;
    Py_XDECREF(entry);
    return failed;
}

/* The records of one event. 0, or -1 with an exception. */
static int event_taken(PyObject *found, const struct inodes *inodes, uint64_t mask, const char *at, const char *end)
{
    struct info info;
    for (; (size_t)(end - at) >= sizeof info; at += info.length) {
        memcpy(&info, at, sizeof info);
        if (info.length < sizeof info || info.length > end - at)
            break;
        if (info.type == FILEID_INO32_GEN && info.size >= 8 && info.size <= info.length - sizeof info
            && appended(found, inodes, mask, at, &info))
            return -1;
    }
    return 0;
}

PyObject *hot_foreign(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    Py_buffer buffer;
    Py_ssize_t size;
    int us, failed = 0;
    struct inodes inodes;
    if (!PyArg_ParseTuple(arguments, "y*niO!O!", &buffer, &size, &us, &PyDict_Type, &inodes.nodes, &PySet_Type,
                          &inodes.unproven))
        return NULL;
    PyObject *found = PyList_New(0);
    struct fanotify_event_metadata event;
    const char *at = buffer.buf, *end = at + (size < buffer.len ? size : buffer.len);
    for (; found && !failed && (size_t)(end - at) >= sizeof event; at += event.event_len) {
        memcpy(&event, at, sizeof event);
        if (event.event_len < sizeof event || event.event_len > end - at || event.metadata_len > event.event_len)
            break;
        if (event.mask & FAN_Q_OVERFLOW) {
            PyObject *entry = Py_BuildValue("KiOy", (unsigned long long)event.mask, 0, Py_None, "");
            failed = entry ? PyList_Append(found, entry) : -1;
            Py_XDECREF(entry);
        } else if (event.pid != us) {
            failed = event_taken(found, &inodes, event.mask, at + event.metadata_len, at + event.event_len);
        }
    }
    PyBuffer_Release(&buffer);
    if (failed)
        Py_CLEAR(found);
    return found;
}
