/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * libmemferry: serve the page faults of a process, your own or another one, from wherever its
 * memory is: a snapshot file, a peer on the network, a table in your program. See libmemferry(3).
 *
 * A *server* watches address ranges through userfaultfd(2). A thread that touches a page there
 * that has not been filled waits; the server asks a *provider* for the page and lets the thread go
 * on. Meanwhile any thread may fill pages that nobody has asked for yet. Every page is filled once.
 *
 * - A *region* is one object that holds memory: a file on tmpfs (or memfd), a file on hugetlbfs, or
 *   private anonymous memory, which has no file. A *page* is (region, index).
 * - A *context* is one userfaultfd, and so the address space that it was made in.
 * - A *mapping* is an address range of a context that shows a part of a region. A region of a file
 *   may have many, in many contexts. Mappings follow munmap(2), mremap(2) and fork(2) by themselves
 *   once they were added.
 * - A *state* is a byte a page: missing, being filled, here, or discarded.
 *
 * How a page gets where it is wanted depends on the kind of memory: bytes are written to the file
 * and mapped with UFFDIO_CONTINUE, or copied with UFFDIO_COPY where there is no file. Zeros are not
 * written; holes stay holes.
 *
 * Conventions, for every function below unless it says otherwise:
 *  - Lengths and offsets whose names end in _bytes are bytes, _pages and "pages" are pages of the
 *    region in question, _addr are addresses in the context's address space (which need not be the
 *    caller's), _ns are nanoseconds of CLOCK_MONOTONIC.
 *  - Functions that return int return 0 or a positive result, or a negative errno value. After a
 *    failure memferry_why() has a sentence for a person.
 *  - Structs that are given to the library begin with struct_bytes: set it to their sizeof, and all
 *    that you don't use to 0. A library that is newer than your program takes what it does not find
 *    as 0; one that is older refuses what it does not know, unless it is 0, with -E2BIG. A struct
 *    without struct_bytes, and flags that are not known, are -EINVAL.
 *  - Any thread may call any function at any time, except where "before start" is said. Functions
 *    take descriptors without taking them over: they keep duplicates of their own.
 *  - Regions, contexts and mappings are added and removed on the thread that serves: while one
 *    does, the call waits until that has a moment.
 *  - Whoever serves (memferry_server_start() or _run()) must not touch served memory, change its
 *    mappings or discard it (munmap(2), mremap(2), madvise(2)), fork(2) where forks are followed,
 *    nor wait for a thread that does: nobody would serve it. That holds for callbacks too.
 *    They run on the serving thread, but for on_failure, which runs where the failure is met; and
 *    while nobody serves, a thread that fills pages or adds something does in its place what can't
 *    wait, and calls on_change.
 *  - In on_change, and in on_failure where an event of the process is the cause, the layout is
 *    changing: what fills, adds, removes or discards is -EDEADLK there, and nothing is done.
 *  - A server is its process's: in a child of fork(2) nothing may be done with it, not even
 *    memferry_server_free(). The child's memory can be served by its parent.
 *
 * Limits: MEMFERRY_REGIONS_MAX regions and MEMFERRY_CONTEXTS_MAX contexts (children of fork(2) not
 * counted) a server, 4096 mappings of all contexts together, neighbours that continue one another
 * counting as one. Beyond those a file's mappings are forgotten and found again when they are
 * touched, which costs microseconds; anonymous memory in more pieces is not served any more in
 * part: who touches that waits. A region stays until the server ends, a context until its process
 * does. Where they come and go use a server for each.
 *
 * Sources: userfaultfd(2), ioctl_userfaultfd(2), Documentation/admin-guide/mm/userfaultfd.rst;
 * what was found by trying is in doc/kernel.md.
 */
#ifndef MEMFERRY_H
#define MEMFERRY_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#ifdef __cplusplus
extern "C" {
#endif

/** memferry_version() - the library's version, such as "0.1.0". Static. */
const char *memferry_version(void);

/** memferry_why() - one sentence, without a full stop at its end, that says why the last call of
 * this thread that failed did: what, on what, why, what to do. Valid until the thread's next call;
 * "" if none has failed. */
const char *memferry_why(void);

/** struct memferry_server - opaque; from memferry_server_new() to memferry_server_free(). */
struct memferry_server;

/* ---- what the server tells ------------------------------------------------------------------ */

/** What happened to an address range. */
enum memferry_change_kind {
    MEMFERRY_UNMAP = 1,  /**< it is gone */
    MEMFERRY_REMAP = 2,  /**< it was moved to to_addr (its old place may stay: MREMAP_DONTUNMAP) */
    MEMFERRY_REMOVE = 3, /**< its contents were discarded */
    MEMFERRY_FORK = 4,   /**< the address space was copied; the copy is context new_context */
    /** The context's process has ended, or become another program by execve(2). Nothing is served
     * in it any more: its mappings are forgotten, its userfaultfd is closed, and its number may be
     * given to another context. Looked for ten times a second, as no event tells. */
    MEMFERRY_EXIT = 5,
};

/** Why. MEMFERRY_UNKNOWN is always possible: the kernel does not say, and it is told only where it
 * was seen which system call it was. A later version may know more reasons. */
enum memferry_reason {
    MEMFERRY_UNKNOWN = 0,
    MEMFERRY_BY_MUNMAP = 1,
    MEMFERRY_BY_MREMAP = 2,
    MEMFERRY_BY_MMAP_OVER = 3, /**< another mapping took its place */
    MEMFERRY_BY_DONTNEED = 4,  /**< madvise(2) MADV_DONTNEED: a file keeps the bytes */
    MEMFERRY_BY_REMOVE = 5,    /**< madvise(2) MADV_REMOVE: a hole was punched */
    MEMFERRY_BY_FORK = 6,
};

/** struct memferry_change - a change of layout. Fields may be added at the end. */
struct memferry_change {
    size_t struct_bytes; /**< as large as the library's: look before you use a later field */
    uint32_t kind;       /**< enum memferry_change_kind */
    uint32_t reason;     /**< enum memferry_reason */
    uint32_t context;
    uint32_t new_context;          /**< FORK: the child's */
    uint64_t start_addr, end_addr; /**< [start, end), as the kernel said it: may be more than was
                                      served */
    uint64_t to_addr;              /**< REMAP: where start_addr is now */
    uint64_t time_ns;              /**< when the event was read */
    int32_t tid;                   /**< the thread that did it, 0: not known */
    int32_t child_pid; /**< FORK: the child; EXIT: which child it was; 0: none, or not known */
};

/** struct memferry_failure - pages that a provider or the kernel could not give. */
struct memferry_failure {
    size_t struct_bytes;
    uint32_t region;
    int32_t error; /**< a negative errno: of the provider, or of landing the bytes (-ENOSPC, ...) */
    uint64_t first_page, pages;
};

/** What is to be done about it. */
enum memferry_remedy {
    MEMFERRY_AGAIN = 0, /**< let who waits fault again in a tenth of a second: the provider is
                           asked again */
    MEMFERRY_HOLD = 1,  /**< let them wait, until somebody fills the pages */
    /** Let them die: SIGBUS for whoever touches one of the pages, until it is filled (Linux 6.6; on
     * older kernels as HOLD). Only who waits already is promised the signal: where the page was not
     * mapped yet, or was taken out by MADV_DONTNEED, whoever touches it waits, and the provider is
     * asked again. MADV_REMOVE of such a page does not help those who have it mapped;
     * memferry_discard() does. */
    MEMFERRY_POISON = 2,
};

/** struct memferry_server_options - for memferry_server_new(). */
struct memferry_server_options {
    size_t struct_bytes;
    void *arg; /**< for the callbacks */
    /** on_change: called after a change was applied to the mappings. The thread that made the
     * change may or may not have gone on already. */
    void (*on_change)(void *arg, const struct memferry_change *change);
    /** on_failure: called on the thread on which it failed. Return: enum memferry_remedy. Without
     * it: MEMFERRY_AGAIN. */
    int (*on_failure)(void *arg, const struct memferry_failure *failure);
    /** around_pages: offer a provider that many pages from a faulting one on; 0 means 1. */
    uint32_t around_pages;
    /** spin_us: after a fault look for the next one for so long before going to sleep. It saves
     * wake-ups (half of a fault's time) and costs a processor. */
    uint32_t spin_us;
    uint32_t flags; /**< MEMFERRY_FOLLOW_FORKS, MEMFERRY_REMOVE_DISCARDS, MEMFERRY_USER_FAULTS */
};

/** Children of fork(2) are served as well. Needs CAP_SYS_PTRACE, and the child waits for the server
 * while it is being made. Without it a child finds zeros where its parent would have waited.
 * Where the serving process serves itself, no callback may allocate memory, use stdio or take any
 * other lock that fork(2) holds (pthread_atfork(3)): the fork waits for the server.
 * Limit: where several threads fork at once a child's process may stay unknown until it first waits
 * for a page. What such a child takes out of a file by MADV_REMOVE before that is not noticed, and
 * pages of it that were missing are filled later. */
#define MEMFERRY_FOLLOW_FORKS 0x1u
/** Every REMOVE event discards the pages. Without this it is looked whether it was MADV_DONTNEED,
 * which leaves a file's pages as they are: before an event is read the process's threads are looked
 * at in /proc (some 10 microseconds a thread; for another process this takes CAP_SYS_PTRACE or its
 * user), and each read costs one system call more. What could not be seen counts as discarded. */
#define MEMFERRY_REMOVE_DISCARDS 0x2u
/** memferry_context_open() takes no permission (Linux 5.11), but only who touches memory itself
 * waits: a system call that is given an address whose page is missing fails with EFAULT. */
#define MEMFERRY_USER_FAULTS 0x4u

/* ---- server --------------------------------------------------------------------------------- */

/**
 * memferry_server_new() - a server without contexts, regions and provider.
 * @options: may be NULL. Copied.
 * Return: 0 with *@server, which the caller frees; -ENOMEM, -EMFILE, -EINVAL, -E2BIG.
 */
int memferry_server_new(const struct memferry_server_options *options,
                        struct memferry_server **server);

/** How to end a server whose pages are not all there. */
enum memferry_end {
    /** Refuse. */
    MEMFERRY_END_COMPLETE = 0,
    /** Leave the ranges watched and who waits waiting, for a successor that holds the userfaultfd
     * too and takes over the states. Of a context that nobody else holds open the kernel lets go:
     * as MEMFERRY_END_ZEROS. */
    MEMFERRY_END_LEAVE = 1,
    /** What is missing reads as zeros from now on. */
    MEMFERRY_END_ZEROS = 2,
};

/**
 * memferry_server_free() - end serving, unregister all mappings, close the provider, free all.
 * No other thread may be in a call on this server, except those that fill for a provider: they may
 * go on until its close returns, which waits for them. Events that are unread are read (and not
 * told after the mappings were unregistered), so nobody waits for that; with MEMFERRY_END_LEAVE
 * they are left to the successor. Where an event is on its way and does not come it takes up to 4
 * s.
 * @end: enum memferry_end, counts only while pages are missing.
 * Return: 0; -EBUSY with MEMFERRY_END_COMPLETE while pages are missing, or -EDEADLK from a
 * callback: nothing was done.
 */
int memferry_server_free(struct memferry_server *server, int end);

/**
 * memferry_server_start() - serve on a thread of the library's, which blocks all signals, until
 * memferry_server_stop(). Return: 0; -EALREADY (some thread serves); -EAGAIN (no thread to be had).
 */
int memferry_server_start(struct memferry_server *server);

/** memferry_server_stop() - end that thread; faults wait from then on, until somebody serves again.
 * Pages can be filled meanwhile. Return: 0, -EDEADLK (from a callback), or the -errno for which
 * serving ended by itself before: that is told here and by memferry_server_run() alone, and takes
 * an error of read(2) or epoll_wait(2) that means a closed or foreign descriptor. */
int memferry_server_stop(struct memferry_server *server);

/**
 * memferry_server_run() - serve on this thread instead: wait for something to do, at most
 * @timeout_ms (0: not at all, -1: for ever), and do it. One thread at a time.
 * Return: how many faults were taken up, which may be 0 (an event, a timer, the time is over), or
 * -EALREADY (another thread serves, or this one in a callback), or what reading a userfaultfd or
 * epoll_wait(2) failed with.
 */
int memferry_server_run(struct memferry_server *server, int timeout_ms);

/** memferry_server_fd() - a descriptor for poll(2) and its like, readable whenever
 * memferry_server_run() has something to do, be it only because a time has come. The server's:
 * don't read, don't close. */
int memferry_server_fd(const struct memferry_server *server);

/* ---- contexts ------------------------------------------------------------------------------- */

#define MEMFERRY_CONTEXTS_MAX 32u /**< of one server */

/**
 * memferry_context_open() - a userfaultfd of the calling process, for its own memory.
 * Return: the context's number; -EPERM (needs CAP_SYS_PTRACE, the sysctl
 * vm.unprivileged_userfaultfd or the right to open /dev/userfaultfd; MEMFERRY_USER_FAULTS needs
 * nothing), -EOPNOTSUPP (the kernel lacks
 * a feature that is needed, which memferry_why() names), -ENOSPC (MEMFERRY_CONTEXTS_MAX).
 */
int memferry_context_open(struct memferry_server *server);

/**
 * memferry_context_adopt() - a userfaultfd that was made elsewhere: in another process that sent it
 * (SCM_RIGHTS), or that this process took it from (pidfd_getfd(2)). The handshake (UFFDIO_API) is
 * done if nobody has; if somebody has, the features that he asked for are the ones there are: at
 * least the UNMAP, REMAP and REMOVE events are needed, and FORK if forks are to be followed. It is
 * made non-blocking, for all who share it.
 * As long as pages are missing another reference to it should stay open in its process: the kernel
 * hands out zeros when the last one is closed.
 * @pid: the process in which it was made, whose /proc/PID/maps is opened: what moves or grows in
 * place is found there. 0: not known; then nothing can be looked up: what a mapping grew by is
 * watched, but not served, so whoever touches it waits as long as the server lives, and so does who
 * touches a file's mapping that was moved.
 * Return: as memferry_context_open(); -EBADF or -EINVAL: it is no userfaultfd, or lacks an event
 * that is needed, which memferry_why() names; or of open(2).
 */
int memferry_context_adopt(struct memferry_server *server, int uffd, pid_t pid);

/* ---- regions -------------------------------------------------------------------------------- */

#define MEMFERRY_REGIONS_MAX 64u /**< of one server */

enum memferry_memory {
    MEMFERRY_SHMEM = 1,     /**< a file on tmpfs, or a memfd, mapped MAP_SHARED */
    MEMFERRY_HUGETLB = 2,   /**< a file on hugetlbfs, or a memfd with MFD_HUGETLB, MAP_SHARED */
    MEMFERRY_ANONYMOUS = 3, /**< MAP_PRIVATE | MAP_ANONYMOUS: no file, no second mapping */
};

/** Take over the states that lie in states_fd instead of starting with all pages missing. What a
 * predecessor had not finished counts as missing. A change of layout that it had read and not yet
 * applied when it was killed is lost (the kernel tells it once): pages that were discarded in that
 * instant, some microseconds, may be filled. One that ended with MEMFERRY_END_LEAVE has lost
 * nothing. */
#define MEMFERRY_REGION_TAKE_OVER 0x1u

/** struct memferry_region - for memferry_region_add(). */
struct memferry_region {
    size_t struct_bytes;
    uint32_t memory;       /**< enum memferry_memory */
    uint32_t page_bytes;   /**< 0: the file system's, or the system's */
    uint64_t length_bytes; /**< a multiple of the page size; no more than the file has */
    int fd;                /**< SHMEM, HUGETLB: the file, open for reading and writing */
    /** Where the states are: states_in_file 1: a byte a page in the file states_fd at
     * states_offset_bytes, a multiple of 4096, for a successor to take over; 0: in memory of the
     * server's own. */
    int states_fd;
    uint32_t states_in_file;
    uint32_t flags; /**< MEMFERRY_REGION_TAKE_OVER */
    uint64_t states_offset_bytes;
};

/**
 * memferry_region_add() - @region is copied. The file is mapped a second time, which costs address
 * space. Return: the region's number, from 0 in order; -EINVAL (with the reason in memferry_why()),
 * -E2BIG, -ENOSPC (MEMFERRY_REGIONS_MAX), -ENOMEM, -EDEADLK (from a callback), or of fstat(2),
 * mmap(2).
 */
int memferry_region_add(struct memferry_server *server, const struct memferry_region *region);

/* ---- mappings ------------------------------------------------------------------------------- */

/** struct memferry_mapping - where a context shows a part of a region. */
struct memferry_mapping {
    size_t struct_bytes;
    uint32_t context, region;
    uint64_t start_addr, length_bytes; /**< multiples of the region's page size */
    uint64_t offset_bytes;             /**< in the region, of start_addr; so is this */
    uint32_t flags;                    /**< MEMFERRY_MAPPING_REGISTERED */
};

/** It is registered with the userfaultfd already (a predecessor did); don't do that again. Who
 * waits there is made to fault again, for a predecessor may have read that he waits. */
#define MEMFERRY_MAPPING_REGISTERED 0x1u

/**
 * memferry_mapping_add() - serve an address range, from when this returns.
 * The range must be mapped as the region says, and no page of it may have been touched: what is in
 * the page table already never faults (madvise(2) MADV_DONTNEED takes it out). Pages of the region
 * that are here (or whose bytes somebody put into the file: memferry_fill_present()) fault too, and
 * are let through.
 * A region of anonymous memory has each page in one place: give a mapping to no page twice.
 * Return: 0; -EBUSY (another userfaultfd has the range), -EINVAL, -E2BIG, -ENOMEM (the process is
 * gone), -EAGAIN (a fork of the process waits for a free descriptor here), -EDEADLK (from
 * on_change).
 */
int memferry_mapping_add(struct memferry_server *server, const struct memferry_mapping *mapping);

/** memferry_mapping_remove() - serve [@start_addr, +@length_bytes) no longer: unregister what of it
 * is mapped, which may be nothing. What is missing there reads as zeros, so fill it first. A file's
 * mapping that is added or moved later is served again where it is touched.
 * Return: 0; -EINVAL (no such context, ends that are not between pages), -EDEADLK (from on_change).
 */
int memferry_mapping_remove(struct memferry_server *server, uint32_t context, uint64_t start_addr,
                            uint64_t length_bytes);

/** memferry_mappings() - what is mapped where by now, in no order. Allocates memory, so not from
 * the callbacks of a process that serves itself and follows forks.
 * @out: room for @max, the first with struct_bytes set. Return: how many there are, which may be
 * more; -EINVAL, -ENOMEM.
 */
int memferry_mappings(const struct memferry_server *server, struct memferry_mapping *out,
                      unsigned max);

/* ---- providers ------------------------------------------------------------------------------ */

/** struct memferry_want - pages that somebody waits for. */
struct memferry_want {
    size_t struct_bytes;
    uint32_t region;
    uint32_t page_bytes;
    uint64_t first_page;
    uint64_t pages; /**< in: how many are welcome, the first is waited for; out: how many are given,
                       from the first on */
    /** bytes: in: room for that many pages, page-aligned, to be filled; or set it to where the
     * bytes are (aligned to 8), which are read before the next call of the provider on this thread.
     */
    void *bytes;
};

enum memferry_answer {
    MEMFERRY_DATA = 0,    /**< bytes has them */
    MEMFERRY_ZERO = 1,    /**< they are zeros */
    MEMFERRY_PRESENT = 2, /**< their bytes lie in the region's file already */
    MEMFERRY_LATER = 3,   /**< memferry_fill() or one of its like will be called for them, now from
                             another thread or later. They are not asked for again */
};

/** struct memferry_provider - where pages come from. */
struct memferry_provider {
    size_t struct_bytes;
    void *arg;
    /** want: called on the serving thread. Return: enum memferry_answer or a negative errno, of
     * which on_failure is told. */
    int (*want)(void *arg, struct memferry_server *server, struct memferry_want *want);
    /** close: called once by memferry_server_free(), after the last want. Threads that fill for the
     * provider may do so until this returns. May be NULL. Of a provider that was never given to a
     * server whoever made it calls close himself. */
    void (*close)(void *arg);
};

/** memferry_server_set_provider() - before start. Copied; the server closes it when it is freed.
 *  Return: 0, -EALREADY, -EINVAL, -E2BIG: then it is not the server's. Without a provider pages
 * come by memferry_fill() alone. */
int memferry_server_set_provider(struct memferry_server *server,
                                 const struct memferry_provider *provider);

/** struct memferry_file - where a region's pages lie in a snapshot: page 0 at offset_bytes of fd.
 */
struct memferry_file {
    size_t struct_bytes;
    int fd; /**< open for reading */
    uint64_t offset_bytes;
    /** length_bytes: so much it must have from there on, or it is refused; what lies behind is not
     * looked at, and pages there are zeros. 0: whatever the file has. */
    uint64_t length_bytes;
};

/**
 * memferry_provider_file() - pages from files (or block devices), one for each region in order.
 * Holes, and what lies behind a file's end, are zeros. The files must not change while they are
 * used: where their holes are, and how long they are, is looked up once. Pages of one that has
 * become shorter since fail with -EIO, as those do that can't be read; never their neighbours.
 * Pages are read on the serving thread: as long as a disk takes for one, others wait. Where that
 * matters serve with a provider that answers MEMFERRY_LATER, from threads of its own.
 * @files: an array, whose members have the size that each one's struct_bytes says.
 * @out: struct_bytes set. Return: 0 with @out for memferry_server_set_provider(); -EINVAL (a file
 * is shorter than its length_bytes), -E2BIG, -ENOMEM, or of fcntl(2), lseek(2).
 */
int memferry_provider_file(const struct memferry_file *files, unsigned count,
                           struct memferry_provider *out);

/**
 * memferry_provider_peer() - pages from a peer at the other end of a stream socket that speaks the
 * frames of proto/frame.md: REQUEST out, DATA and ZERO in, for the same regions in the same order.
 * What the peer sends unasked is landed too. Frames are checked; the first wrong one ends the
 * connection.
 * @server: the one that it will be given to, with all its regions added.
 * @lost: called on a thread of the provider's when the connection has ended, with a negative errno;
 * who waits goes on waiting. May be NULL.
 * @out: struct_bytes set. Return: 0 with @out; -EINVAL, -ENOMEM, -EAGAIN, -ENOTSOCK.
 */
int memferry_provider_peer(struct memferry_server *server, int socket,
                           void (*lost)(void *arg, int error), void *arg,
                           struct memferry_provider *out);

/** memferry_peer_reconnect() - another connection for a provider that lost its own: what is waited
 * for is asked for again. Not from @lost. Return: 0; -EINVAL (no peer provider), -EALREADY (it has
 * not lost it), -ENOTSOCK. */
int memferry_peer_reconnect(const struct memferry_provider *provider, int socket);

/* ---- filling -------------------------------------------------------------------------------- */

/**
 * memferry_fill() - pages that the caller has got: those that are missing are filled and who waits
 * for them goes on; those that are here, were discarded, or that another thread is filling at this
 * moment are left as they are. Blocks only while the target is in the middle of a change of its
 * mappings; if nobody serves at that moment, it reads the event itself. Allocates nothing.
 * Anonymous memory has no file to wait in: what of it is filled before it has a mapping is lost, so
 * add the mapping first.
 * @bytes: @pages pages, aligned to 8 bytes; not in served memory.
 * Return: 0; -EINVAL (pages beyond the region's end); -EDEADLK (while a change is being told);
 * -ENOSPC, -ENOMEM (no memory for the file: pages stay missing; on_failure was told of those that
 * are waited for); -EBUSY (anonymous memory of a process whose fork waits for a free descriptor
 * here: pages stay missing, try again later).
 */
int memferry_fill(struct memferry_server *server, uint32_t region, uint64_t first_page,
                  uint64_t pages, const void *bytes);

/** memferry_fill_zero() - the same for pages that read as zeros. */
int memferry_fill_zero(struct memferry_server *server, uint32_t region, uint64_t first_page,
                       uint64_t pages);

/** memferry_fill_present() - the same for pages whose bytes the caller has written into the
 * region's file himself, through a mapping of his own or write(2). A hole counts as zeros. Who
 * writes pages that the process may discard at that moment can't know whether his bytes came before
 * or after: then it must be memferry_fill(). -EINVAL for anonymous memory. */
int memferry_fill_present(struct memferry_server *server, uint32_t region, uint64_t first_page,
                          uint64_t pages);

/** memferry_fill_failed() - an asynchronous provider can't give these pages: on_failure is asked
 * what to do, for those that are waited for. @error: a negative errno. */
int memferry_fill_failed(struct memferry_server *server, uint32_t region, uint64_t first_page,
                         uint64_t pages, int error);

/** memferry_forget() - these pages are missing again, whatever they were. The caller has taken
 * them out of every mapping (by punching them out of the file: fallocate(2)) and makes sure that no
 * thread fills them at this moment. For heaps that use the same pages again. Return: 0, -EINVAL. */
int memferry_forget(struct memferry_server *server, uint32_t region, uint64_t first_page,
                    uint64_t pages);

/** memferry_discard() - these pages are not wanted any more: they are punched out of the region's
 * file, read as zeros and are never filled. Instead of fallocate(2) FALLOC_FL_PUNCH_HOLE, of which
 * no event tells. Return: 0; -EINVAL, also for anonymous memory, which its process discards by
 * madvise(2). */
int memferry_discard(struct memferry_server *server, uint32_t region, uint64_t first_page,
                     uint64_t pages);

enum memferry_state {
    MEMFERRY_PAGE_MISSING = 0,
    MEMFERRY_PAGE_LANDING = 1,
    MEMFERRY_PAGE_HERE = 2,
    MEMFERRY_PAGE_DISCARDED = 3,
};

/** memferry_page_state() - enum memferry_state, or -EINVAL. True at that moment. */
int memferry_page_state(const struct memferry_server *server, uint32_t region, uint64_t page);

/** memferry_next_missing() - the next run of missing pages from *@first_page on, which is moved to
 * its start. For filling in the background. Return: its length in pages, 0: there is none. */
uint64_t memferry_next_missing(const struct memferry_server *server, uint32_t region,
                               uint64_t *first_page);

/** memferry_missing_pages() - how many pages of all regions are neither here nor discarded. A page
 * is counted as here after who waited for it was let go, so a thread that has just been may find it
 * missing here still; memferry_page_state() is exact. */
uint64_t memferry_missing_pages(const struct memferry_server *server);

/** struct memferry_figures - counters since the server was made. */
struct memferry_figures {
    size_t struct_bytes;
    uint64_t faults;        /**< messages read */
    uint64_t wanted;        /**< pages for which the provider was asked */
    uint64_t data_pages;    /**< filled with bytes */
    uint64_t zero_pages;    /**< filled with zeros */
    uint64_t present_pages; /**< found in the file */
    uint64_t discarded_pages;
    uint64_t events; /**< changes, as on_change is told them */
};

/** memferry_figures() - read them. @out: struct_bytes set. */
void memferry_figures(const struct memferry_server *server, struct memferry_figures *out);

#ifdef __cplusplus
}
#endif

#endif
