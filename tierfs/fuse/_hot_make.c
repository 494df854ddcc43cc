/* MKDIR, SYMLINK and CREATE: what vfs.mkdir, vfs.symlink and vfs.create do with making.Maker, marking.made_dir and
 * gate.created, nodes.made and files.add. What was made and is not quite plain is removed again, and Python makes it
 * anew: nobody has been told.
 */
#include "_hot.h"

#include <fcntl.h>
#include <string.h>
#include <sys/statfs.h>
#include <unistd.h>

#define MODE 01777
#define BELIEVED 64 /* files that are made or opened */
#define BELIEVED_SECONDS 0.02
#define NEW_SECONDS 1.0 /* and what is set behind the mount meanwhile shows then */

/* Whose it must become (making.Maker._owner): 1 with *uid and *gid, 0 where it is already, -1 where that fails. */
static int owner_of(Hot *hot, const struct in_header *in, int dirfd, const struct stat *st, uid_t *uid, gid_t *gid)
{
    struct stat above;
    if (hot->euid || (!in->uid && in->gid == hot->egid))
        return 0;
    if (fstat(dirfd, &above))
        return -1;
    *uid = in->uid;
    *gid = above.st_mode & S_ISGID ? st->st_gid : in->gid;
    return st->st_uid != *uid || st->st_gid != *gid;
}

/* The caller's umask is the process's own from here on (making.Maker._masked): mostly it is already. */
static void masked(const Hot *hot, mode_t callers)
{
    if (callers != hot->umask)
        umask(callers);
}

/* ... to here. */
static void unmasked(const Hot *hot, mode_t callers)
{
    if (callers != hot->umask)
        umask(hot->umask);
}

/* Whether an inode of this number is known: it was removed behind the mount, or is still guarded. */
static int is_known(Hot *hot, uint64_t number)
{
    PyObject *ino = number_object(hot, number);
    int there = !ino || PyDict_Contains(hot->by_ino, ino) || PyDict_Contains(hot->inodes, ino)
                || PySet_Contains(hot->seals, ino);
    Py_XDECREF(ino);
    return there;
}

static void fill_entry(Hot *hot, uint64_t nodeid, unsigned long seconds, struct entry_out *out)
{
    out->nodeid = nodeid;
    out->entry_valid = name_lasts(hot, out->attr.mode, out->attr.nlink);
    out->attr_valid = seconds;
}

/* --- directories and symlinks -------------------------------------------------------------------------------- */

/* A new name as its owner's, by its stat; 0 where there is none after all. `flags`: of unlinkat(2). */
static int given(Hot *hot, const struct in_header *in, const struct place *place, int flags, struct stat *st)
{
    uid_t uid;
    gid_t gid;
    int failed = fstatat(place->fd, place->name, st, AT_SYMLINK_NOFOLLOW);
    int whose = failed ? -1 : owner_of(hot, in, place->fd, st, &uid, &gid);
    if (whose > 0)
        failed = fchownat(place->fd, place->name, uid, gid, AT_SYMLINK_NOFOLLOW)
                 || fstatat(place->fd, place->name, st, AT_SYMLINK_NOFOLLOW);
    if (!failed && whose >= 0 && !is_known(hot, st->st_ino))
        return 1;
    unlinkat(place->fd, place->name, flags);
    return 0;
}

static int made_directory(Hot *hot, const struct in_header *in, const struct place *place, uint32_t mode,
                          uint32_t umask_, struct stat *st)
{
    masked(hot, umask_);
    int failed = mkdirat(place->fd, place->name, mode & MODE);
    unmasked(hot, umask_);
    POINT();
    return !failed && given(hot, in, place, AT_REMOVEDIR, st);
}

enum outcome make_directory(Hot *hot, const struct in_header *in, uint32_t mode, uint32_t umask_, const char *name,
                            struct entry_out *out)
{
    struct place place;
    struct stat st;
    memset(out, 0, sizeof *out);
    if (!has_node_slots(hot, strlen(name)) || !has_marks_room(hot)
        || !found_place(hot, in->nodeid, name, strlen(name), &place))
        return PYTHONS;
    intend(hot, in->unique, DOING_MAKE, NULL, NULL, NULL);
    if (!made_directory(hot, in, &place, mode, umask_, &st) || !pack_attr(&out->attr, &st))
        return PYTHONS;
    struct mark_of of = {.ino = st.st_ino, .parent = place.ino, .name = name, .length = place.length};
    PyObject *ino = number_object(hot, st.st_ino);
    uint64_t nodeid = 0;
    if (ino && !mark(hot, DIRECTORY, ino, &of))
        nodeid = enter(hot, ino, place.parent, name, place.length);
    Py_XDECREF(ino);
    fill_entry(hot, nodeid, for_now(hot, attributes_last(hot, &st, NULL, NULL)), out);
    return nodeid ? FOUND : FAILED;
}

enum outcome make_symlink(Hot *hot, const struct in_header *in, const char *name, const char *target,
                          struct entry_out *out)
{
    struct place place;
    struct stat st;
    memset(out, 0, sizeof *out);
    if (!has_node_slots(hot, strlen(name)) || !has_marks_room(hot)
        || !found_place(hot, in->nodeid, name, strlen(name), &place))
        return PYTHONS;
    intend(hot, in->unique, DOING_MAKE, NULL, NULL, NULL);
    if (symlinkat(target, place.fd, name))
        return PYTHONS;
    POINT();
    if (!given(hot, in, &place, 0, &st) || !pack_attr(&out->attr, &st))
        return PYTHONS;
    PyObject *ino = number_object(hot, st.st_ino);
    uint64_t nodeid = 0;
    if (ino && !entry_marked(hot, &place, 0))
        nodeid = enter(hot, ino, place.parent, name, place.length);
    Py_XDECREF(ino);
    fill_entry(hot, nodeid, for_now(hot, attributes_last(hot, &st, NULL, NULL)), out);
    return nodeid ? FOUND : FAILED;
}

/* --- files ----------------------------------------------------------------------------------------------- */

/* What is needed of a new file. */
struct made { int opath; struct stat st; struct handle handle; PyObject *number; };

/* There is room on the local disk (room.Room). Where there is twice as much as has to be, that is believed for a
 * moment: what is written meanwhile does not depend on who is told so. */
int is_ample(Hot *hot)
{
    struct statfs fs;
    if (hot->ample.left && hot->ample.low == hot->low && monotonic() < hot->ample.until) {
        hot->ample.left--;
        return 1;
    }
    unsigned long long available = fstatfs(hot->root_fd, &fs) ? 0 : (unsigned long long)fs.f_bavail * fs.f_frsize;
    hot->ample.left = available / 2 >= hot->low ? BELIEVED : 0;
    hot->ample.low = hot->low;
    hot->ample.until = monotonic() + BELIEVED_SECONDS;
    return available >= hot->low;
}

/* As its owner's. 0, or -1 where that cannot be. */
static int owned_file(Hot *hot, const struct in_header *in, const struct place *place, struct made *made)
{
    uid_t uid;
    gid_t gid;
    int whose = owner_of(hot, in, place->fd, &made->st, &uid, &gid);
    if (whose <= 0)
        return whose;
    return fchownat(made->opath, "", uid, gid, AT_EMPTY_PATH) || fstat(made->opath, &made->st) ? -1 : 0;
}

/* Nobody has put another in its place, behind the mount in this very moment. Not its device is compared: overlayfs gives
 * files another than directories. */
static int is_just_made(const Hot *hot, const struct stat *st)
{
    return S_ISREG(st->st_mode) && st->st_nlink == 1 && !st->st_size && st->st_uid == hot->euid;
}

/* A new file as its owner's; 0 where there is none after all. Made without being opened: who had it open for writing
 * would be one that has closed it, for all who watch. */
static int made_file(Hot *hot, const struct in_header *in, const struct place *place, uint32_t mode, uint32_t umask_,
                     struct made *made)
{
    masked(hot, umask_);
    int failed = mknodat(place->fd, place->name, S_IFREG | (mode & MODE), 0);
    unmasked(hot, umask_);
    if (failed)
        return 0;
    POINT();
    made->opath = openat(place->fd, place->name, O_PATH | O_NOFOLLOW | O_CLOEXEC);
    failed = made->opath < 0 ? fstatat(place->fd, place->name, &made->st, AT_SYMLINK_NOFOLLOW)
                             : fstat(made->opath, &made->st);
    int ours = !failed && is_just_made(hot, &made->st);
    if (ours && made->opath >= 0 && !is_known(hot, made->st.st_ino) && !owned_file(hot, in, place, made)) {
        POINT();
        if (handle_at(made->opath, "", &made->handle))
            return 1;
    }
    if (made->opath >= 0)
        close(made->opath);
    if (ours)
        unlinkat(place->fd, place->name, 0);
    return 0;
}

/* Register it with the kernel: 0, or -1 where that cannot be. */
static int registered(Hot *hot, PyObject *backing, struct made *made)
{
    PyObject *opath = PyLong_FromLong(made->opath);
    made->number = opath ? backing_id_of(hot, backing, opath) : NULL;
    Py_XDECREF(opath);
    return made->number ? 0 : -1;
}

/* marking.write, of a file that nobody has sealed. 0, or -1 with an exception. */
static int write_marked(Hot *hot, const struct place *place, PyObject *ino, const struct made *made)
{
    uint64_t generation = ++words_of(hot)[GENERATION];
    POINT();
    struct mark_of of = {.ino = made->st.st_ino, .generation = generation, .parent = place->ino,
                         .handle = &made->handle, .name = place->name, .length = place->length};
    return mark(hot, WRITTEN, ino, &of) || no_longer_late(hot, ino) ? -1 : 0;
}

/* Its state, as of a file that is open for writing. NULL with an exception. */
static PyObject *new_inode(Hot *hot, const struct place *place, PyObject *ino, const struct made *made)
{
    PyObject *inode = copy_of(hot->inode), *opath = PyLong_FromLong(made->opath);
    PyObject *name = PyBytes_FromStringAndSize(place->name, place->length);
    PyObject *handle = PyBytes_FromStringAndSize(made->handle.bytes, made->handle.length);
    PyObject *slot = NULL;
    if (!inode || !opath || !name || !handle || put_of(inode, s_ino, ino)
        || set_number(inode, s_parent, place->ino) || put_of(inode, s_name, name)
        || put_of(inode, s_opath, opath) || put_of(inode, s_handle, handle)
        || put_of(inode, s_backing_id, made->number)
        || put_of(inode, s_marked, Py_True) || put_of(inode, s_passthrough, Py_True)
        || set_number(inode, s_opens, 1) || set_number(inode, s_writers, 1)
        || !(slot = noted_inode(hot, made->st.st_ino, made->number)) || put_of(inode, s_slot, slot))
        Py_CLEAR(inode);
    Py_XDECREF(opath);
    Py_XDECREF(name);
    Py_XDECREF(handle);
    Py_XDECREF(slot);
    return inode;
}

/* Without a state nobody else would end it. */
static void registration_undone(Hot *hot, const struct made *made)
{
    PyObject *type, *error, *trace;
    PyErr_Fetch(&type, &error, &trace);
    PyObject *backing = get_of(hot->states, s_backing);
    if (!backing || backing_closed(hot, backing, made->number))
        PyErr_Clear(); /* what had come before is the request's error */
    Py_XDECREF(backing);
    close(made->opath);
    PyErr_Restore(type, error, trace);
}

static enum outcome taken_in(Hot *hot, const struct in_header *in, const struct place *place, uint32_t flags,
                             const struct made *made, struct create_out *out)
{
    PyObject *ino = number_object(hot, made->st.st_ino), *inode = NULL, *handle = NULL, *node = NULL;
    uint64_t backing_id = PyLong_AsUnsignedLongLong(made->number), nodeid = 0;
    if (ino && !write_marked(hot, place, ino, made))
        inode = new_inode(hot, place, ino, made);
    if (inode && !PyDict_SetItem(hot->inodes, ino, inode) && !touch(hot, inode, ino, 0))
        handle = new_handle(hot, inode, in->uid, flags, backing_id);
    if (handle)
        nodeid = enter(hot, ino, place->parent, place->name, place->length);
    node = nodeid ? PyDict_GetItemWithError(hot->by_ino, ino) : NULL;
    out->open = (struct open_out){0, OPEN_PASSTHROUGH | OPEN_NOFLUSH, backing_id};
    if (node)
        out->open.fh = noted_file(hot, in, nodeid, node, handle, flags, backing_id);
    if (!out->open.fh && inode)
        undone(hot, inode, ino);
    else if (!inode)
        registration_undone(hot, made);
    fill_entry(hot, nodeid, hot->attr_seconds, &out->entry);
    Py_XDECREF(handle);
    Py_XDECREF(inode);
    Py_XDECREF(ino);
    hot->new_files[nodeid % NEW_FILES] = (struct new_file){nodeid, monotonic() + NEW_SECONDS};
    return out->open.fh ? FOUND : FAILED;
}

enum outcome create_file(Hot *hot, const struct in_header *in, uint32_t flags, uint32_t mode, uint32_t umask_,
                         const char *name, struct create_out *out)
{
    struct place place;
    struct made made = {.number = NULL};
    memset(out, 0, sizeof *out);
    if (mode & (S_ISUID | S_ISGID) || (flags & O_ACCMODE) == O_RDONLY || !is_ample(hot)
        || !has_node_slots(hot, strlen(name)) || !has_slot(hot, FILES) || !has_slot(hot, INODES) || !has_marks_room(hot)
        || !found_place(hot, in->nodeid, name, strlen(name), &place))
        return PYTHONS;
    PyObject *backing = get_of(hot->states, s_backing);
    enum outcome outcome = PYTHONS;
    if (backing && backing != Py_None && !idle_gives_way(hot)) {
        intend(hot, in->unique, DOING_MAKE, NULL, NULL, NULL);
        if (made_file(hot, in, &place, mode, umask_, &made)) {
            POINT();
            if (pack_attr(&out->entry.attr, &made.st) && !registered(hot, backing, &made)) {
                outcome = taken_in(hot, in, &place, flags, &made, out);
            } else {
                close(made.opath);
                unlinkat(place.fd, name, 0);
            }
        }
    }
    Py_XDECREF(made.number);
    Py_XDECREF(backing);
    return outcome;
}

int was_new_file(Hot *hot, uint64_t nodeid)
{
    struct new_file *file = &hot->new_files[nodeid % NEW_FILES];
    int was = file->nodeid == nodeid && monotonic() < file->until;
    if (was)
        file->nodeid = 0;
    return was;
}

void none_is_new(Hot *hot)
{
    memset(hot->new_files, 0, sizeof hot->new_files);
}
