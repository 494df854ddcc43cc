/* Who runs when a reply wakes its asker on the server's processor. Displaced by it at once, the server finds the next
 * request when it runs again: neither of them has slept, and nobody had to be woken. Left running, it finds none, and
 * sleeps. A thread is displaced by what wakes with a shorter time slice than its own (Linux 6.12: sched(7), a custom
 * slice, which older kernels take without a word); how soon it runs itself among others that compute is as it was.
 */
#include "_hot.h"

#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

/* struct sched_attr of linux/sched/types.h, in its first form, which some headers have twice. */
struct attributes {
    uint32_t size, policy;
    uint64_t flags;
    int32_t nice;
    uint32_t priority;
    uint64_t runtime, deadline, period;
};

/* Of a thread, 0: the calling one; 0 nanoseconds: the kernel's default again. */
PyObject *hot_time_slice(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    int thread;
    unsigned long long nanoseconds;
    struct attributes now;
    if (!PyArg_ParseTuple(arguments, "iK", &thread, &nanoseconds))
        return NULL;
    if (syscall(SYS_sched_getattr, thread, &now, sizeof now, 0))
        return PyErr_SetFromErrno(PyExc_OSError);
    if (now.policy != SCHED_OTHER)
        Py_RETURN_NONE; /* somebody has chosen how it is to run */
    now.runtime = nanoseconds;
    if (syscall(SYS_sched_setattr, thread, &now, 0))
        return PyErr_SetFromErrno(PyExc_OSError);
    Py_RETURN_NONE;
}
