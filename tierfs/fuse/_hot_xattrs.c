/* Extended attributes that are TierFS's in no way: what xattrs.Xattrs does of what is resident, and waits for nothing. */
#include "_hot.h"

#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/xattr.h>
#include <unistd.h>

/* Their numbers everywhere. */
#define SETXATTRAT 463
#ifndef GETXATTRAT
#define GETXATTRAT 464
#endif
#ifndef LISTXATTRAT
#define LISTXATTRAT 465
#endif
#define REMOVEXATTRAT 466
struct xattr_args { uint64_t value __attribute__((aligned(8))); uint32_t size, flags; };

static int begins(const char *name, const char *with)
{
    return !strncmp(name, with, strlen(with));
}

/* TierFS's own, or like them: not what the inode says. */
static int is_ours(const char *name)
{
    return begins(name, "trusted.tierfs") || begins(name, "user.tierfs");
}

/* --- what is read ---------------------------------------------------------------------------------------- */

/* A path that means the descriptor's own inode. */
static const char *path_of(int opath, char path[40])
{
    snprintf(path, 40, "/proc/self/fd/%d", opath);
    return path;
}

/* How long the value is of an inode, by an O_PATH descriptor; -1 with errno. Linux 6.13 can be asked from /proc/self/fd
 * on, which spares two thirds of the way; an O_PATH descriptor itself it does not take. */
static ssize_t length_of(Hot *hot, int opath, const char *attribute)
{
    struct xattr_args nothing = {0, 0, 0};
    char path[40];
    snprintf(path, sizeof path, "%d", opath);
    ssize_t length = syscall(GETXATTRAT, hot->descriptors, path, 0, attribute, &nothing, sizeof nothing);
    return length >= 0 || errno != ENOSYS ? length : getxattr(path_of(opath, path), attribute, NULL, 0);
}

int lacks(Hot *hot, int opath, const char *attribute)
{
    return length_of(hot, opath, attribute) < 0 && errno == ENODATA;
}

/* By the name, without a descriptor and a walk through /proc. Afterwards the name must mean the node, or the answer may
 * be another's. -1 with errno: EAGAIN where that is not to be had. */
static ssize_t read_by_name(Hot *hot, struct target *at, const char *attribute, char *value)
{
    struct xattr_args args = {(uintptr_t)value, MOST_VALUE, 0};
    at->above = directory_of(hot, at->parent);
    if (at->above < 0)
        return errno = EAGAIN, -1;
    ssize_t length = attribute ? syscall(GETXATTRAT, at->above, at->name, AT_SYMLINK_NOFOLLOW, attribute, &args,
                                         sizeof args)
                               : syscall(LISTXATTRAT, at->above, at->name, AT_SYMLINK_NOFOLLOW, value, MOST_VALUE);
    int error = length < 0 ? errno : 0;
    error = error == ENOSYS || !target_is_named(at) ? EAGAIN : error;
    return error ? errno = error, -1 : length;
}

/* The value of an attribute, or the list of all (NULL); its length, or -1 with errno. */
static ssize_t read_of(Hot *hot, struct target *at, const char *attribute, char *value)
{
    char path[40];
    ssize_t length = read_by_name(hot, at, attribute, value);
    if (length >= 0 || errno != EAGAIN || !reached_target(hot, at))
        return length;
    path_of(at->fd, path);
    return attribute ? getxattr(path, attribute, value, MOST_VALUE) : listxattr(path, value, MOST_VALUE);
}

/* What is answered of a value of so many bytes: itself, or how long it is; ERANGE is Python's to say. */
static enum outcome sized(size_t length, uint32_t room, char *value, size_t *size)
{
    uint32_t said[] = {length, 0};
    if (room && length > room)
        return PYTHONS;
    *size = room ? length : sizeof said;
    if (!room)
        memcpy(value, said, sizeof said);
    return FOUND;
}

enum outcome get_xattr(Hot *hot, uint64_t nodeid, uint32_t room, const char *name, char *value, size_t *size)
{
    struct target at;
    enum outcome outcome = PYTHONS;
    if (is_ours(name))
        return PYTHONS;
    if (!strcmp(name, "security.capability") && was_new_file(hot, nodeid)) /* the kernel, before the first write */
        return NO_DATA;
    if (found_target(hot, nodeid, &at)) {
        ssize_t length = read_of(hot, &at, name, value);
        outcome = length >= 0 ? sized(length, room, value, size) : errno == ENODATA ? NO_DATA : PYTHONS;
    }
    let_target_go(&at);
    return outcome;
}

/* Take our own names out of a list; its length, or -1 where Python is to do it. */
static ssize_t visible(char *names, ssize_t length)
{
    ssize_t kept = 0;
    for (ssize_t at = 0, next; at < length; at = next) {
        next = at + strlen(names + at) + 1;
        if (begins(names + at, "user.tierfs"))
            return -1; /* ours or not, as the server's privileges are */
        if (begins(names + at, "trusted.tierfs"))
            continue;
        memmove(names + kept, names + at, next - at);
        kept += next - at;
    }
    return kept;
}

enum outcome list_xattrs(Hot *hot, uint64_t nodeid, uint32_t room, char *names, size_t *size)
{
    struct target at;
    enum outcome outcome = PYTHONS;
    if (found_target(hot, nodeid, &at)) {
        ssize_t length = read_of(hot, &at, NULL, names);
        length = length > 0 ? visible(names, length) : length;
        outcome = length < 0 ? PYTHONS : sized(length, room, names, size);
    }
    let_target_go(&at);
    return outcome;
}

/* --- what is changed ------------------------------------------------------------------------------------- */

/* The mark, and what gate.before_change ends, now that the descriptor is not needed any more: whether that succeeds or
 * not, the change has been made. 0, or -1 with an exception. */
static int settled(Hot *hot, const struct target *at)
{
    int failed = attributes_marked(hot, at);
    return failed || (S_ISREG(at->st.st_mode) && idle_dropped(hot, at->ino)) ? -1 : 0;
}

/* Set it, or remove it where `value` is NULL; 0, or -1. */
static int put_value(Hot *hot, int opath, const char *name, const char *value, size_t size)
{
    struct xattr_args args = {(uintptr_t)value, size, 0};
    char path[40];
    snprintf(path, sizeof path, "%d", opath);
    long failed = value ? syscall(SETXATTRAT, hot->descriptors, path, 0, name, &args, sizeof args)
                        : syscall(REMOVEXATTRAT, hot->descriptors, path, 0, name);
    if (!failed || errno != ENOSYS)
        return (int)failed;
    path_of(opath, path);
    return value ? setxattr(path, name, value, size, 0) : removexattr(path, name);
}

enum outcome set_xattr(Hot *hot, uint64_t nodeid, const struct setxattr_in *ask, const char *name, const char *value)
{
    struct target at;
    enum outcome outcome = PYTHONS;
    none_is_new(hot);
    if (is_ours(name) || ask->flags)
        return PYTHONS;
    if (found_target(hot, nodeid, &at) && reached_target(hot, &at) && may_change(hot, &at)
        && !(ask->more & ACL_KILL_SGID && at.st.st_mode & S_ISGID)) {
        if (!put_value(hot, at.fd, name, value, ask->size)) {
            POINT();
            outcome = settled(hot, &at) ? FAILED : FOUND;
        }
    }
    let_target_go(&at);
    return outcome;
}

/* xattrs._remove: what a killed server has removed is not there for its successor. */
static enum outcome removed(Hot *hot, uint64_t request, const struct target *at, const char *name)
{
    if (length_of(hot, at->fd, name) < 0)
        return errno == ENODATA ? NO_DATA : PYTHONS;
    intend(hot, request, DOING_XATTR, NULL, NULL, NULL);
    if (put_value(hot, at->fd, name, NULL, 0))
        return PYTHONS;
    POINT();
    return settled(hot, at) ? FAILED : FOUND;
}

enum outcome remove_xattr(Hot *hot, const struct in_header *in, const char *name)
{
    struct target at;
    enum outcome outcome = PYTHONS;
    if (is_ours(name))
        return PYTHONS;
    if (found_target(hot, in->nodeid, &at) && reached_target(hot, &at) && may_change(hot, &at))
        outcome = removed(hot, in->unique, &at, name);
    let_target_go(&at);
    return outcome;
}
