/* What a change leaves for others before it is answered: the intent, for a successor of this server (ledger.intend),
 * and marks, for the mover (marks.MarkWriter.append).
 */
#include "_hot.h"

#include <string.h>
#include <time.h>

#define ENOUGH 4096 /* more than the marks of any one operation take */
#define NS 1000000000LL

/* The layouts of tierfs/intents.py and tierfs/ledger.py. */
struct kept_stat {
    uint64_t mode, ino, dev, nlink;
    uint32_t uid, gid;
    int64_t size, atime, mtime, ctime, blocks;
    uint64_t rdev;
};
struct kept_intent {
    uint64_t request;
    uint32_t which, size;
    int64_t when;
    struct kept_stat stats[2];
    char handle[255];
};
/* The layouts of tierfs/marks.py. */
struct __attribute__((packed)) mark_head { uint32_t crc; uint16_t length; uint8_t kind, padding; };
struct __attribute__((packed)) mark_body {
    uint64_t ino, generation, parent;
    int64_t a, b;
    uint8_t handle, name;
};

/* --- intents --------------------------------------------------------------------------------------------- */

int64_t nanoseconds(const struct timespec *t)
{
    int64_t all;
    if (__builtin_mul_overflow((int64_t)t->tv_sec, NS, &all) || __builtin_add_overflow(all, t->tv_nsec, &all))
        return t->tv_sec < 0 ? INT64_MIN : INT64_MAX;
    return all;
}

static struct kept_stat kept_stat_of(const struct stat *st)
{
    return (struct kept_stat){
        st->st_mode, st->st_ino, st->st_dev, st->st_nlink, st->st_uid, st->st_gid, st->st_size,
        nanoseconds(&st->st_atim), nanoseconds(&st->st_mtim), nanoseconds(&st->st_ctim), st->st_blocks, st->st_rdev,
    };
}

size_t packed_stat(const struct stat *st, char *to)
{
    struct kept_stat packed = kept_stat_of(st);
    memcpy(to, &packed, sizeof packed);
    return sizeof packed;
}

void intend(Hot *hot, uint64_t request, enum doing doing, const struct stat *first, const struct stat *second,
            const struct handle *handle)
{
    struct kept_intent *kept = (struct kept_intent *)((char *)hot->memory.buf + hot->intents_at);
    struct timespec t;
    clock_gettime(CLOCK_REALTIME_COARSE, &t);
    *(volatile uint64_t *)&kept->request = 0;
    POINT();
    if (first)
        kept->stats[0] = kept_stat_of(first);
    if (second)
        kept->stats[1] = kept_stat_of(second);
    kept->size = handle ? handle->length : 0;
    if (handle)
        memcpy(kept->handle, handle->bytes, handle->length);
    kept->which = doing | (first ? 1 << 8 : 0) | (second ? 1 << 9 : 0);
    kept->when = nanoseconds(&t);
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
    POINT();
    *(volatile uint64_t *)&kept->request = request;
    POINT();
}

/* --- marks ----------------------------------------------------------------------------------------------- */

enum { SLICES = 8 };
static uint32_t slices[SLICES][256];

static void fill_slices(void)
{
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t entry = byte;
        for (int bit = 0; bit < 8; bit++)
            entry = entry >> 1 ^ (entry & 1 ? 0xEDB88320U : 0);
        slices[0][byte] = entry;
    }
    for (int slice = 1; slice < SLICES; slice++)
        for (int byte = 0; byte < 256; byte++)
            slices[slice][byte] = slices[0][slices[slice - 1][byte] & 0xFF] ^ slices[slice - 1][byte] >> 8;
}

/* zlib's, from `crc` on; eight bytes at a time. */
uint32_t crc32_of(uint32_t crc, const unsigned char *at, size_t size)
{
    if (!slices[0][1])
        fill_slices();
    crc = ~crc;
    for (; size >= SLICES; size -= SLICES, at += SLICES) {
        uint32_t low, high;
        memcpy(&low, at, sizeof low);
        memcpy(&high, at + sizeof low, sizeof high);
        low ^= crc;
        crc = slices[7][low & 0xFF] ^ slices[6][low >> 8 & 0xFF] ^ slices[5][low >> 16 & 0xFF] ^ slices[4][low >> 24]
              ^ slices[3][high & 0xFF] ^ slices[2][high >> 8 & 0xFF] ^ slices[1][high >> 16 & 0xFF] ^ slices[0][high >> 24];
    }
    while (size--)
        crc = slices[0][(crc ^ *at++) & 0xFF] ^ crc >> 8;
    return ~crc;
}

int has_marks_room(Hot *hot)
{
    uint64_t position = number_of(hot->marks, s_position), start = number_of(hot->marks, s_start);
    return !PyErr_Occurred() && position - start + ENOUGH + sizeof(struct mark_head) <= (uint64_t)hot->segment;
}

/* Put a mark at the position of the log, of `length` bytes behind its head. 0, or -1 with an exception. */
static int put_mark(Hot *hot, uint64_t offset, const struct mark_head *head, const char *body)
{
    Py_buffer map;
    PyObject *segment = get_of(hot->marks, s_segment);
    int failed = segment ? PyObject_GetBuffer(segment, &map, PyBUF_WRITABLE) : -1;
    if (!failed) {
        uint64_t whole;
        memcpy((char *)map.buf + offset + sizeof *head, body, head->length);
        memcpy(&whole, head, sizeof whole);
        POINT();
        __atomic_thread_fence(__ATOMIC_RELEASE);
        /* Last, and in one store: a reader in the other process sees it whole or not at all. */
        *(volatile uint64_t *)((char *)map.buf + offset) = whole;
        POINT();
        PyBuffer_Release(&map);
    }
    Py_XDECREF(segment);
    return failed;
}

int64_t append_mark(Hot *hot, enum mark kind, const struct mark_of *of)
{
    char body[sizeof(struct mark_body) + 2 * 255];
    size_t length = sizeof(struct mark_body), handle = of->handle ? of->handle->length : 0;
    struct mark_body fields = {of->ino, of->generation, of->parent, of->a, of->b, handle, of->length};
    uint64_t position = number_of(hot->marks, s_position), start = number_of(hot->marks, s_start);
    if (PyErr_Occurred())
        return -1;
    memcpy(body, &fields, sizeof fields);
    if (handle)
        memcpy(body + length, of->handle->bytes, handle);
    length += handle;
    if (of->length)
        memcpy(body + length, of->name, of->length);
    length += of->length;
    struct mark_head head = {crc32_of(kind, (unsigned char *)body, length), length, kind, 0};
    head.crc = head.crc ? head.crc : 1;
    if (put_mark(hot, position - start, &head, body)
        || set_number(hot->marks, s_position, position + ((sizeof head + length + 7) & ~7ULL)))
        return -1;
    return position;
}

int mark(Hot *hot, enum mark kind, PyObject *ino, const struct mark_of *of)
{
    int64_t at = append_mark(hot, kind, of);
    PyObject *position = at < 0 ? NULL : PyLong_FromLongLong(at);
    int failed = position ? PyDict_SetItem(hot->recent, ino, position) : -1;
    Py_XDECREF(position);
    return failed || (kind == WRITTEN && written(hot, ino)) ? -1 : 0;
}
