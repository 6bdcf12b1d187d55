/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The stress test of libmemferry's server: threads of a target change its layout at random while
 * their faults are served and pages flow in the background, and every page is compared with a model
 * that knows what it must hold.
 *
 *   main.c     rounds, the processes, the watchdog
 *   target.c   what the target's threads and its children do
 *   space.c    the model of one thread's address space: which page of which region lies where
 *   pattern.c  what a page must hold, and whether it does
 *   serve.c    the server: provider, background filling, requests of targets
 *
 * A round is one server from beginning to end, for in its course pages stop being missing, and only
 * missing pages are of interest. Everything drawn in a round follows from its seed; how threads
 * meet does not.
 *
 * Who may change a page: of a file that several threads (and processes) map each page has one
 * owner; a quarter of the pages nobody ever changes. Whoever does not own a page may find it in the
 * middle of a change, but never a word of another page in it.
 */
#pragma once

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "memferry.h"

#define REGIONS_MAX 3u
#define REGION_PAGES_MAX 256u
#define PROCESSES_MAX 2u
#define THREADS_MAX 4u /* of a process */
#define OWNERS_MAX (PROCESSES_MAX * THREADS_MAX)
#define REGION_IDS (REGIONS_MAX * REGION_PAGES_MAX)
#define PLAIN_IDS 1024u /* of a thread: pages that are of no region */
#define CONTEXTS_MAX 2u /* of a process */
#define SERVER_TASKS 8u
#define SLOTS_OF_THREAD 4u /* its own, child, grandchild, child that is not waited for */

/** struct config - what is tested. */
struct config {
    enum memferry_memory memory;
    bool same_process; /**< the target serves itself */
    unsigned processes, threads, contexts, regions;
    uint64_t pages, page_bytes; /**< of a region */
    unsigned operations;        /**< of a thread in a round */
    bool quiet_children;        /**< children only read */
    uint64_t seed;              /**< of the round */
    enum {
        SABOTAGE_NONE,
        SABOTAGE_WRONG_PAGE, /**< the provider once hands out another page's bytes */
        SABOTAGE_LOST_FAULT, /**< it once never gives what it promised for later */
    } sabotage;
};

/** struct page_model - what a page holds: of generation, or, while its owner changes it or where
 * the outcome is not certain, of next. 0: zeros. */
struct page_model {
    _Atomic uint32_t generation, next;
};

/** The generation that the provider knows. */
#define INITIAL 1u

/** struct slot - what a thread is doing, for the watchdog. */
struct slot {
    _Atomic uint64_t since_ns; /**< 0: nothing that could wait */
    _Atomic(const char *) what;
    _Atomic uint64_t addr;
    _Atomic bool touches; /**< a page: it waits for nothing else */
    _Atomic uint32_t id;  /**< of that page */
    _Atomic int pid, tid;
};

/** struct task - a thread of the server. */
struct task {
    _Atomic int pid, tid;
};

/** struct shared - between all processes of the test. */
struct shared {
    _Atomic uint32_t generation; /**< the last one used */
    _Atomic bool stop;
    _Atomic uint64_t operations, verified_pages, wrong_pages, forks, execs, kills, refused,
        longest_wait_ns, faults, events, wanted, data_pages, zero_pages, discarded_pages;
    struct slot slot[OWNERS_MAX * SLOTS_OF_THREAD];
    struct task server[SERVER_TASKS];
    _Atomic unsigned server_tasks;
    _Atomic uint64_t tell_addr; /**< SIGUSR1: what a target shall tell its state of */
    _Atomic uint32_t tell_id;
    _Atomic unsigned set_up;            /**< so many targets have made their mappings */
    _Atomic bool mapped[REGION_IDS];    /**< has the page been given a place? */
    struct page_model page[REGION_IDS]; /**< of files */
};

extern struct config config;
extern struct shared *shared;
extern int region_fd[REGIONS_MAX];

/* ---- pattern.c ---- */

static inline uint32_t region_id(uint32_t region, uint64_t page)
{
    return (uint32_t)(region * config.pages + page);
}
/** starts_as_zeros() - has the provider zeros for this page? */
bool starts_as_zeros(uint32_t id);
static inline uint32_t initial_generation(uint32_t id)
{
    return starts_as_zeros(id) ? 0 : INITIAL;
}
/** pattern_fill() - a whole page. */
void pattern_fill(void *at, uint32_t id, uint32_t generation);
/** pattern_touch(), pattern_touch_write() - wait for the page. */
void pattern_touch(const void *at);
void pattern_touch_write(void *at);
/** pattern_is() - is every word so? */
bool pattern_is(const void *at, uint32_t id, uint32_t generation);
/** pattern_is_of() - is every word zero or of some generation of this page? */
bool pattern_is_of(const void *at, uint32_t id);
/** pattern_tell() - what was found instead, on stderr. */
void pattern_tell(const void *at, uint32_t id, uint32_t generation, uint32_t next,
                  const char *when);

/** draw() - repeatable, below @limit. */
uint64_t draw(uint64_t *state, uint64_t limit);
/** need() - end this process if not so. */
#define need(condition) need_that((condition), #condition, __FILE__, __LINE__)
void need_that(bool condition, const char *what, const char *file, int line);
/** nap_us() - sleep. */
void nap_us(unsigned us);
/** open_descriptors() - how many this process has. */
unsigned open_descriptors(void);

/* ---- space.c ---- */

#define EXTENTS_MAX 32u

/** struct extent - pages that lie one after another and can be moved together. */
struct extent {
    uint8_t *at;
    uint32_t pages;
    bool file; /**< of a region's file, page after page */
    uint16_t id[REGION_PAGES_MAX];
};

struct space {
    unsigned count, free_count;
    struct extent extent[EXTENTS_MAX];
    uint16_t free_id[PLAIN_IDS];
    struct page_model *plain; /**< by id, from first_plain on */
    uint32_t first_plain;
};

/** space_init() - @plain: room for PLAIN_IDS. */
void space_init(struct space *space, struct page_model *plain, uint32_t first_plain);
/** space_room() - may an operation that adds @pages plain pages be tried? */
bool space_room(const struct space *space, uint32_t pages);
/** space_new_plain() - ids of pages that hold zeros. */
void space_new_plain(struct space *space, uint16_t *id, uint32_t pages);
/** space_add() - @id is copied. */
void space_add(struct space *space, void *at, bool file, const uint16_t *id, uint32_t pages);
/** space_cut() - what lay there does so no more. @keep: the ids live on elsewhere. */
void space_cut(struct space *space, const void *at, uint32_t pages, bool keep);

/* ---- target.c ---- */

/** target_main() - a target process. @requests: a SOCK_SEQPACKET to the server, -1: itself.
 * @number: of the process. Return: what to exit with. */
int target_main(unsigned number, int requests);

/* ---- serve.c ---- */

enum request_kind { REQUEST_ADOPT, REQUEST_ADD, REQUEST_DISCARD, REQUEST_FINISH };

/** struct request - what a target wants of the server. */
struct request {
    uint32_t kind, context, region;
    uint64_t start_addr, pages, first_page;
    int pid;
};

struct serving;
/** serving_start() - a server with all regions, provider and fillers. */
struct serving *serving_start(void);
/** serving_request() - any thread. @fd: of ADOPT, kept by the caller. FINISH waits for as many
 * calls as there are processes, then everything missing is filled and the server is freed.
 * Return: as the library's functions. */
int serving_request(struct serving *serving, const struct request *request, int fd);
void serving_free(struct serving *serving);
/** serving_tell() - what is known of a page and an address, on stderr. */
void serving_tell(const struct serving *serving, uint32_t id, uint64_t addr);
