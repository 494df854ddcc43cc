/* For how long the kernel may believe names and attributes: what lasting.Lasting says. */
#include "_hot.h"

#include <fcntl.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>

#define PROBE (O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_NOATIME | O_CLOEXEC)
#define SET_ID (S_ISUID | S_ISGID)

static int is_unproven(Hot *hot, PyObject *ino)
{
    return PySet_GET_SIZE(hot->unproven) && PySet_Contains(hot->unproven, ino) == 1;
}

/* Nobody has the file of this name and number open for writing, or mapped so: *st is what it shows then. */
static int is_unwritten(int dirfd, const char *name, struct stat *st)
{
    struct stat now;
    int fd = openat(dirfd, name, PROBE);
    if (fd < 0)
        return 0;
    /* The default signal of a broken lease, SIGIO, would end the process; SIGURG is ignored. The lease ends with the
     * descriptor. */
    int is = !fcntl(fd, F_SETSIG, SIGURG) && !fcntl(fd, F_SETLEASE, F_RDLCK) && !fstat(fd, &now)
             && now.st_ino == st->st_ino;
    close(fd);
    if (is)
        *st = now;
    return is;
}

/* For how many seconds it has still changed lately. */
static long fresh_of(Hot *hot, const struct stat *st)
{
    return st->st_ctim.tv_sec + hot->fresh - time(NULL);
}

static long long ctime_of(const struct stat *st)
{
    return nanoseconds(&st->st_ctim);
}

/* It was proven, and nobody has written to it since. */
static int is_proven(Hot *hot, PyObject *ino, const struct stat *st)
{
    PyObject *ctime = PyDict_GetItemWithError(hot->proven, ino);
    return ctime && PyLong_AsLongLong(ctime) == ctime_of(st);
}

/* Lasting._remember. 0, or -1 with an exception. */
static int remembered(Hot *hot, PyObject *ino, const struct stat *st)
{
    PyObject *ctime = PyLong_FromLongLong(ctime_of(st));
    if (PyDict_GET_SIZE(hot->proven) >= hot->most_proven)
        PyDict_Clear(hot->proven);
    int failed = ctime ? PyDict_SetItem(hot->proven, ino, ctime) : -1;
    Py_XDECREF(ctime);
    return failed;
}

void prove(Hot *hot, int dirfd, const char *name, struct stat *st)
{
    if (!hot->long_seconds || !S_ISREG(st->st_mode))
        return;
    PyObject *ino = number_object(hot, st->st_ino);
    int proven = ino && (is_unproven(hot, ino) || (fresh_of(hot, st) > 0 && !is_proven(hot, ino, st)));
    PyObject *inode = proven ? PyDict_GetItemWithError(hot->inodes, ino) : NULL;
    if (inode)
        proven = !number_of(inode, s_writers) && attribute_is(inode, s_guard, Py_None);
    if (proven && !PyErr_Occurred()) {
        proven = is_unwritten(dirfd, name, st);
        if (proven ? PySet_Discard(hot->unproven, ino) < 0 || remembered(hot, ino, st) : PySet_Add(hot->unproven, ino))
            PyErr_Clear();
    }
    Py_XDECREF(ino);
}

int is_restless(Hot *hot, const struct stat *st)
{
    long fresh = hot->long_seconds && S_ISREG(st->st_mode) ? fresh_of(hot, st) : 0;
    PyObject *ino = NULL;
    if (fresh > hot->fresh - hot->restless && fresh <= hot->fresh)
        ino = number_object(hot, st->st_ino);
    int is = ino && PyDict_Contains(hot->inodes, ino) == 1;
    Py_XDECREF(ino);
    return is;
}

void doubt(Hot *hot, const struct stat *st)
{
    if (hot->long_seconds && S_ISREG(st->st_mode) && fresh_of(hot, st) > 0) {
        PyObject *ino = number_object(hot, st->st_ino);
        if (!ino || PySet_Add(hot->unproven, ino))
            PyErr_Clear(); /* it lasts for the time in which it is fresh, at most */
        Py_XDECREF(ino);
    }
}

void believe(Hot *hot, const struct stat *st)
{
    if (!hot->long_seconds || !S_ISREG(st->st_mode) || fresh_of(hot, st) <= 0)
        return;
    PyObject *ino = number_object(hot, st->st_ino);
    PyObject *ctime = PyLong_FromLongLong(ctime_of(st));
    int room = PyDict_GET_SIZE(hot->believed) < hot->most_believed;
    if (!ino || !ctime || !room || PyDict_SetItem(hot->believed, ino, ctime)) {
        PyErr_Clear();
        doubt(hot, st);
    }
    Py_XDECREF(ino);
    Py_XDECREF(ctime);
}

unsigned long name_lasts(Hot *hot, mode_t mode, nlink_t links)
{
    return hot->long_seconds && (links == 1 || S_ISDIR(mode)) ? hot->long_seconds : hot->entry_seconds;
}

unsigned long attributes_last(Hot *hot, const struct stat *st, PyObject *ino, PyObject *inode)
{
    if (!hot->long_seconds)
        return hot->attr_seconds;
    if (!S_ISREG(st->st_mode))
        return hot->long_seconds;
    if (st->st_mode & SET_ID || is_unproven(hot, ino)
        || (inode && (number_of(inode, s_writers) || !attribute_is(inode, s_shown, Py_None))))
        return hot->attr_seconds;
    long fresh = fresh_of(hot, st);
    if (fresh <= 0)
        return hot->file_seconds;
    fresh = fresh < hot->fresh ? fresh : hot->fresh;
    return fresh > (long)hot->attr_seconds ? (unsigned long)fresh : hot->attr_seconds;
}

unsigned long for_now(Hot *hot, unsigned long seconds)
{
    return seconds < hot->attr_seconds ? seconds : hot->attr_seconds;
}

int written(Hot *hot, PyObject *ino)
{
    return hot->long_seconds ? PySet_Add(hot->unproven, ino) : 0;
}

/* Lasting.ended. 0, or -1 with an exception. */
int ended(Hot *hot, PyObject *ino)
{
    return PySet_GET_SIZE(hot->unproven) && PySet_Discard(hot->unproven, ino) < 0 ? -1 : 0;
}

void told_for(Hot *hot, uint64_t nodeid, unsigned long seconds)
{
    ((uint32_t *)hot->told.buf)[nodeid & SLOT] = (uint32_t)monotonic() + seconds;
}

void told_for_now(Hot *hot, uint64_t nodeid, unsigned long seconds)
{
    if (seconds < hot->told_left)
        told_for(hot, nodeid, 0);
}

int told_lately(Hot *hot, uint64_t nodeid)
{
    return ((uint32_t *)hot->told.buf)[nodeid & SLOT] >= (uint32_t)monotonic() + hot->told_left;
}
