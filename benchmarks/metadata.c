/* The metadata load of the benchmarks: one operation on each of COUNT names, in an order that is mixed up.
 *
 *   metadata MODE DIRECTORY COUNT
 *
 * MODE: create (and write 4 KiB), stat, list (readdir, and stat each), openread (4 KiB), rename, unlink, mkdir, rmdir.
 * Prints the seconds it took. Ends with 1 and a message on any error.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <err.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static char block[4096];

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static void one(const char *mode, const char *name, const char *other)
{
    struct stat found;
    int fd;
    if (!strcmp(mode, "stat")) {
        if (lstat(name, &found))
            err(1, "stat %s", name);
    } else if (!strcmp(mode, "create")) {
        if ((fd = open(name, O_WRONLY | O_CREAT | O_EXCL, 0644)) < 0 || write(fd, block, sizeof block) != sizeof block)
            err(1, "create %s", name);
        close(fd);
    } else if (!strcmp(mode, "openread")) {
        if ((fd = open(name, O_RDONLY)) < 0 || read(fd, block, sizeof block) != sizeof block)
            err(1, "read %s", name);
        close(fd);
    } else if (!strcmp(mode, "rename")) {
        if (rename(name, other))
            err(1, "rename %s", name);
    } else if (!strcmp(mode, "unlink")) {
        if (unlink(other))
            err(1, "unlink %s", other);
    } else if (!strcmp(mode, "mkdir")) {
        if (mkdir(name, 0755))
            err(1, "mkdir %s", name);
    } else if (!strcmp(mode, "rmdir")) {
        if (rmdir(name))
            err(1, "rmdir %s", name);
    } else {
        errx(2, "no such mode: %s", mode);
    }
}

static long list(void)
{
    struct dirent *entry;
    struct stat found;
    long count = 0;
    DIR *directory = opendir(".");
    if (!directory)
        err(1, "opendir");
    while ((entry = readdir(directory)))
        if (entry->d_name[0] != '.') {
            if (fstatat(dirfd(directory), entry->d_name, &found, AT_SYMLINK_NOFOLLOW))
                err(1, "stat %s", entry->d_name);
            count++;
        }
    closedir(directory);
    return count;
}

int main(int argc, char **argv)
{
    if (argc != 4)
        errx(2, "usage: metadata MODE DIRECTORY COUNT");
    long count = atol(argv[3]);
    long *order = malloc(sizeof *order * count);
    char name[32], other[32];
    uint64_t state = 88172645463325252ULL;
    if (chdir(argv[2]) || !order)
        err(1, "%s", argv[2]);
    for (long i = 0; i < count; i++)
        order[i] = i;
    for (long i = count - 1; i > 0; i--) { /* xorshift64: the same order in every run */
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        long j = state % (i + 1), kept = order[i];
        order[i] = order[j];
        order[j] = kept;
    }
    double began = now();
    if (!strcmp(argv[1], "list")) {
        if (list() != count)
            errx(1, "other than %ld names", count);
    } else {
        for (long i = 0; i < count; i++) {
            snprintf(name, sizeof name, "file%ld", order[i]);
            snprintf(other, sizeof other, "moved%ld", order[i]);
            one(argv[1], name, other);
        }
    }
    printf("%.6f\n", now() - began);
    return 0;
}
