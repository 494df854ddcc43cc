/* What the parts of the compiled form share. Works on the server's own Python objects, under the interpreter's lock.
 *
 * A part answers a request wholly, or leaves it to Python before it has changed anything.
 */
#ifndef TIERFS_HOT_H
#define TIERFS_HOT_H
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <stdint.h>
#include <sys/stat.h>

#define SLOT 0xFFFFFFFFULL
#define INLINE 34

/* The layouts of linux/fuse.h. */
struct in_header { uint32_t len, opcode; uint64_t unique, nodeid; uint32_t uid, gid, pid; uint16_t extlen, padding; };
struct out_header { uint32_t len; int32_t error; uint64_t unique; };
struct attr {
    uint64_t ino, size, blocks, atime, mtime, ctime;
    uint32_t atimensec, mtimensec, ctimensec, mode, nlink, uid, gid, rdev, blksize, flags;
};
struct entry_out {
    uint64_t nodeid, generation, entry_valid, attr_valid;
    uint32_t entry_valid_nsec, attr_valid_nsec;
    struct attr attr;
};
struct attr_out { uint64_t attr_valid; uint32_t attr_valid_nsec, dummy; struct attr attr; };
struct open_out { uint64_t fh; uint32_t open_flags; int32_t backing_id; };

/* Records of the ledger (tierfs/ledger.py). The field by which one counts is written last, and cleared first. */
struct kept_node {
    uint64_t number, ino, parent;
    uint32_t lookups;
    uint8_t kind, length;
    char content[INLINE];
};
struct kept_long { char content[255]; uint8_t length; };
struct kept_file { uint64_t number, node, request; uint32_t flags, uid, backing_id, padding; };
struct kept_inode { uint64_t ino; uint32_t backing_id, shows; int64_t mtime, ctime; uint64_t blocks; };

/* The parts of the ledger, in the order of its Form. */
enum part { NODES, LONGS, FILES, INODES, PARTS };
#define SERIAL 8 /* words of the header */
#define HANDLE_BITS 20

/* What became of a request here. FAILED: with an exception, after something has been changed. */
enum outcome { PYTHONS, ABSENT, FOUND, FAILED };

/* What is given to the object by these names, and of which type; anything where that is NULL. */
#define OBJECTS(X) \
    X(by_slot, &PyList_Type) X(by_ino, &PyDict_Type) X(dirs, &PyODict_Type) X(root, NULL) X(node, NULL) \
    X(plain, &PySet_Type) X(inodes, &PyDict_Type) X(holds, NULL) X(forget, NULL) X(long_of, &PyDict_Type) \
    X(former, &PyDict_Type) X(gate, NULL) X(idle, NULL) X(idle_inodes, &PyODict_Type) X(touched, &PyDict_Type) \
    X(files, &PyDict_Type) X(opens, &PyDict_Type) X(inode, NULL) X(handle, NULL) X(stub_name, &PyBytes_Type) \
    X(refused, NULL) X(failed, NULL)

typedef struct {
    PyObject_HEAD
    int fd, root_fd, others;
    unsigned long long device;
    Py_buffer buffer, memory;
    unsigned long entry_seconds, attr_seconds;
    double idle_seconds;
    struct { Py_ssize_t word, at, most; PyObject *free; } parts[PARTS];
#define FIELD(name, type) PyObject *name;
    OBJECTS(FIELD)
#undef FIELD
    Py_ssize_t answered;
} Hot;

/* Attributes of the objects. */
#define NAMES(X) \
    X(id) X(ino) X(parent) X(anchor) X(move_to_end) X(backing) X(backing_id) X(close) X(content) X(flags) X(gone) \
    X(guard) X(inode) X(marked) X(most) X(name) X(open) X(opath) X(opens) X(passthrough) X(retire) X(set_id) \
    X(size) X(slot) X(uid) X(writable) X(writers)
#define NAME(word) extern PyObject *s_##word;
NAMES(NAME)
#undef NAME

/* --- objects (_hot_state.c) --- */
uint64_t number_of(PyObject *object, PyObject *attribute);
int attribute_is(PyObject *object, PyObject *attribute, PyObject *wanted);
int set_number(PyObject *object, PyObject *attribute, uint64_t number);
PyObject *copy_of(PyObject *plain);
int count_in(PyObject *dict, PyObject *key, int by);

/* --- the ledger (_hot_state.c) --- */
void *record_at(Hot *hot, enum part part, uint64_t slot);
uint64_t *words_of(Hot *hot);
int has_slot(Hot *hot, enum part part);
int64_t take_slot(Hot *hot, enum part part);
int give_slot(Hot *hot, enum part part, uint64_t slot);

/* --- nodes (_hot_state.c) --- */
struct kept_node *kept_of(Hot *hot, uint64_t nodeid);
PyObject *node_at(Hot *hot, uint64_t nodeid);
int directory_of(Hot *hot, PyObject *node);
uint64_t enter(Hot *hot, PyObject *ino, PyObject *parent, const char *name, Py_ssize_t length);
int forget(Hot *hot, uint64_t nodeid, uint64_t count);

/* --- open files (_hot_open.c) --- */
enum outcome open_file(Hot *hot, const struct in_header *in, uint32_t flags, struct open_out *out);
enum outcome release_file(Hot *hot, uint64_t fh);

#endif
