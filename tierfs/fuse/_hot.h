/* What the parts of the compiled form share. Works on the server's own Python objects, under the interpreter's lock.
 *
 * A part answers a request wholly, or leaves it to Python before it has changed anything.
 */
#ifndef TIERFS_HOT_H
#define TIERFS_HOT_H
#define PY_SSIZE_T_CLEAN
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <Python.h>

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <sys/stat.h>

#define SLOT 0xFFFFFFFFULL
#define INLINE 34
#define LINK_ROOM 4096
#define NAME_ROOM 256 /* a name, and the zero byte behind it */

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
struct setattr_in {
    uint32_t valid, padding;
    uint64_t fh, size, lock_owner;
    int64_t atime, mtime, ctime;
    uint32_t atimensec, mtimensec, ctimensec, mode, unused, uid, gid, unused_too;
};
struct read_in { uint64_t fh, offset; uint32_t size, read_flags; uint64_t lock_owner; uint32_t flags, padding; };
struct release_in { uint64_t fh; uint32_t flags, release_flags; uint64_t lock_owner; };
struct setxattr_in { uint32_t size, flags, more, padding; };
struct copy_in { uint64_t fh_in, offset_in, nodeid_out, fh_out, offset_out, length, flags; };
struct open_out { uint64_t fh; uint32_t open_flags; int32_t backing_id; };
struct create_out { struct entry_out entry; struct open_out open; };
#define OPEN_NOFLUSH (1 << 5)
#define OPEN_PASSTHROUGH (1 << 7)

#define RESENT (1ULL << 63) /* in a request's number: it was read before */

/* Records of the ledger (tierfs/ledger.py). The field by which one counts is written last, and cleared first. */
struct kept_node {
    uint64_t number, ino, parent;
    uint32_t lookups;
    uint8_t kind, length;
    char content[INLINE];
};
struct kept_file { uint64_t number, node, request; uint32_t flags, uid, backing_id, padding; };
struct kept_inode { uint64_t ino; uint32_t backing_id, shows; int64_t mtime, ctime; uint64_t blocks; };

/* The parts of the ledger, in the order of its Form. */
enum part { NODES, FILES, INODES, PARTS };
/* Places of content that does not fit beside its node (ledger._Longs). */
enum { UNIT = 32, MOST_UNITS = 8 };
#define IN_UNITS 0x80000000U
#define GENERATION 2 /* words of the header */
#define SERIAL 8
#define HANDLE_BITS 20

/* Where a server may be killed with other state behind it than before: what stands before is done before. Tests are
 * built to end there. */
#ifdef TIERFS_POINTS
void hot_point(void);
#define POINT() hot_point()
#else
#define POINT() __atomic_signal_fence(__ATOMIC_SEQ_CST)
#endif

/* What became of a request here. FAILED: with an exception, after something has been changed. */
enum { HANDLE_NODE = 1, GONE_NODE }; /* kinds of nodes (ledger.Kind) whose content is a handle, or last attributes */
enum doing { DOING_MAKE = 1, DOING_LINK, DOING_UNLINK, DOING_RMDIR, DOING_RENAME, DOING_XATTR }; /* intents.Doing */
enum mark { WRITTEN = 1, CLOSED, GONE, NAMED, DIRECTORY, ENTRY = 8, ATTRIBUTES };      /* marks.Mark */

/* What a mark says, and of which file handle. */
struct handle { size_t length; char bytes[sizeof(int) + MAX_HANDLE_SZ]; };
struct mark_of {
    uint64_t ino, generation, parent;
    int64_t a, b;
    const struct handle *handle;
    const char *name;
    size_t length;
};
/* A name in a directory; `ino` is the directory's. */
struct place { PyObject *parent; int fd; const char *name; size_t length; uint64_t ino; };
/* An inode: its number, its node and its state in the gate, NULL where there is none. */
struct known { PyObject *ino, *node, *inode; };

#ifndef ASKED
#define ASKED 16384
#endif
enum { THREADS = 1024, NEW_FILES = 64 };
struct asked { uint64_t nodeid, told; uint32_t thread, epoch; };
struct thread { uint64_t last; uint32_t number; };
struct new_file { uint64_t nodeid; double until; };

enum outcome { PYTHONS, ABSENT, NO_DATA, NO_TERMINAL, FOUND, FAILED };

/* What is given to the object by these names, and of which type; anything where that is NULL. */
#define OBJECTS(X) \
    X(records, NULL) \
    X(by_slot, &PyList_Type) X(by_ino, &PyDict_Type) X(dirs, &PyODict_Type) X(root, NULL) X(node, NULL) \
    X(plain, &PySet_Type) X(inodes, &PyDict_Type) X(holds, NULL) X(forget, NULL) X(listed, NULL) \
    X(former, &PyDict_Type) X(left, NULL) X(states, NULL) X(kernel_backing, &PyType_Type) X(idle, NULL) \
    X(idle_inodes, &PyODict_Type) X(touched, &PyDict_Type) X(besides, &PyDict_Type) \
    X(files, &PyDict_Type) X(opens, &PyDict_Type) X(inode, NULL) X(handle, NULL) X(stub_name, &PyBytes_Type) \
    X(marks, NULL) X(recent, &PyDict_Type) X(seals, &PySet_Type) X(late, &PyDict_Type) X(changed, NULL) X(gone_stat, NULL) \
    X(nodes, NULL) X(privileged, &PyBool_Type) X(refused, NULL) X(failed, NULL) X(unproven, &PySet_Type) \
    X(believed, &PyDict_Type) X(proven, &PyDict_Type)

typedef struct {
    PyObject_HEAD
    int fd, root_fd, others, sleeper, watched, descriptors; /* the last: /proc/self/fd */
    unsigned long long device;
    Py_buffer buffer, memory, told; /* the last: told.Told's */
    unsigned long entry_seconds, attr_seconds, long_seconds, file_seconds; /* long_seconds 0: never */
    long fresh, restless; /* lasting.FRESH, RESTLESS */
    double idle_seconds;
    unsigned long told_left; /* told.LEFT */
    unsigned long long low; /* bytes: with less room nothing is begun here */
    Py_ssize_t intents_at, segment, directory_fds, most_believed, most_proven;
    uid_t euid;
    gid_t egid;
    struct { uint64_t above; char name[NAME_ROOM]; } absent; /* the name that was asked for last and was not there */
    struct asked asked[ASKED]; /* (_hot_asked.c) */
    struct thread threads[THREADS];
    uint64_t requests; /* so many have come */
    uint64_t entered; /* the node that the present one has given a number to; 0: none */
    uint32_t epoch;
    struct new_file new_files[NEW_FILES]; /* (_hot_make.c) */
    mode_t umask; /* the process's own, which making.Maker leaves as it was */
    /* For how long, and for how many, room is taken for granted. */
    struct { double until; unsigned long long low; int left; } ample;
    struct { Py_ssize_t word, at, most; PyObject *free; } parts[PARTS];
    struct { Py_ssize_t word, at, most; PyObject *free[MOST_UNITS + 1]; } longs;
#define FIELD(name, type) PyObject *name;
    OBJECTS(FIELD)
#undef FIELD
    struct reading *reading; /* a directory (_hot_dirs.c) */
    PyObject *number; /* the one that was asked for last (number_object) */
    uint64_t number_is;
    Py_ssize_t answered;
    uint64_t used_last; /* the directory whose descriptor is at the end of `dirs`; 0: not known, Python may have used one */
    int eager; /* to read before it is known that there is something */
} Hot;

/* Attributes of the objects. */
#define NAMES(X) \
    X(_packed) X(id) X(ino) X(parent) X(anchor) X(move_to_end) X(popitem) X(backing) X(backing_id) X(close) \
    X(content) X(faults) X(flags) X(gone) \
    X(guard) X(handle) X(heard) X(inode) X(marked) X(most) X(name) X(open) X(opath) X(opens) X(passthrough) X(retire) \
    X(room) X(set_id) \
    X(size) X(position) X(segment) X(shown) X(slot) X(start) X(uid) X(writable) X(writers)
/* An attribute, and where in the objects of the types that were met it is: they have slots. */
enum { KNOWN_TYPES = 3 };
struct attribute { PyObject *word; struct { PyTypeObject *type; Py_ssize_t at; } known[KNOWN_TYPES]; };
#define NAME(name) extern struct attribute s_##name[1];
NAMES(NAME)
#undef NAME

/* --- the kernel (_hot.c) --- */
/* Have it ask for attributes anew (kernel.Session._outdated). 0, or -1 with an exception. */
int outdated(Hot *hot, uint64_t nodeid);

/* --- who was told what (_hot_asked.c) --- */
/* A request has come. */
void asks(Hot *hot, const struct in_header *in);
/* An answer to this thread has the node's attributes. */
void told_to(Hot *hot, uint64_t nodeid, uint32_t thread);
/* Nobody has yet to take in what he was told of the node, which this thread changes. If not, the kernel is to be told
 * now (outdated), and nobody has. */
int has_taken_in(Hot *hot, uint64_t nodeid, uint32_t thread);
/* Anybody may be told of any node now. */
void anybody_told(Hot *hot);

/* --- other threads --- */
/* Let them run, if there are any: next to always there are none, and the lock's two ways cost a tenth of a request. To
 * be taken up again by `resumed`, with what is returned here. */
static inline PyThreadState *paused(void)
{
    PyThreadState *now = PyThreadState_Get();
    int alone = PyInterpreterState_ThreadHead(PyThreadState_GetInterpreter(now)) == now && !PyThreadState_Next(now);
    return alone ? NULL : PyEval_SaveThread();
}

static inline void resumed(PyThreadState *state)
{
    if (state)
        PyEval_RestoreThread(state);
}

/* --- objects (_hot_state.c) --- */
/* Where in objects of its type an attribute is; -1 where it is no plain slot. */
Py_ssize_t slot_of(PyTypeObject *type, struct attribute *attribute);

/* The place of an attribute that has a value; NULL where it is to be asked for by name. */
static inline PyObject **place_of(PyObject *object, struct attribute *attribute)
{
    PyTypeObject *type = Py_TYPE(object);
    Py_ssize_t at = type == attribute->known[0].type ? attribute->known[0].at : slot_of(type, attribute);
    PyObject **place = at < 0 ? NULL : (PyObject **)((char *)object + at);
    return place && *place ? place : NULL;
}

/* A new reference; NULL with an exception. */
static inline PyObject *get_of(PyObject *object, struct attribute *attribute)
{
    PyObject **place = place_of(object, attribute);
    return place ? Py_NewRef(*place) : PyObject_GetAttr(object, attribute->word);
}

/* 0, or -1 with an exception. */
static inline int put_of(PyObject *object, struct attribute *attribute, PyObject *value)
{
    PyObject **place = place_of(object, attribute);
    if (!place)
        return PyObject_SetAttr(object, attribute->word, value);
    Py_SETREF(*place, Py_NewRef(value));
    return 0;
}

/* Whether an attribute is this very object. */
static inline int attribute_is(PyObject *object, struct attribute *attribute, PyObject *wanted)
{
    PyObject **place = place_of(object, attribute);
    if (place)
        return *place == wanted;
    PyObject *value = PyObject_GetAttr(object, attribute->word);
    int same = value == wanted;
    Py_XDECREF(value);
    return same;
}

uint64_t number_of(PyObject *object, struct attribute *attribute);
int set_number(PyObject *object, struct attribute *attribute, uint64_t number);
PyObject *copy_of(PyObject *plain);
int discard(PyObject *dict, PyObject *key);
int is_plain(PyObject *inode);
int count_in(PyObject *dict, PyObject *key, int by);

/* The number of an inode as an object, a new reference: one request needs it again and again. NULL with an exception. */
static inline PyObject *number_object(Hot *hot, uint64_t number)
{
    if (!hot->number || hot->number_is != number) {
        PyObject *made = PyLong_FromUnsignedLongLong(number);
        if (!made)
            return NULL;
        Py_XSETREF(hot->number, made);
        hot->number_is = number;
    }
    return Py_NewRef(hot->number);
}

/* --- the ledger (_hot_state.c) --- */
void *record_at(Hot *hot, enum part part, uint64_t slot);
uint64_t *words_of(Hot *hot);
int has_slot(Hot *hot, enum part part);
/* Whether there are places for so many long names. */
int has_longs(Hot *hot, Py_ssize_t count);
int has_node_slots(Hot *hot, size_t length);
int64_t take_slot(Hot *hot, enum part part);
int give_slot(Hot *hot, enum part part, uint64_t slot);

/* --- nodes (_hot_state.c) --- */
size_t name_of(Hot *hot, uint64_t nodeid, char name[NAME_ROOM]);
int note_node(Hot *hot, struct kept_node node, const char *content, size_t length);
PyObject *node_at(Hot *hot, uint64_t nodeid);
int directory_of(Hot *hot, PyObject *node);
uint64_t enter(Hot *hot, PyObject *ino, PyObject *parent, const char *name, Py_ssize_t length);
int drop_directory(Hot *hot, PyObject *id);
void looked_up(Hot *hot, uint64_t nodeid);
int forget(Hot *hot, uint64_t nodeid, uint64_t count);

/* --- open files (_hot_open.c) --- */
enum outcome open_file(Hot *hot, const struct in_header *in, uint32_t flags, struct open_out *out);
PyObject *backing_id_of(Hot *hot, PyObject *backing, PyObject *opath);
int touch(Hot *hot, PyObject *inode, PyObject *ino, uint32_t pid);
int is_ample(Hot *hot);
int reopened(Hot *hot, int opath, int flags);
PyObject *noted_inode(Hot *hot, uint64_t ino, PyObject *backing_id);
PyObject *new_handle(Hot *hot, PyObject *inode, uint32_t uid, uint32_t flags, uint64_t backing_id);
uint64_t noted_file(Hot *hot, const struct in_header *in, uint64_t nodeid, PyObject *node, PyObject *handle,
                    uint32_t flags, uint32_t backing_id);

/* --- closing (_hot_release.c) --- */
/* states.backing.close. 0, or -1 with an exception. */
int backing_closed(Hot *hot, PyObject *backing, PyObject *number);
/* A new registration that leads to no open file is let go; the exception stays what it is. */
void undone(Hot *hot, PyObject *inode, PyObject *ino);
enum outcome release_file(Hot *hot, uint64_t fh);
int let_go(Hot *hot, PyObject *inode, PyObject *ino);
int idle_dropped(Hot *hot, PyObject *ino);
/* states.idle.give_way. 0, or -1 with an exception. */
int idle_gives_way(Hot *hot);
/* states.retire. 0, or -1 with an exception. */
int retire(Hot *hot, PyObject *inode);
double monotonic(void);

/* --- for others (_hot_marks.c) --- */
/* As far as 64 bits hold them. */
int64_t nanoseconds(const struct timespec *t);
size_t packed_stat(const struct stat *st, char *to);
void intend(Hot *hot, uint64_t request, enum doing doing, const struct stat *first, const struct stat *second,
            const struct handle *handle);
int has_marks_room(Hot *hot);
int64_t append_mark(Hot *hot, enum mark kind, const struct mark_of *of);
int mark(Hot *hot, enum mark kind, PyObject *ino, const struct mark_of *of);

uint32_t crc32_of(uint32_t crc, const unsigned char *at, size_t size);

/* --- the index (_hot_index.c) --- */
extern PyTypeObject RecordsType;
enum outcome looked_up_record(PyObject *records, uint64_t ino, int64_t ctime);

/* --- names (_hot_names.c) --- */
int found_place(Hot *hot, uint64_t nodeid, const char *name, size_t length, struct place *place);
int handle_at(int fd, const char *name, struct handle *handle);
int found_known(Hot *hot, uint64_t number, struct known *known);
void drop_known(struct known *known);
int is_still(PyObject *inode);
int entry_marked(Hot *hot, const struct place *place, uint64_t removed);
int moved(Hot *hot, PyObject *node, const struct place *to);
int leave_name(Hot *hot, PyObject *node);
int new_name_marked(Hot *hot, const struct place *to, const struct known *known, const struct stat *st);
enum outcome remove_name(Hot *hot, const struct in_header *in, const char *name, size_t length, int directory);
enum outcome rename_name(Hot *hot, const struct in_header *in, const char *name, uint64_t above, const char *new_name);

/* --- listings (_hot_dirs.c) --- */
enum outcome list_directory(Hot *hot, uint64_t nodeid, uint64_t offset, size_t room, int plus, char *to, size_t *size);

/* --- links (_hot_links.c) --- */
enum outcome link_file(Hot *hot, const struct in_header *in, uint64_t linked, const char *name, struct entry_out *out);
enum outcome read_link(Hot *hot, uint64_t nodeid, char *to, size_t *length);

/* --- new files (_hot_make.c) --- */
enum outcome make_symlink(Hot *hot, const struct in_header *in, const char *name, const char *target,
                          struct entry_out *out);
enum outcome make_directory(Hot *hot, const struct in_header *in, uint32_t mode, uint32_t umask_, const char *name,
                            struct entry_out *out);
enum outcome create_file(Hot *hot, const struct in_header *in, uint32_t flags, uint32_t mode, uint32_t umask_,
                         const char *name, struct create_out *out);
/* It was made here a moment ago, and nobody has set an attribute since, nor asked for one: the first who asks. */
int was_new_file(Hot *hot, uint64_t nodeid);
void none_is_new(Hot *hot);

/* --- edits behind the mount (_hot_watch.c) --- */
PyObject *hot_foreign(PyObject *module, PyObject *arguments);
PyObject *hot_time_slice(PyObject *module, PyObject *arguments);

/* --- for how long (_hot_last.c) --- */
/* Lasting.prove; *st is what it shows then. */
void prove(Hot *hot, int dirfd, const char *name, struct stat *st);
void doubt(Hot *hot, const struct stat *st);
void believe(Hot *hot, const struct stat *st);
int is_restless(Hot *hot, const struct stat *st);
unsigned long name_lasts(Hot *hot, mode_t mode, nlink_t links);
unsigned long attributes_last(Hot *hot, const struct stat *st, PyObject *ino, PyObject *inode);
/* Where the kernel takes them for the newest, whatever it has been told since it asked. */
unsigned long for_now(Hot *hot, unsigned long seconds);
int written(Hot *hot, PyObject *ino);
int ended(Hot *hot, PyObject *ino);
/* told.Told.note, as such and of attributes alone (Operations._attributes), and lasts. */
void told_for(Hot *hot, uint64_t nodeid, unsigned long seconds);
void told_for_now(Hot *hot, uint64_t nodeid, unsigned long seconds);
int is_late(Hot *hot, PyObject *ino);
int no_longer_late(Hot *hot, PyObject *ino);
int told_lately(Hot *hot, uint64_t nodeid);

/* --- names and attributes (_hot_look.c) --- */
/* For how long all of it holds. */
static inline unsigned long entry_lasts(const struct entry_out *entry)
{
    return entry->entry_valid < entry->attr_valid ? entry->entry_valid : entry->attr_valid;
}
int pack_attr(struct attr *to, const struct stat *st);
enum outcome look_up_in(Hot *hot, PyObject *parent, int fd, const char *name, Py_ssize_t length, int listed,
                        struct entry_out *out);
long seconds_of(Hot *hot, const struct stat *st);
/* `listed`: for a listing (vfs.lookup). */
enum outcome look_up(Hot *hot, uint64_t above, const char *name, Py_ssize_t length, int listed,
                     struct entry_out *out);
enum outcome get_attributes(Hot *hot, uint64_t nodeid, struct attr_out *out);
enum outcome fill_attributes(Hot *hot, const struct stat *st, struct attr_out *out);

/* --- attributes (_hot_attrs.c) --- */
/* A node that is reached by a name, and, as far as it is used, a descriptor of its very inode. */
struct target {
    PyObject *node, *parent, *ino;
    PyObject *inode; /* its state in the gate; NULL: none */
    int above, fd, own; /* its directory's, and its own: to be closed or another's */
    uint64_t number;
    struct stat st;
    size_t length;
    char name[NAME_ROOM];
};
/* 0 where Python is to say; to be let go of in either case. */
int found_target(Hot *hot, uint64_t nodeid, struct target *at);
void let_target_go(struct target *at);
/* Its name is its own, still or again. */
int target_is_named(struct target *at);
/* By its name, which must be its own (nodes.reach). A descriptor that an open file has is one of this inode for good; any
 * other is opened first and looked at then, so that no name is exchanged in between. 0 where it is not. */
int reached_target(Hot *hot, struct target *at);
/* Nothing is to be waited for, or shown, if it is changed (gate.before_change). */
int may_change(Hot *hot, const struct target *at);
/* marking.attributes. 0, or -1 with an exception. */
int attributes_marked(Hot *hot, const struct target *at);
enum outcome get_attributes_of_file(Hot *hot, uint64_t nodeid, uint64_t fh, struct attr_out *out);
enum outcome set_attributes(Hot *hot, uint64_t nodeid, const struct setattr_in *ask, struct attr_out *out);

/* The handle of an open file of this number, borrowed; NULL where there is none. */
PyObject *handle_of_file(Hot *hot, uint64_t fh);

/* --- what is copied (_hot_copy.c) --- */
enum outcome copy_range(Hot *hot, const struct in_header *in, const struct copy_in *ask, uint64_t *copied);

/* --- extended attributes (_hot_xattrs.c) --- */
#define MOST_VALUE 1024 /* bytes: what is longer is Python's */
#define ACL_KILL_SGID 1 /* protocol.SETXATTR_ACL_KILL_SGID */
/* Whether an inode, by an O_PATH descriptor, has no such attribute, without a doubt. */
int lacks(Hot *hot, int opath, const char *attribute);
enum outcome get_xattr(Hot *hot, uint64_t nodeid, uint32_t room, const char *name, char *value, size_t *size);
enum outcome list_xattrs(Hot *hot, uint64_t nodeid, uint32_t room, char *names, size_t *size);
enum outcome set_xattr(Hot *hot, uint64_t nodeid, const struct setxattr_in *ask, const char *name, const char *value);
enum outcome remove_xattr(Hot *hot, const struct in_header *in, const char *name);

#endif
