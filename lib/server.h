/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * libmemferry's server from inside; its face is lib/include/memferry.h.
 *
 *   server.c         options, turns, the serving thread and its loop
 *   server_faults.c  faults and events, contexts that come and go
 *   server_layout.c  contexts, regions, mappings
 *   server_reason.c  why the layout changed
 *   server_fill.c    pages that come in, and what became of them
 *   provider_*.c     the providers that come with the library
 *
 * One thread serves at a time: it holds @turn. It alone reads the userfaultfds and changes the
 * layout; others who want to change it give it a job, or take the turn if nobody has it. Fillers
 * need no turn. Everything they share is atomic, and no lock lies on a fault's way.
 */
#pragma once

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "lib/error.h"
#include "lib/events.h"
#include "lib/include/memferry.h"
#include "lib/land.h"
#include "lib/observe.h"

#define SERVER_LANES 8u

/** struct server_job - something that must happen on the serving thread, on its caller's stack. */
struct server_job {
    struct server_job *next;
    int (*run)(struct memferry_server *server, void *arg);
    void *arg;
    int result;
    char why[768]; /**< of a failure: the caller is another thread */
    bool done;
};

#define SERVER_BLOCKED 64u
#define SERVER_FORKERS 8u

#define SERVER_CHILDREN_BYTES 2048u

/** struct server_forker - a thread in fork(2), and the children it had before. */
struct server_forker {
    pid_t tid;
    char before[SERVER_CHILDREN_BYTES];
};

/** struct server_twin - a child's context that was told before the child can be found. */
struct server_twin {
    uint32_t context, parent_context;
    pid_t parent, tid; /**< who forked */
};
#define SERVER_TWINS 16u

/** struct server_reasons - what was seen before the events that are being read. */
struct server_reasons {
    struct server_twin twin[SERVER_TWINS];
    size_t twin_count;
    uint32_t context;
    size_t blocked_count, forker_count;
    struct mf_blocked blocked[SERVER_BLOCKED];
    struct server_forker forker[SERVER_FORKERS];
    struct mf_change removed; /**< of the REMOVE that is being applied */
};

struct memferry_server {
    struct memferry_server_options options;
    struct memferry_provider provider; /**< want is NULL: none */

    struct mf_layout layout;
    struct mf_gate gate; /**< between those who fill and the one who reads events */
    _Atomic(struct mf_gate_lane *) lane[SERVER_LANES]; /**< of fillers, who share them */
    struct mf_region region[MEMFERRY_REGIONS_MAX];
    struct mf_pages pages[MEMFERRY_REGIONS_MAX];
    uint64_t state_bytes[MEMFERRY_REGIONS_MAX]; /**< length of the mapping at pages[].state */
    _Atomic uint32_t region_count;
    struct mf_contexts contexts; /**< changed with the turn and the gate closed */

    struct mf_events events;
    struct mf_events_ops events_ops;
    struct server_reasons reasons;
    struct mf_lander lander; /**< the serving thread's */
    uint8_t *scratch;        /**< where a provider may put what it was asked for */
    uint64_t scratch_bytes;
    int epoll_fd, wake_fd;
    int timer_fd;      /**< for what is to be done when nothing comes */
    uint64_t timer_ns; /**< when it is set for, 0: never */

    pthread_mutex_t turn;
    _Atomic bool busy;     /**< somebody has the turn, and it is … */
    _Atomic pthread_t who; /**< … this thread */
    _Atomic bool serving;  /**< it is for somebody to serve: memferry_server_run() or the thread */
    bool applying;         /**< an event is being applied: the gate is closed */
    bool closing;          /**< nothing is watched any more */
    bool asking;           /**< the provider is being asked: it may have the scratch in its hands */

    pthread_mutex_t jobs_lock; /**< of jobs and of started */
    pthread_cond_t jobs_done;
    struct server_job *jobs;
    _Atomic bool have_jobs;

    pthread_mutex_t stop_lock; /**< held by who ends the thread */
    pthread_t thread;
    bool started;
    _Atomic bool stop;
    int ended; /**< why the thread ended by itself */

    uint32_t own_contexts;  /**< not children; of these … */
    uint32_t opened;        /**< … so many are this process's, which does not end before it */
    uint32_t held_contexts; /**< see lib/context.h */
    uint64_t look_at_ns;   /**< when to look whose process has ended, and at those held; 0: never */
    uint64_t parked_at_ns; /**< when parked faults are given up, 0: there are none */

    _Atomic uint64_t again_at_ns; /**< when to let all who wait fault again; 0: not needed */
    _Atomic uint64_t missing_pages;
    _Atomic uint64_t faults, wanted, data_pages, zero_pages, present_pages, discarded_pages,
        events_seen;
};

/* ---- server.c ---- */

/** server_fail() - leave a sentence for memferry_why(). Return: -@code. */
int server_fail(int code, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/** server_pass() - the same from a struct mf_error. Return: -err->code. */
int server_pass(const struct mf_error *err);

/**
 * server_take() - a struct of the caller's, which begins with its struct_bytes, into the @size
 * bytes at @to, which are 0.
 * @what: its name.
 * Return: 0; -EINVAL: it does not say how large it is; -E2BIG: it says something that is not known.
 */
int server_take(void *to, size_t size, const void *from, const char *what);

/** server_check_flags() - Return: 0, or -EINVAL with a sentence: others than @known. */
int server_check_flags(uint32_t flags, uint32_t known, const char *what);

/** server_check_out() - is there room for a provider? Return: 0 or -EINVAL with a sentence. */
int server_check_out(const struct memferry_provider *out);

/** server_give_provider() - copy as much of @provider to its user as his struct_bytes says. Return:
 * 0. */
int server_give_provider(const struct memferry_provider *provider, struct memferry_provider *out);

/** server_do() - run @run with the turn: on this thread if it can be had, else on the one that
 * serves. Return: what it returned, or -EDEADLK from on_change. */
int server_do(struct memferry_server *server, int (*run)(struct memferry_server *server, void *arg),
              void *arg);

/** server_serves_here() - is this the thread that serves? */
bool server_serves_here(const struct memferry_server *server);

/** server_try_turn(), server_give_turn() - have the turn, if nobody else has. */
bool server_try_turn(struct memferry_server *server);
void server_give_turn(struct memferry_server *server);

/** server_wake() - make the serving thread look at its flags. Any thread. */
void server_wake(struct memferry_server *server);

/* ---- server_faults.c: with the turn ---- */

/** server_begin_events() - once: what happens with what the userfaultfds say. */
void server_begin_events(struct memferry_server *server);

/** server_read() - read what a context's userfaultfd has to say; mf_events_serve() is to follow.
 * Return: 1 if there was an event, 0, or -errno. */
int server_read(struct memferry_server *server, uint32_t context);

/** server_read_any() - an ioctl on @context has met an unread event: read it, or another's. */
void server_read_any(struct memferry_server *server, uint32_t context);

/** server_look_around() - let go of processes that have ended, of which nothing tells; try again
 * where a fork waits for a descriptor. */
void server_look_around(struct memferry_server *server);

/** server_watch() - have the loop wait for a context, or no longer. Return: 0 or -errno. */
int server_watch(struct memferry_server *server, uint32_t context, bool watch);

/** server_each_mapping() - call @each for all that is known to be mapped of all contexts. With the
 * turn. */
void server_each_mapping(struct memferry_server *server,
                         void (*each)(struct memferry_server *server, int uffd,
                                      const struct mf_mapping *mapping));

/* ---- server_fill.c ---- */

/** server_lander() - what a thread that does not serve lands with; its lane is still to be set. */
struct mf_lander server_lander(struct memferry_server *server);

/** server_lane() - a lane of the gate for a thread that does not serve. Return: NULL: out of
 * memory. */
struct mf_gate_lane *server_lane(struct memferry_server *server);

/** server_land() - land what @answer says: bytes, zeros, or what lies in the file. Serving thread
 * or any other, by its lander. Tells on_failure. Return: 0 or -errno. */
int server_land(struct memferry_server *server, const struct mf_lander *lander,
                enum memferry_answer answer, uint32_t region, uint64_t first, uint64_t pages,
                const void *bytes);

/** server_failed() - these pages can't be had: if any is waited for ask on_failure, and do that.
 * @lander: of the calling thread. */
void server_failed(struct memferry_server *server, const struct mf_lander *lander, uint32_t region,
                   uint64_t first, uint64_t pages, int error);

/** server_discard() - pages are discarded (struct mf_events_ops.discard; @server). */
void server_discard(void *server, uint32_t region, uint64_t first, uint64_t pages);

/** server_check_run() - are these pages of a region? Return: 0, or -EINVAL with a sentence. */
int server_check_run(const struct memferry_server *server, uint32_t region, uint64_t first,
                     uint64_t pages);

/* ---- server_reason.c: struct mf_events_ops, @server ---- */

unsigned server_observe(void *server, uint32_t context);
/** server_forget_twin() - a child's context has ended. */
void server_forget_twin(struct memferry_server *server, uint32_t context);
enum mf_removed server_removed(void *server, uint32_t context, uint64_t start_addr,
                               uint64_t end_addr);
/** server_exited() - tell that a context's process is gone. */
void server_exited(struct memferry_server *server, uint32_t context);
void server_changed(void *server, uint32_t context, const struct uffd_msg *message, uint32_t child);
