/* The load of the benchmarks, in C: the interpreter's own time would hide that of the filesystem.
 *
 *   load MODE PATH BYTES COUNT
 *
 * Prints the seconds that COUNT operations took; for `stat` the median and the 99th percentile in microseconds,
 * PATH then being a directory of files named 0 … BYTES - 1; stat+N pauses for N microseconds before each. Ends with 1 and a message on any error.
 */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, LARGE = 1 << 20 };

static uint64_t state = 88172645463325252ULL;
static volatile unsigned char sink;

/* xorshift64: the same places in every run */
static uint64_t draw(void)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static void all(ssize_t done, size_t wanted, const char *what)
{
    if (done < 0)
        err(1, "%s", what);
    if ((size_t)done != wanted)
        errx(1, "%s: %zd of %zu bytes", what, done, wanted);
}

static double transfer(const char *mode, const char *path, size_t bytes, long count)
{
    int writing = strstr(mode, "write") != NULL, random = strstr(mode, "random") != NULL;
    size_t unit = strstr(mode, "4k") ? PAGE : LARGE, units = bytes / unit;
    char *buffer = aligned_alloc(PAGE, unit);
    int fd = open(path, writing ? O_RDWR | O_CREAT : O_RDONLY, 0644);
    if (fd < 0 || !buffer)
        err(1, "%s", path);
    memset(buffer, 'x', unit);
    double began = now();
    for (long i = 0; i < count; i++) {
        off_t at = (off_t)((random ? draw() % units : (size_t)i % units) * unit);
        if (writing)
            all(pwrite(fd, buffer, unit, at), unit, "write");
        else
            all(pread(fd, buffer, unit, at), unit, "read");
    }
    double took = now() - began;
    close(fd);
    return took;
}

static double mapped(const char *mode, const char *path, size_t bytes, long count)
{
    int writing = strstr(mode, "write") != NULL;
    int fd = open(path, O_RDWR);
    if (fd < 0)
        err(1, "%s", path);
    double began = now();
    unsigned char *view = mmap(NULL, bytes, PROT_READ | (writing ? PROT_WRITE : 0), MAP_SHARED, fd, 0);
    if (view == MAP_FAILED)
        err(1, "mmap %s", path);
    for (long i = 0; i < count; i++) {
        size_t at = draw() % (bytes / PAGE) * PAGE;
        if (writing)
            view[at] = (unsigned char)i;
        else
            sink = view[at];
    }
    munmap(view, bytes);
    double took = now() - began;
    close(fd);
    return took;
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Each stat asks the server: AT_STATX_FORCE_SYNC passes the kernel's cache of attributes. */
static void stats(const char *path, size_t files, long count, long pause)
{
    const struct timespec rest = {0, pause * 1000};
    double *took = malloc(sizeof *took * count);
    int directory = open(path, O_RDONLY | O_DIRECTORY);
    struct statx found;
    char name[32];
    if (directory < 0 || !took)
        err(1, "%s", path);
    for (long i = 0; i < count; i++) {
        snprintf(name, sizeof name, "%zu", (size_t)(draw() % files));
        if (pause)
            nanosleep(&rest, NULL);
        double began = now();
        if (statx(directory, name, AT_STATX_FORCE_SYNC, STATX_BASIC_STATS, &found))
            err(1, "stat %s", name);
        took[i] = now() - began;
    }
    qsort(took, count, sizeof *took, compare);
    printf("%.2f %.2f\n", took[count / 2] * 1e6, took[count * 99 / 100] * 1e6);
    free(took);
}

int main(int argc, char **argv)
{
    if (argc != 5)
        errx(2, "usage: load MODE PATH BYTES COUNT");
    size_t bytes = strtoull(argv[3], NULL, 10);
    long count = atol(argv[4]);
    if (!strncmp(argv[1], "stat", 4))
        stats(argv[2], bytes, count, argv[1][4] ? atol(argv[1] + 5) : 0);
    else if (!strncmp(argv[1], "mmap", 4))
        printf("%.6f\n", mapped(argv[1], argv[2], bytes, count));
    else
        printf("%.6f\n", transfer(argv[1], argv[2], bytes, count));
    return 0;
}
