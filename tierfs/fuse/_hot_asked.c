/* Who has been told of a node's attributes, so that a change need not always be followed by a word to the kernel that
 * what it was told before is out of date.
 *
 * What a thread was told it has taken in when it asks again. The kernel's thread that waits for an answer is the one
 * that asked; once we have read its request nothing ends that wait but the answer (request_wait_answer), and it puts the
 * attributes in their place before it returns. So where all that may still be on its way has gone to threads that have
 * asked since, or to the one who now changes the node, nothing is.
 *
 * A slot is about one node: the one thread that may have yet to take in what it was told of it, and by which request.
 * A node that is not in its slot may have been told to anybody; so may all of an epoch that is over.
 */
#include "_hot.h"

#include <linux/fuse.h>
#include <string.h>

/* Requests for whose answer the thread waits that they name. Not those in the background (what reads ahead, what
 * closes), which come when there is room for them and perhaps after later ones; nor what is asked while an answer is
 * being taken in: attributes for a security module, pages of the memory into which a directory is listed. */
static int is_waited_for(uint32_t opcode)
{
    switch (opcode) {
    case FUSE_LOOKUP: case FUSE_GETATTR: case FUSE_SETATTR: case FUSE_SYMLINK: case FUSE_MKDIR: case FUSE_UNLINK:
    case FUSE_RMDIR: case FUSE_RENAME: case FUSE_RENAME2: case FUSE_LINK: case FUSE_OPEN: case FUSE_CREATE:
        return 1;
    default:
        return 0;
    }
}

void asks(Hot *hot, const struct in_header *in)
{
    hot->requests++;
    hot->entered = 0;
    /* What is sent again was asked before. Threads of a process that this namespace does not have have number 0. */
    if (in->pid && is_waited_for(in->opcode) && !(in->unique & RESENT))
        hot->threads[in->pid % THREADS] = (struct thread){hot->requests, in->pid};
}

static struct asked *slot_for(Hot *hot, uint64_t nodeid)
{
    return &hot->asked[nodeid % ASKED];
}

/* All that may be on its way of this node has been taken in, or has gone to this thread. */
static int is_settled(Hot *hot, const struct asked *slot, uint64_t nodeid, uint32_t thread)
{
    if (!thread || slot->nodeid != nodeid || slot->epoch != hot->epoch)
        return 0;
    const struct thread *other = &hot->threads[slot->thread % THREADS];
    return slot->thread == thread || (other->number == slot->thread && other->last > slot->told);
}

static void claim(Hot *hot, struct asked *slot, uint64_t nodeid, uint32_t thread)
{
    *slot = (struct asked){nodeid, hot->requests, thread, hot->epoch};
}

void told_to(Hot *hot, uint64_t nodeid, uint32_t thread)
{
    struct asked *slot = slot_for(hot, nodeid);
    int is_new = nodeid == hot->entered; /* nobody can have been told of a number that there was not */
    if (thread && (is_new || is_settled(hot, slot, nodeid, thread)))
        claim(hot, slot, nodeid, thread);
    else if (slot->nodeid == nodeid)
        slot->nodeid = 0;
    hot->entered = 0;
}

int has_taken_in(Hot *hot, uint64_t nodeid, uint32_t thread)
{
    struct asked *slot = slot_for(hot, nodeid);
    int settled = is_settled(hot, slot, nodeid, thread);
    if (thread)
        claim(hot, slot, nodeid, thread);
    return settled;
}

void anybody_told(Hot *hot)
{
    if (++hot->epoch)
        return;
    memset(hot->asked, 0, sizeof hot->asked); /* of epochs that are counted anew now */
    hot->epoch = 1;
}
