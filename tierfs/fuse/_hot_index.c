/* What the index says of a file in most cases, read from LMDB's file as it is mapped: Index.is_plain without the
 * interpreter, and without a transaction.
 *
 * A transaction keeps the pages that it sees from being used again. Without one they may be, but not before the next
 * commit: a writer changes no page of the newest one, and what it gives back it uses after its own. So a look is good
 * if the newest commit is at its end what it was when it began. Which that is stands in the lock file, and is written
 * there when its meta page is whole; that page is written again by the second commit from then on.
 *
 * The pages are those of 64-bit LMDB 0.9, as tierfs/pages.py describes them, which checks them where they are in
 * doubt; here whatever is odd is left to LMDB. Nothing beyond the file's end or outside of a page is touched.
 */
#include "_hot.h"

#include <pthread.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { PAGE_HEAD = 16, ENTRY_HEAD = 8, TABLE = 48, DEEPEST = 32, KEY = 8 };
enum { BRANCH = 1, LEAF = 2, META = 8, SUBTABLE = 2 };
#define MAGIC 0xBEEFC0DEU
#define NO_PAGE UINT64_MAX
#define FILES "files"

struct meta {
    uint32_t magic, version;
    uint64_t address, size;
    unsigned char free[TABLE], main[TABLE];
    uint64_t last, transaction;
};

/* What the lock file begins with (MDB_txbody). */
struct lock { uint32_t magic, form; pthread_mutex_t readers; uint64_t transaction; };

/* The file, and what was found at the newest commit that has been met. */
typedef struct {
    PyObject_HEAD
    const unsigned char *map;
    const struct lock *lock;
    size_t size, end, page; /* mapped; that can be touched now; a page's */
    int fd;
    uint64_t transaction, root;
} Records;

struct value { const unsigned char *at; size_t size; uint16_t flags; };

#define READER(name, type) \
    static type name(const unsigned char *at) { type value; memcpy(&value, at, sizeof value); return value; }
READER(u16, uint16_t)
READER(u32, uint32_t)
READER(u64, uint64_t)

/* --- pages ----------------------------------------------------------------------------------------------- */

static const unsigned char *page_at(const Records *of, uint64_t number)
{
    return number < of->end / of->page ? of->map + number * of->page : NULL;
}

/* An entry of a page, and how long its key is, which is within; NULL where it is not. The length is read once: the page
 * may be written over meanwhile. */
static const unsigned char *entry_at(const Records *of, const unsigned char *page, unsigned number, size_t *its)
{
    size_t at = u16(page + PAGE_HEAD + 2 * number);
    if (at < PAGE_HEAD || at + ENTRY_HEAD > of->page)
        return NULL;
    *its = u16(page + at + 6);
    return at + ENTRY_HEAD + *its > of->page ? NULL : page + at;
}

/* How a key compares to an entry's. */
static int compared(const unsigned char *entry, size_t its, const void *key, size_t length)
{
    int order = memcmp(key, entry + ENTRY_HEAD, length < its ? length : its);
    return order ? order : length < its ? -1 : length > its;
}

/* The last entry of a page whose key is not above this one; -1: all are, or the page is odd. *equal: it is it. */
static int sought(const Records *of, const unsigned char *page, unsigned count, unsigned first, const void *key,
                  size_t length, int *equal)
{
    int low = (int)first - 1, high = (int)count - 1;
    *equal = 0;
    while (low < high) {
        int middle = low + (high - low + 1) / 2;
        size_t its;
        const unsigned char *entry = entry_at(of, page, middle, &its);
        if (!entry)
            return -1;
        int order = compared(entry, its, key, length);
        if (!order)
            *equal = 1;
        if (order < 0)
            high = middle - 1;
        else
            low = middle;
        if (!order)
            break;
    }
    return low;
}

/* The value of a key in the table with this root: FOUND, ABSENT, or PYTHONS where that cannot be said. */
static enum outcome found_value(const Records *of, uint64_t root, const void *key, size_t length, struct value *value)
{
    if (root == NO_PAGE)
        return ABSENT;
    for (int depth = 0; depth < DEEPEST; depth++) {
        const unsigned char *page = page_at(of, root);
        if (!page || u64(page) != root)
            return PYTHONS;
        size_t lower = u16(page + 12);
        int leaf = u16(page + 10) & LEAF, equal;
        if (lower < PAGE_HEAD + 2 || lower > of->page || !(u16(page + 10) & (LEAF | BRANCH)))
            return PYTHONS;
        int number = sought(of, page, (lower - PAGE_HEAD) / 2, leaf ? 0 : 1, key, length, &equal);
        size_t its;
        const unsigned char *entry = number < 0 ? NULL : entry_at(of, page, number, &its);
        if (leaf && number < 0)
            return ABSENT;
        if (!entry)
            return PYTHONS;
        if (!leaf) {
            root = u16(entry) | (uint64_t)u16(entry + 2) << 16 | (uint64_t)u16(entry + 4) << 32;
            continue;
        }
        *value = (struct value){entry + ENTRY_HEAD + its, u16(entry) | (size_t)u16(entry + 2) << 16,
                                u16(entry + 4)};
        if (!equal)
            return ABSENT;
        return value->at + value->size <= page + of->page ? FOUND : PYTHONS;
    }
    return PYTHONS;
}

/* --- commits --------------------------------------------------------------------------------------------- */

static uint64_t newest(const Records *of)
{
    return __atomic_load_n(&of->lock->transaction, __ATOMIC_ACQUIRE);
}

/* Its meta page; 0 where it is odd, or has been written over. */
static int meta_of(const Records *of, uint64_t transaction, struct meta *meta)
{
    const unsigned char *page = of->map + (transaction & 1) * of->page;
    memcpy(meta, page + PAGE_HEAD, sizeof *meta);
    return u16(page + 10) & META && meta->magic == MAGIC && meta->version == 1 && u32(meta->free) == of->page
           && meta->transaction == transaction;
}

/* Where this commit, the newest, has the table of files; 0 where that cannot be said. */
static int at_commit(Records *of, uint64_t transaction)
{
    struct meta meta;
    struct stat st;
    struct value value;
    if (transaction == of->transaction)
        return 1;
    of->transaction = 0;
    if (!meta_of(of, transaction, &meta) || fstat(of->fd, &st) || st.st_size < 0)
        return 0;
    of->end = (meta.last + 1) * of->page;
    of->end = of->end < (size_t)st.st_size ? of->end : (size_t)st.st_size;
    of->end = of->end < of->size ? of->end : of->size;
    if (found_value(of, u64(meta.main + TABLE - 8), FILES, strlen(FILES), &value) != FOUND
        || value.flags != SUBTABLE || value.size != TABLE)
        return 0;
    of->root = u64(value.at + TABLE - 8);
    if (newest(of) != transaction)
        return 0;
    of->transaction = transaction;
    return 1;
}

/* --- records (codec.py) ---------------------------------------------------------------------------------- */

enum { VERSION = 3, RECORD_HEAD = 5, SHAPE = 3, LEAST = RECORD_HEAD + SHAPE + 26 };
enum { RESIDENCY = 3, LEFT = 4 };

/* codec.is_plain */
static int plain_record(uint64_t ino, const struct value *value, int64_t ctime)
{
    const unsigned char *raw = value->at, *body = raw + RECORD_HEAD;
    if (value->size < LEAST || raw[0] != VERSION)
        return 0;
    uint64_t key = __builtin_bswap64(ino);
    uint32_t crc = crc32_of(0, raw, 1);
    crc = crc32_of(crc, (unsigned char *)&key, sizeof key);
    crc = crc32_of(crc, body, value->size - RECORD_HEAD);
    if (crc != u32(raw + 1) || body[0] & RESIDENCY)
        return 0;
    int64_t left = 0;
    if (body[0] & LEFT)
        memcpy(&left, body + SHAPE, sizeof left);
    return left != ctime;
}

enum outcome looked_up_record(PyObject *records, uint64_t ino, int64_t ctime)
{
    Records *of = (Records *)records;
    struct value value = {NULL, 0, 0};
    uint64_t transaction = of->map ? newest(of) : 0;
    if (!transaction || !at_commit(of, transaction))
        return PYTHONS;
    uint64_t key = __builtin_bswap64(ino);
    enum outcome outcome = found_value(of, of->root, &key, KEY, &value);
    if (outcome == FOUND && (value.flags || !plain_record(ino, &value, ctime)))
        return PYTHONS;
    __atomic_thread_fence(__ATOMIC_ACQUIRE);
    return newest(of) == transaction ? outcome : PYTHONS;
}

/* --- the object ------------------------------------------------------------------------------------------ */

/* The lock file is of the form that is known here: where the newest commit is named, one of the two is. */
static int is_lock(const Records *of)
{
    struct meta meta;
    struct stat st;
    if (of->lock->magic != MAGIC || fstat(of->fd, &st) || st.st_size < 2 * (off_t)of->page)
        return 0;
    uint64_t transaction = newest(of);
    return meta_of(of, transaction, &meta) || meta_of(of, transaction + 1, &meta);
}

static int records_init(Records *of, PyObject *arguments, PyObject *Py_UNUSED(named))
{
    Py_ssize_t size, page;
    int fd, lock_fd;
    if (!PyArg_ParseTuple(arguments, "iinn", &fd, &lock_fd, &size, &page))
        return -1;
    if (of->map || page < 512 || page > 1 << 16 || page & (page - 1) || size < 2 * page) {
        PyErr_SetString(PyExc_ValueError, "made already, or no index");
        return -1;
    }
    of->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    void *map = of->fd < 0 ? MAP_FAILED : mmap(NULL, size, PROT_READ, MAP_SHARED | MAP_NORESERVE, of->fd, 0);
    void *lock = map == MAP_FAILED ? map : mmap(NULL, page, PROT_READ, MAP_SHARED, lock_fd, 0);
    if (lock == MAP_FAILED) {
        PyErr_SetFromErrno(PyExc_OSError);
        if (map != MAP_FAILED)
            munmap(map, size);
        return -1;
    }
    madvise(map, size, MADV_RANDOM);
    of->map = map;
    of->lock = lock;
    of->size = size;
    of->page = page;
    return is_lock(of) ? 0 : (PyErr_SetString(PyExc_ValueError, "no lock file of this index"), -1);
}

static PyObject *records_new(PyTypeObject *type, PyObject *Py_UNUSED(arguments), PyObject *Py_UNUSED(named))
{
    Records *of = (Records *)type->tp_alloc(type, 0);
    if (of)
        of->fd = -1;
    return (PyObject *)of;
}

static void records_dealloc(Records *of)
{
    if (of->map) {
        munmap((void *)of->map, of->size);
        munmap((void *)of->lock, of->page);
    }
    if (of->fd >= 0)
        close(of->fd);
    Py_TYPE(of)->tp_free((PyObject *)of);
}

static PyObject *records_plain(Records *of, PyObject *arguments)
{
    unsigned long long ino;
    long long ctime;
    if (!PyArg_ParseTuple(arguments, "KL", &ino, &ctime))
        return NULL;
    enum outcome outcome = looked_up_record((PyObject *)of, ino, ctime);
    if (outcome == FOUND)
        Py_RETURN_TRUE;
    if (outcome == ABSENT)
        Py_RETURN_FALSE;
    Py_RETURN_NONE;
}

static PyMethodDef records_methods[] = {
    {"plain", (PyCFunction)records_plain, METH_VARARGS,
     "True: a file with this ctime shows what it is. False: there is no record. None: Index is to say."},
    {NULL},
};
PyTypeObject RecordsType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "tierfs.fuse._hot.Records",
    .tp_basicsize = sizeof(Records),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = records_new,
    .tp_init = (initproc)records_init,
    .tp_dealloc = (destructor)records_dealloc,
    .tp_methods = records_methods,
    .tp_doc = "Records(fd, lock_fd, size, page): an index's file, mapped up to a size. Of a process that has it open,"
              " and of one thread.",
};
