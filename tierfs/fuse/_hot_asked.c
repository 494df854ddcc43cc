/* Who has been told of a node's attributes, so that a change need not always be followed by a word to the kernel that
 * what it was told before is out of date.
 *
 * What a thread was told it has taken in when it asks again: of its requests the kernel takes one after another. So
 * where all that may still be on its way has gone to the one who now changes the node, nothing is. A slot is about one
 * node; one that is not in its slot may have been told to anybody.
 */
#include "_hot.h"

#include <string.h>

static struct asked *slot_for(Hot *hot, uint64_t nodeid)
{
    return &hot->asked[nodeid % ASKED];
}

void told_to(Hot *hot, uint64_t nodeid, uint32_t thread)
{
    struct asked *slot = slot_for(hot, nodeid);
    if (slot->nodeid == nodeid && slot->thread != thread)
        slot->nodeid = 0;
}

int has_taken_in(Hot *hot, uint64_t nodeid, uint32_t thread)
{
    struct asked *slot = slot_for(hot, nodeid);
    if (slot->nodeid == nodeid && slot->thread == thread)
        return 1;
    /* Whose threads are of a process that this namespace does not have all have number 0. */
    if (thread)
        *slot = (struct asked){nodeid, thread};
    return 0;
}

void anybody_told(Hot *hot)
{
    memset(hot->asked, 0, sizeof hot->asked);
}
