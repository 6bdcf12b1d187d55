/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "lib/server.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "lib/uffd.h"
#include "lib/util.h"

/* ---- contexts ---- */

struct new_context {
    int fd, maps_fd;
    pid_t pid;
    bool opened; /**< here, for this process */
};

static int add_context(struct memferry_server *s, void *argument)
{
    const struct new_context *made = argument;
    if (s->own_contexts == MEMFERRY_CONTEXTS_MAX)
        return server_fail(ENOSPC, "a server has at most %u contexts", MEMFERRY_CONTEXTS_MAX);
    mf_gate_close(&s->gate);
    int context = mf_contexts_add(&s->contexts, made->fd, made->maps_fd, false);
    mf_gate_open(&s->gate);
    if (context < 0)
        return server_fail(-context, "no room for another context: %s", strerror(-context));
    s->own_contexts++;
    s->opened += made->opened;
    struct mf_context *at = mf_context_at(&s->contexts, (uint32_t)context);
    at->pid = made->pid;
    /* A child's has none: descriptors are what forks run out of. */
    at->info_fd = mf_uffd_open_info(made->fd);
    int r = server_watch(s, (uint32_t)context, true);
    if (r < 0) {
        mf_gate_close(&s->gate);
        mf_contexts_drop(&s->contexts, (uint32_t)context);
        mf_gate_open(&s->gate);
        s->own_contexts--;
        s->opened -= made->opened;
        /* Its descriptors are closed: not ENOSPC and its like, after which they are the caller's.
         */
        return server_fail(EIO, "cannot wait for a userfaultfd: %s", strerror(-r));
    }
    return context;
}

/* Hand over two descriptors; they are gone in any case. */
static int give_context(struct memferry_server *s, int *fd, int *maps_fd, pid_t pid, bool opened)
{
    struct new_context made = {*fd, *maps_fd, pid, opened};
    int r = server_do(s, add_context, &made);
    if (r >= 0 || r == -EIO) {
        mf_steal_fd(fd);
        mf_steal_fd(maps_fd);
    }
    return r;
}

/* Features: what every server needs; what it uses where the kernel has it. */
static int handshake(const struct memferry_server *s, int fd)
{
    struct mf_error err;
    uint64_t required = MF_UFFD_FEATURES;
    if (s->options.flags & MEMFERRY_FOLLOW_FORKS)
        required |= UFFD_FEATURE_EVENT_FORK;
    int r = mf_uffd_api(fd, required, MF_UFFD_FEATURES_WANTED | UFFD_FEATURE_POISON, NULL, &err);
    return r < 0 ? server_pass(&err) : 0;
}

int memferry_context_open(struct memferry_server *s)
{
    const bool user = s->options.flags & MEMFERRY_USER_FAULTS;
    cleanup_close int fd = user ? mf_uffd_open_user() : mf_uffd_open();
    if (fd < 0)
        return server_fail(-fd,
                           "cannot make a userfaultfd: %s; it needs CAP_SYS_PTRACE, the sysctl "
                           "vm.unprivileged_userfaultfd=1 or the right to open /dev/userfaultfd, "
                           "or MEMFERRY_USER_FAULTS",
                           strerror(-fd));
    int r = handshake(s, fd);
    cleanup_close int maps_fd = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
    if (r == 0 && maps_fd < 0)
        r = server_fail(errno, "cannot open /proc/self/maps: %s", strerror(errno));
    return r < 0 ? r : give_context(s, &fd, &maps_fd, getpid(), true);
}

/* What was asked for at somebody else's handshake: "API:" (fs/userfaultfd.c).
 * Without these events a mapping that goes or moves would be filled where it no longer is. */
static int check_features(int fd)
{
    static const uint64_t needed =
        UFFD_FEATURE_EVENT_UNMAP | UFFD_FEATURE_EVENT_REMAP | UFFD_FEATURE_EVENT_REMOVE;
    char text[512] = "";
    unsigned long long features;
    cleanup_close int info_fd = mf_uffd_open_info(fd);
    ssize_t length = info_fd < 0 ? -1 : read(info_fd, text, sizeof(text) - 1);
    const char *at = length > 0 ? strstr(text, "API:") : NULL;
    if (!at || sscanf(at, "API: %*x:%llx", &features) != 1)
        return 0; /* without /proc it has to be believed */
    const uint64_t missing = needed & ~(uint64_t)features;
    return missing == 0
               ? 0
               : server_fail(EINVAL,
                             "the userfaultfd's handshake was done without the feature "
                             "UFFD_FEATURE_%s, without which its mappings can't be followed",
                             mf_uffd_feature_name(missing & (~missing + 1), NULL));
}

int memferry_context_adopt(struct memferry_server *s, int uffd, pid_t pid)
{
    cleanup_close int fd = fcntl(uffd, F_DUPFD_CLOEXEC, 0);
    if (fd < 0)
        return server_fail(errno, "cannot adopt descriptor %d: %s", uffd, strerror(errno));
    int flags = fcntl(fd, F_GETFL);
    if (flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) != 0)
        return server_fail(errno, "cannot make descriptor %d non-blocking: %s", uffd,
                           strerror(errno));
    /* The handshake can be done once only, so EINVAL says that somebody has; and on what is no
     * userfaultfd it is ENOTTY. */
    int r = handshake(s, fd);
    struct uffdio_range nothing = {0};
    if (r == -EINVAL && ioctl(fd, UFFDIO_WAKE, &nothing) != 0 && errno == EINVAL)
        r = check_features(fd);
    if (r == -ENOTTY)
        return server_fail(EINVAL, "descriptor %d is no userfaultfd", uffd);
    cleanup_close int maps_fd = -1;
    if (r >= 0 && pid > 0) {
        char path[32];
        snprintf(path, sizeof(path), "/proc/%d/maps", pid);
        maps_fd = open(path, O_RDONLY | O_CLOEXEC);
        if (maps_fd < 0)
            return server_fail(errno, "cannot open %s: %s", path, strerror(errno));
    }
    return r < 0 ? r : give_context(s, &fd, &maps_fd, pid, false);
}

/* ---- regions ---- */

static int check_file(const struct memferry_region *from, struct mf_region *region)
{
    struct statfs fs;
    struct stat st;
    if (fstatfs(from->fd, &fs) != 0 || fstat(from->fd, &st) != 0)
        return server_fail(errno, "cannot look at the region's file: %s", strerror(errno));
    const bool huge = from->memory == MEMFERRY_HUGETLB;
    if ((uint64_t)fs.f_type != (huge ? HUGETLBFS_MAGIC : TMPFS_MAGIC))
        return server_fail(EINVAL, "the region's file does not lie on %s",
                           huge ? "hugetlbfs" : "tmpfs");
    const uint32_t file_page_bytes = huge ? (uint32_t)fs.f_bsize : (uint32_t)sysconf(_SC_PAGESIZE);
    if (region->page_bytes && region->page_bytes != file_page_bytes)
        return server_fail(EINVAL, "the region's file has pages of %u bytes, not %u",
                           file_page_bytes, region->page_bytes);
    region->page_bytes = file_page_bytes;
    if (from->length_bytes > (uint64_t)st.st_size)
        return server_fail(EINVAL, "the region's file has %llu bytes, fewer than %llu",
                           (unsigned long long)st.st_size, (unsigned long long)from->length_bytes);
    region->device = st.st_dev;
    region->inode = st.st_ino;
    return 0;
}

static int map_states(struct memferry_server *s, const struct memferry_region *from, uint32_t index)
{
    const uint64_t pages = s->region[index].pages;
    const uint64_t bytes = (pages + 4095) & ~UINT64_C(4095);
    if (from->states_in_file) {
        struct stat st;
        if (fstat(from->states_fd, &st) != 0)
            return server_fail(errno, "cannot look at the file of the page states: %s",
                               strerror(errno));
        if ((uint64_t)st.st_size < from->states_offset_bytes ||
            (uint64_t)st.st_size - from->states_offset_bytes < pages)
            return server_fail(
                EINVAL, "the file of the page states is too short: %llu bytes at %llu",
                (unsigned long long)pages, (unsigned long long)from->states_offset_bytes);
    }
    void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
                    from->states_in_file ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS,
                    from->states_in_file ? from->states_fd : -1,
                    from->states_in_file ? (off_t)from->states_offset_bytes : 0);
    if (at == MAP_FAILED)
        return server_fail(errno, "cannot map the page states: %s", strerror(errno));
    s->pages[index] = (struct mf_pages){.state = at, .count = pages};
    s->state_bytes[index] = bytes;
    return 0;
}

/* Room for what a provider is offered at once. */
static int make_scratch(struct memferry_server *s, uint32_t page_bytes)
{
    const uint64_t around = s->options.around_pages > 1 ? s->options.around_pages : 1;
    uint64_t bytes = around * page_bytes;
    if (page_bytes > 65536)
        bytes = page_bytes;
    if (bytes <= s->scratch_bytes)
        return 0;
    void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE,
                    -1, 0);
    if (at == MAP_FAILED)
        return server_fail(ENOMEM, "out of memory for a provider's pages");
    if (s->scratch)
        munmap(s->scratch, s->scratch_bytes);
    s->scratch = at;
    s->scratch_bytes = bytes;
    return 0;
}

static void punch(void *argument, uint64_t page)
{
    const struct mf_region *region = argument;
    if (region->fd >= 0)
        fallocate(region->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                  (off_t)(page * region->page_bytes), region->page_bytes);
}

static void drop_region(struct memferry_server *s, uint32_t index)
{
    struct mf_region *region = &s->region[index];
    if (s->pages[index].state)
        munmap((void *)s->pages[index].state, s->state_bytes[index]);
    if (region->map)
        munmap(region->map, region->size_bytes);
    mf_close_p(&region->fd);
    *region = (struct mf_region){.fd = -1};
    s->pages[index] = (struct mf_pages){0};
}

static int fill_in_region(struct memferry_server *s, const struct memferry_region *from,
                          uint32_t index)
{
    struct mf_region *region = &s->region[index];
    const bool anonymous = from->memory == MEMFERRY_ANONYMOUS;
    *region = (struct mf_region){.fd = -1, .page_bytes = from->page_bytes};
    region->kind = anonymous                          ? MF_MEMORY_PRIVATE
                   : from->memory == MEMFERRY_HUGETLB ? MF_MEMORY_HUGETLB
                                                      : MF_MEMORY_TMPFS;
    if (from->memory < MEMFERRY_SHMEM || from->memory > MEMFERRY_ANONYMOUS)
        return server_fail(EINVAL, "a region is of an unknown kind of memory (%u)", from->memory);
    int r = anonymous ? 0 : check_file(from, region);
    if (r < 0)
        return r;
    if (!region->page_bytes)
        region->page_bytes = (uint32_t)sysconf(_SC_PAGESIZE);
    if (anonymous && region->page_bytes != (uint32_t)sysconf(_SC_PAGESIZE))
        return server_fail(EINVAL, "anonymous memory has pages of %ld bytes, not %u",
                           sysconf(_SC_PAGESIZE), region->page_bytes);
    if (from->length_bytes == 0 || from->length_bytes % region->page_bytes != 0)
        return server_fail(EINVAL,
                           "a region's length (%llu) is not a multiple of its page size (%u)",
                           (unsigned long long)from->length_bytes, region->page_bytes);
    region->size_bytes = from->length_bytes;
    region->pages = from->length_bytes / region->page_bytes;
    snprintf(region->name, sizeof(region->name), "region %u", index);
    if (!anonymous) {
        region->fd = fcntl(from->fd, F_DUPFD_CLOEXEC, 0);
        if (region->fd < 0)
            return server_fail(errno, "cannot duplicate the region's file: %s", strerror(errno));
        void *at =
            mmap(NULL, region->size_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, region->fd, 0);
        if (at == MAP_FAILED)
            return server_fail(errno,
                               "cannot map the region's file a second time: %s; it must be open "
                               "for reading and writing",
                               strerror(errno));
        region->map = at;
    }
    r = map_states(s, from, index);
    return r < 0 ? r : make_scratch(s, region->page_bytes);
}

static int add_region(struct memferry_server *s, void *argument)
{
    const struct memferry_region *from = argument;
    const uint32_t index = atomic_load(&s->region_count);
    if (s->asking) /* the room for what it gives may have to move */
        return server_fail(EDEADLK, "a provider that is being asked for pages can't add a region");
    if (index == MEMFERRY_REGIONS_MAX)
        return server_fail(ENOSPC, "a server has at most %u regions", MEMFERRY_REGIONS_MAX);
    int r = fill_in_region(s, from, index);
    if (r < 0) {
        drop_region(s, index);
        return r;
    }
    uint64_t missing = s->region[index].pages;
    if (from->flags & MEMFERRY_REGION_TAKE_OVER)
        missing = mf_page_restart(&s->pages[index], punch, &s->region[index]);
    else if (from->states_in_file)
        memset((void *)s->pages[index].state, 0, s->region[index].pages);
    atomic_fetch_add(&s->missing_pages, missing);
    atomic_store(&s->region_count, index + 1);
    s->events.region_count = index + 1;
    _Static_assert(MEMFERRY_REGIONS_MAX <= 64, "a bit for each");
    if (s->region[index].kind == MF_MEMORY_PRIVATE) /* can't be found again by looking */
        s->layout.keep |= UINT64_C(1) << index;
    if (s->region[index].kind != MF_MEMORY_PRIVATE &&
        !(s->options.flags & MEMFERRY_REMOVE_DISCARDS)) {
        s->events_ops.observe = server_observe;
        s->events_ops.removed = server_removed;
    }
    return (int)index;
}

int memferry_region_add(struct memferry_server *s, const struct memferry_region *region)
{
    struct memferry_region from = {0};
    int r = server_take(&from, sizeof(from), region, "struct memferry_region");
    if (r == 0)
        r = server_check_flags(from.flags, MEMFERRY_REGION_TAKE_OVER, "region");
    return r < 0 ? r : server_do(s, add_region, &from);
}

/* ---- mappings ---- */

/* What there was no room for: it is learned again when it is touched. */
static void wake_dropped(const struct memferry_server *s, const struct mf_range *dropped,
                         unsigned count)
{
    for (unsigned i = 0; i < count; i++)
        mf_uffd_wake(mf_context_uffd(&s->contexts, dropped[i].context), dropped[i].start_addr,
                     dropped[i].length_bytes);
}

/* MISSING alone for memory without a file; of MINOR it has none. The gate is closed. */
static int watch(struct memferry_server *s, const struct memferry_mapping *m, int uffd)
{
    struct mf_error err;
    if (m->flags & MEMFERRY_MAPPING_REGISTERED)
        return 0;
    int r;
    if (s->region[m->region].kind == MF_MEMORY_PRIVATE)
        r = mf_uffd_register_private(uffd, m->start_addr, m->length_bytes, &err);
    else
        r = mf_uffd_register(uffd, m->start_addr, m->length_bytes, &err);
    return r < 0 ? server_pass(&err) : 0;
}

/* A file's mappings are learned as they are met, so a part of this may be known already. */
static bool agrees(const struct memferry_server *s, const struct memferry_mapping *m)
{
    struct mf_mapping there;
    const uint64_t end = m->start_addr + m->length_bytes;
    for (uint64_t at = m->start_addr;
         mf_layout_from(&s->layout, m->context, at, &there) && there.start_addr < end;
         at = there.start_addr + there.length_bytes)
        if (s->region[m->region].kind == MF_MEMORY_PRIVATE || there.region != m->region ||
            there.start_addr - there.offset_bytes != m->start_addr - m->offset_bytes)
            return false;
    return true;
}

/* Is all of it served by another context of the same address space? Where two watch one, either may
 * have registered it, as it lay beside something that was moved. */
static bool served_by_another(struct memferry_server *s, const struct memferry_mapping *m)
{
    const struct mf_context *of = mf_context_at(&s->contexts, m->context);
    const uint64_t end = m->start_addr + m->length_bytes;
    for (uint32_t i = 0; i < s->contexts.count; i++) {
        const struct mf_context *other = mf_context_at(&s->contexts, i);
        struct memferry_mapping there = *m;
        there.context = i;
        if (i != m->context && other && other->pid == of->pid &&
            mf_events_learn(&s->events, i, m->start_addr, end) == 0 && agrees(s, &there) &&
            mf_layout_covers(&s->layout, i, m->start_addr, end))
            return true;
    }
    return false;
}

static int add_mapping(struct memferry_server *s, void *argument)
{
    const struct memferry_mapping *m = argument;
    const int uffd = mf_context_uffd(&s->contexts, m->context);
    if (uffd < 0 || m->region >= atomic_load(&s->region_count))
        return server_fail(EINVAL, "a mapping names context %u or region %u, which there is not",
                           m->context, m->region);
    const struct mf_region *region = &s->region[m->region];
    const uint64_t mask = region->page_bytes - 1;
    if (m->length_bytes == 0 || ((m->start_addr | m->length_bytes | m->offset_bytes) & mask) ||
        m->offset_bytes > region->size_bytes ||
        m->length_bytes > region->size_bytes - m->offset_bytes)
        return server_fail(EINVAL,
                           "a mapping of %llu bytes at %#llx does not fit its region's pages of %u "
                           "bytes or its end",
                           (unsigned long long)m->length_bytes, (unsigned long long)m->start_addr,
                           region->page_bytes);
    struct mf_range dropped[2];
    unsigned count = 0;
    int r = 0;
    for (unsigned tries = 0;; tries++) {
        mf_gate_close(&s->gate);
        /* Another thread may have unmapped what was there before this was mapped, and its event may
         * come only now: it must not take this out. */
        if (mf_uffd_event_pending(uffd) == 0)
            break;
        mf_gate_open(&s->gate);
        if (mf_context_fill_uffd(&s->contexts, m->context) < 0)
            return server_fail(EAGAIN, "a fork of that process waits for a free descriptor");
        mf_resolve_wait(&s->lander.resolver, m->context, tries);
    }
    if (!agrees(s, m))
        r = server_fail(EINVAL, "a mapping at %#llx overlaps one that is served already",
                        (unsigned long long)m->start_addr);
    else
        r = watch(s, m, uffd);
    if (r == 0)
        count = mf_layout_learn(&s->layout,
                                &(struct mf_mapping){.start_addr = m->start_addr,
                                                     .length_bytes = m->length_bytes,
                                                     .offset_bytes = m->offset_bytes,
                                                     .region = m->region,
                                                     .context = m->context},
                                dropped);
    mf_gate_open(&s->gate);
    wake_dropped(s, dropped, count);
    if (r == -EBUSY && served_by_another(s, m))
        return 0;
    if (r == 0 && (m->flags & MEMFERRY_MAPPING_REGISTERED))
        mf_uffd_wake(uffd, m->start_addr, m->length_bytes);
    return r;
}

int memferry_mapping_add(struct memferry_server *s, const struct memferry_mapping *mapping)
{
    struct memferry_mapping from = {0};
    int r = server_take(&from, sizeof(from), mapping, "struct memferry_mapping");
    if (r == 0)
        r = server_check_flags(from.flags, MEMFERRY_MAPPING_REGISTERED, "mapping");
    return r < 0 ? r : server_do(s, add_mapping, &from);
}

struct range {
    uint32_t context;
    uint64_t start_addr, length_bytes;
};

/* Are both ends of a range those of pages, of whatever is mapped there? */
static bool ends_between_pages(const struct memferry_server *s, uint32_t context, uint64_t start,
                               uint64_t end)
{
    const uint64_t ends[] = {start, end};
    for (unsigned i = 0; i < 2; i++) {
        struct mf_mapping m;
        if (mf_layout_find(&s->layout, context, ends[i], &m) && m.region != MF_REGION_ZEROS &&
            ends[i] % s->region[m.region].page_bytes)
            return false;
    }
    return (start | end) % 4096 == 0;
}

/* Only what is known to be mapped, for the rest of the range may be watched by somebody else. */
static int remove_mapping(struct memferry_server *s, void *argument)
{
    const struct range *range = argument;
    const uint64_t end = range->start_addr + range->length_bytes;
    const struct mf_context *context = mf_context_at(&s->contexts, range->context);
    if (!context)
        return server_fail(EINVAL, "there is no context %u", range->context);
    if (end <= range->start_addr || !ends_between_pages(s, range->context, range->start_addr, end))
        return server_fail(EINVAL, "[%#llx, +%#llx) is not a range of pages",
                           (unsigned long long)range->start_addr,
                           (unsigned long long)range->length_bytes);
    int r = 0;
    struct mf_mapping m;
    struct mf_range dropped[1];
    mf_events_learn(&s->events, range->context, range->start_addr, end);
    for (uint64_t at = range->start_addr;
         mf_layout_from(&s->layout, range->context, at, &m) && m.start_addr < end;) {
        const uint64_t from = m.start_addr > at ? m.start_addr : at;
        at = m.start_addr + m.length_bytes < end ? m.start_addr + m.length_bytes : end;
        mf_gate_close(&s->gate);
        unsigned count = mf_layout_unmap(&s->layout, range->context, from, at, dropped);
        mf_gate_open(&s->gate);
        wake_dropped(s, dropped, count);
        int error = mf_uffd_unregister(context->uffd, from, at - from);
        r = error < 0 ? error : r;
    }
    mf_events_forget_faults(&s->events, range->context, range->start_addr, end);
    return r < 0 ? server_fail(-r, "cannot unregister memory at %#llx: %s",
                               (unsigned long long)range->start_addr, strerror(-r))
                 : 0;
}

int memferry_mapping_remove(struct memferry_server *s, uint32_t context, uint64_t start_addr,
                            uint64_t length_bytes)
{
    struct range range = {context, start_addr, length_bytes};
    return server_do(s, remove_mapping, &range);
}

int memferry_mappings(const struct memferry_server *s, struct memferry_mapping *out, unsigned max)
{
    if (max > 0 && out->struct_bytes <= sizeof(out->struct_bytes))
        return server_fail(EINVAL, "there is no room for mappings: struct_bytes is not set");
    cleanup_free struct mf_mapping *all = malloc(MF_LAYOUT_MAX * sizeof(*all));
    if (!all)
        return server_fail(ENOMEM, "out of memory for a list of mappings");
    const unsigned count = mf_layout_get(&s->layout, all, MF_LAYOUT_MAX);
    char *at = (char *)out; /* by the caller's size of the struct, not ours */
    const size_t stride = max ? out->struct_bytes : 0;
    unsigned told = 0;
    for (unsigned i = 0; i < count; i++) {
        if (all[i].region == MF_REGION_ZEROS || told++ >= max)
            continue;
        struct memferry_mapping one = {
            .context = all[i].context,
            .region = all[i].region,
            .start_addr = all[i].start_addr,
            .length_bytes = all[i].length_bytes,
            .offset_bytes = all[i].offset_bytes,
        };
        one.struct_bytes = stride < sizeof(one) ? stride : sizeof(one);
        memcpy(at, &one, one.struct_bytes);
        at += stride;
    }
    return (int)told;
}
