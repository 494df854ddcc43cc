/* The least that a mount with passthrough can be: what it costs is the kernel's own part, which no server can take away.
 *
 *   floor DIRECTORY MOUNTPOINT
 *
 * Shows the one file `file` of DIRECTORY, for reading and writing, until it is unmounted. Needs root.
 */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

enum { FILE_NODE = 2, MINOR = 45, PAGES = 256, INIT_EXT = 1 << 30, PASSTHROUGH = 1 << 5 }; /* the last: of flags2 */
enum { OPEN_NOFLUSH = 1 << 5, OPEN_PASSTHROUGH = 1 << 7, HOUR = 3600 };
#define BACKING_OPEN _IOW(229, 1, struct backing_map)

/* As linux/fuse.h has them since passthrough; older headers do not. */
struct backing_map { int32_t fd; uint32_t flags; uint64_t padding; };
struct opened { uint64_t fh; uint32_t flags; int32_t backing_id; };

static int device, above, backing_id;
static char request[(PAGES << 12) + 4096];

static void reply(uint64_t unique, int error, const void *body, size_t size)
{
    struct { struct fuse_out_header head; char body[256]; } out = {{sizeof out.head + size, -error, unique}, ""};
    if (size)
        memcpy(out.body, body, size);
    if (write(device, &out, out.head.len) < 0 && errno != ENOENT)
        err(1, "a reply");
}

static int attributes(uint64_t node, struct fuse_attr *to)
{
    struct stat st;
    if (fstatat(above, node == FILE_NODE ? "file" : ".", &st, AT_SYMLINK_NOFOLLOW))
        return errno;
    *to = (struct fuse_attr){
        .ino = node, .size = st.st_size, .blocks = st.st_blocks, .atime = st.st_atim.tv_sec, .mtime = st.st_mtim.tv_sec,
        .ctime = st.st_ctim.tv_sec, .atimensec = st.st_atim.tv_nsec, .mtimensec = st.st_mtim.tv_nsec,
        .ctimensec = st.st_ctim.tv_nsec, .mode = st.st_mode, .nlink = st.st_nlink, .uid = st.st_uid, .gid = st.st_gid,
        .blksize = st.st_blksize,
    };
    return 0;
}

static void init(uint64_t unique)
{
    /* The depth of the stack is behind the fields that older headers know: the first word that they call unused. */
    union { struct fuse_init_out known; uint32_t words[16]; } out = {.known = {
        .major = 7, .minor = MINOR, .max_readahead = 1 << 20,
        .flags = INIT_EXT | FUSE_BIG_WRITES | FUSE_MAX_PAGES | FUSE_HANDLE_KILLPRIV_V2 | FUSE_ASYNC_READ,
        .max_background = 64, .congestion_threshold = 48, .max_write = PAGES << 12, .time_gran = 1, .max_pages = PAGES,
        .flags2 = PASSTHROUGH,
    }};
    out.words[9] = 1;
    reply(unique, 0, &out, sizeof out);
}

static void look_up(const struct fuse_in_header *in, const char *name)
{
    struct fuse_entry_out out = {.nodeid = FILE_NODE, .entry_valid = HOUR, .attr_valid = 0};
    int error = strcmp(name, "file") ? ENOENT : attributes(FILE_NODE, &out.attr);
    reply(in->unique, error, &out, error ? 0 : sizeof out);
}

static void tell(const struct fuse_in_header *in)
{
    struct fuse_attr_out out = {.attr_valid = in->nodeid == FILE_NODE ? 0 : HOUR};
    int error = attributes(in->nodeid, &out.attr);
    reply(in->unique, error, &out, error ? 0 : sizeof out);
}

static void open_file(const struct fuse_in_header *in)
{
    struct backing_map map = {.fd = openat(above, "file", O_PATH | O_CLOEXEC)};
    if (!backing_id && map.fd >= 0)
        backing_id = ioctl(device, BACKING_OPEN, &map);
    if (map.fd >= 0)
        close(map.fd);
    if (backing_id <= 0)
        err(1, "passthrough");
    struct opened out = {.flags = OPEN_PASSTHROUGH | OPEN_NOFLUSH, .backing_id = backing_id};
    reply(in->unique, 0, &out, sizeof out);
}

static void answer(const struct fuse_in_header *in)
{
    switch (in->opcode) {
    case FUSE_INIT:
        init(in->unique);
        break;
    case FUSE_LOOKUP:
        look_up(in, (const char *)(in + 1));
        break;
    case FUSE_GETATTR:
    case FUSE_SETATTR:
        tell(in);
        break;
    case FUSE_OPEN:
        open_file(in);
        break;
    case FUSE_RELEASE:
        reply(in->unique, 0, NULL, 0);
        break;
    case FUSE_FORGET:
    case FUSE_BATCH_FORGET:
    case FUSE_INTERRUPT:
        break;
    default:
        reply(in->unique, ENOSYS, NULL, 0);
    }
}

int main(int argc, char **argv)
{
    char data[128];
    if (argc != 3)
        errx(2, "usage: floor DIRECTORY MOUNTPOINT");
    above = open(argv[1], O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    device = open("/dev/fuse", O_RDWR | O_CLOEXEC);
    if (above < 0 || device < 0)
        err(1, "%s", above < 0 ? argv[1] : "/dev/fuse");
    snprintf(data, sizeof data, "fd=%d,rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other", device);
    if (mount("floor", argv[2], "fuse.floor", MS_NOSUID | MS_NODEV, data))
        err(1, "mount on %s", argv[2]);
    for (ssize_t size; (size = read(device, request, sizeof request)) >= 0 || errno == EINTR || errno == ENOENT;)
        if (size >= (ssize_t)sizeof(struct fuse_in_header))
            answer((struct fuse_in_header *)request);
    if (errno != ENODEV)
        err(1, "/dev/fuse");
    return 0;
}
