/* COPY_FILE_RANGE of what takes no time, between files that the kernel reads and writes itself: what
 * files.copy_file_range does where neither has to be waited for, and the target is marked.
 */
#include "_hot.h"

#include <fcntl.h>
#include <unistd.h>

#define QUICK (1 << 20) /* openfiles.QUICK */

/* An open file of this number that is in passthrough, and resident; its state, borrowed, or NULL. */
static PyObject *plain_file(Hot *hot, uint64_t fh)
{
    PyObject *handle = handle_of_file(hot, fh), *inode = handle ? get_of(handle, s_inode) : NULL;
    int plain = inode && number_of(handle, s_backing_id) && is_plain(inode) && !PyErr_Occurred();
    Py_XDECREF(inode); /* its handle has it */
    return plain ? inode : NULL;
}

static int reopened_file(Hot *hot, PyObject *inode, int flags)
{
    int opath = (int)number_of(inode, s_opath);
    return PyErr_Occurred() ? -1 : reopened(hot, opath, flags);
}

/* How many bytes there are to be copied; -1 where they are many, or set-id bits would go with the first. */
static int64_t length_of(const struct in_header *in, const struct copy_in *ask, PyObject *source, PyObject *target)
{
    struct stat from, to;
    int opath = (int)number_of(source, s_opath), onto = (int)number_of(target, s_opath);
    if (PyErr_Occurred() || fstat(opath, &from) || fstat(onto, &to) || (in->uid && to.st_mode & (S_ISUID | S_ISGID)))
        return -1;
    uint64_t size = from.st_size, left = size > ask->offset_in ? size - ask->offset_in : 0;
    left = ask->length < left ? ask->length : left;
    return left <= QUICK ? (int64_t)left : -1;
}

enum outcome copy_range(Hot *hot, const struct in_header *in, const struct copy_in *ask, uint64_t *copied)
{
    PyObject *source = plain_file(hot, ask->fh_in), *target = source ? plain_file(hot, ask->fh_out) : NULL;
    if (!target || ask->flags || ask->offset_in > INT64_MAX || ask->offset_out > INT64_MAX
        || !attribute_is(target, s_marked, Py_True))
        return PYTHONS;
    int64_t length = length_of(in, ask, source, target);
    int from = length < 0 ? -1 : reopened_file(hot, source, O_RDONLY);
    int to = from < 0 ? -1 : reopened_file(hot, target, O_RDWR);
    off64_t offset_in = ask->offset_in, offset_out = ask->offset_out;
    ssize_t count = to < 0 ? -1 : copy_file_range(from, &offset_in, to, &offset_out, length, 0);
    POINT();
    if (from >= 0)
        close(from);
    if (to >= 0)
        close(to);
    *copied = count;
    return count < 0 ? PYTHONS : FOUND;
}
