/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * memferry-mover's internal header: the data plane of one session on one host.
 *
 * Threads. The main thread talks to memferryd (lib/ipc.h) and to the peer's main thread on the
 * control connection, and pumps the VMM's device stream; it starts and ends the others: source: one
 * thread for the urgent connection, one for each bulk connection; they live as long as a link. And,
 * where writes are tracked, one that reads the target's layout changes, to the end (tracker.h).
 *   destination: the fault thread, from the start to the end (a guest whose link is lost must still
 * have its events read and its confirmed pages resolved); it also owns the urgent connection of the
 * link. One thread for each bulk connection of a link. Threads share the page states (atomic), the
 * layout (one writer) and the figures (relaxed counters), and no lock on any page's way. Each
 * thread has an io_uring of its own.
 */
#pragma once

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "lib/context.h"
#include "lib/gate.h"
#include "daemon/mover/companion.h"
#include "lib/ipc.h"
#include "lib/layout.h"
#include "lib/layout_file.h"
#include "lib/region.h"
#include "lib/session_file.h"
#include "proto/frame.h"
#include "peer.pb-c.h"

#define MOVER_STREAMS_MAX 16u

struct mover;

/** struct control_connection - the peer's main thread: buffers around a non-blocking socket. */
struct control_connection {
    int fd; /**< -1: none */
    uint8_t *in, *out;
    size_t in_have, in_room, out_have, out_room;
    bool last_word; /**< an abort was sent: the peer hangs up when it has read it */
};

/** struct tunnel - the VMM's device stream, both ways: [0] local socket, [1] the peer. */
struct tunnel {
    int fd[2]; /**< -1: none */
    struct {
        uint8_t *data;
        size_t have, sent;
        uint64_t read_bytes; /**< so far */
        bool closed;         /**< nothing more can be read from fd[i] */
        bool eof;            /**< and that was its end; passed on once `have` is sent */
        bool shut;
    } from[2];
    uint64_t
        peer_bytes; /**< what the peer's end of the stream will have brought, when it is told */
    bool peer_told; /**< it was told */
    bool told;      /**< the peer was told of the local end */
};

struct bulk_thread {
    struct mover *mover;
    unsigned stream;
    int fd;
    pthread_t thread;
    bool started;
};

/** struct link - the connections between the two movers; made anew after each loss. */
struct link {
    uint32_t number; /**< 0: no link */
    uint32_t streams;
    bool up;           /**< hellos agreed, LINK_UP said */
    bool hello_seen;   /**< destination: Hello received */
    bool missing_open; /**< source: in the middle of a Missing list */
    int urgent_fd;     /**< -1 until it came */
    struct control_connection control;
    struct bulk_thread bulk[MOVER_STREAMS_MAX];
    pthread_t urgent_thread;
    bool urgent_started;
    _Atomic bool stop;               /**< threads of this link end */
    _Atomic uint32_t barriers;       /**< destination: BARRIERs of the present pass that arrived */
    _Atomic uint32_t round_barriers; /**< the same of a precopy round */
    _Atomic uint32_t round;          /**< destination: the round they belong to */
    _Atomic bool failed;
    pthread_mutex_t reason_lock; /**< guards reason; only taken when something fails */
    char reason[384];
};

/** struct sweep - source: what is still to be offered, chunk by chunk. */
struct sweep {
    uint64_t chunk_count;
    uint64_t chunk_base[MF_REGIONS_MAX + 1]; /**< of a region, in the row of all chunks */
    _Atomic uint8_t *taken;                  /**< one a chunk: how often in this pass */
    _Atomic uint64_t looked_chunks; /**< whose copies are confirmed or no copies any more */
    _Atomic uint64_t pivot;         /**< the chunk of the last fault: go on from there */
    _Atomic uint32_t urgent_busy;   /**< a fault is being answered: bulk threads let it by */
    pthread_mutex_t lock;           /**< of what follows: between passes, never a page */
    pthread_cond_t changed;
    uint32_t doubts;              /**< mf_copies_round() of the present round */
    bool frozen;                  /**< the guest is paused: its RAM may be read */
    bool released;                /**< or told to confirm before RELEASE: the sweep may begin */
    uint32_t round;               /**< of precopy; 0: none yet */
    bool in_round;                /**< the present pass is a precopy round */
    uint32_t finished;            /**< threads that have sent this pass's or round's barrier */
    _Atomic uint32_t through;     /**< threads that have nothing left to copy in this round */
    _Atomic uint64_t dirty_pages; /**< by then, of all that was copied */
    _Atomic bool cut;             /**< no further chunk in this round */
    uint64_t round_began_ns;
    _Atomic uint64_t pace_bits_s;  /**< limit of all bulk threads together; 0: none */
    _Atomic uint64_t pace_next_ns; /**< when the next batch may leave */
    uint32_t pass;                 /**< from 1; 0: not begun */
};

struct fault_thread;
struct tracker;

struct mover {
    enum mf_role role;
    char name[64];
    uint8_t session_id[MF_SESSION_ID_BYTES];
    int ipc_fd;
    int wake_fd; /**< eventfd: a thread has something for the main thread */
    _Atomic bool confirmed_all;
    bool confirmed_all_told;
    bool released, guest_running; /**< as in the hello */

    unsigned region_count;
    struct mf_region region[MF_REGIONS_MAX];
    struct mf_frame_region frame_region[MF_REGIONS_MAX];
    struct mf_contexts contexts; /**< changed by the fault thread, or the tracker, only */
    struct mf_gate gate;         /**< see lib/gate.h */
    int pagemap_fd;              /**< source: -1 if writes are not tracked */
    int populated_fd;            /**< source with private memory: /proc/PID/pagemap, else -1 */
    struct mf_layout layout;
    int smaps_fd; /**< only during setup, and only for a successor with private memory; else -1 */
    struct mf_layout_file *layout_file; /**< destination with private memory, else NULL */
    bool private_memory;                /**< a region is private anonymous memory */

    struct mf_session_view view;
    struct mf_copies *copies; /**< source: of the session file */
    struct mf_figures *figures;

    struct companion companion; /**< destination; asked by the fault thread */
    bool dontneed_discards;     /**< as in MF_IPC_SETUP */

    struct link link;
    struct tunnel tunnel;
    struct sweep sweep;          /**< source */
    struct fault_thread *faults; /**< destination */
    struct tracker *tracker;     /**< source: NULL if writes are not tracked */
    /** Source: the target has changed where its memory lies, at least once. */
    _Atomic bool layout_moves;
    /** Source: memory was looked up and protected by its address while the target was changing what
     * lies there, maybe (sender.c). Set inside the gate, looked at with the gate closed. */
    _Atomic bool protect_raced;
};

/* ---- main.c ---- */

/** mover_fatal() - log a sentence and leave; memferryd starts a successor. Any thread. */
_Noreturn void mover_fatal(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

/** mover_tell() - send a message to memferryd. Main thread. */
void mover_tell(struct mover *mover, const struct mf_ipc *message);

/** mover_wake() - make the main thread look at flags. Any thread. */
void mover_wake(struct mover *mover);

/* ---- setup.c ---- */

/** mover_setup() - take what memferryd hands over, until GO. Leaves the process on what is
 * unusable. */
void mover_setup(struct mover *mover);

/** mover_keep_layout() - an event was applied: write down where private memory lies now. Fault
 * thread. */
void mover_keep_layout(struct mover *mover);

/* ---- sandbox.c: see there ---- */

/** sandbox_drop_privileges() - become @uid and @gid, without capabilities, for good. First thing in
 * main. */
int sandbox_drop_privileges(uid_t uid, gid_t gid, struct mf_error *err);
/** sandbox_companion() - the companion: @uid and @gid too, but with the capabilities to look at
 * other processes, and a filter under which nothing is written but answers. Does both. */
int sandbox_companion(uid_t uid, gid_t gid, struct mf_error *err);
/** sandbox_filter() - the system-call filter; after setup, before any byte of the peer is read. */
int sandbox_filter(struct mf_error *err);

/* ---- link.c ---- */

/** link_begin() - LINK: a new link; an old one is dropped without a word. */
void link_begin(struct mover *mover, const struct mf_ipc *message);
/** link_add() - CONNECTION: takes @fd over. Starts the hellos once all are there. */
void link_add(struct mover *mover, uint32_t kind, uint32_t stream, int fd);
/** link_fail() - any thread: this link is broken, for this reason; the first reason counts. */
void link_fail(struct mover *mover, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/** link_reap() - main thread: if the link failed, end its threads and tell memferryd. */
void link_reap(struct mover *mover);
/** link_drop() - main thread: end the link, telling memferryd nothing. */
void link_drop(struct mover *mover);
/** link_start_threads() - main thread: the hellos agree, page traffic may begin. */
void link_start_threads(struct mover *mover);

/* ---- control.c: the control connection ---- */

void control_send(struct mover *mover, const Memferry__Peer__Message *message);
void control_send_hello(struct mover *mover);
/** control_proceed() - destination: memferryd's answer to PEER_HELLO, "" or a refusal. */
void control_proceed(struct mover *mover, const char *refusal);
void control_send_phase(struct mover *mover, uint32_t phase, uint64_t blackout_us);
/** control_send_device_end() - the device stream of this side has ended after @bytes. */
void control_send_device_end(struct mover *mover, uint64_t bytes);
void control_send_round_landed(struct mover *mover, uint32_t round);
void control_send_abort(struct mover *mover, const char *reason, bool cancelled);
/** control_send_missing() - destination: the list of pages that are not here. */
void control_send_missing(struct mover *mover);
/** control_readable() / control_writable() - poll said so. */
void control_readable(struct mover *mover);
void control_writable(struct mover *mover);
/** control_flush() - try, for at most @timeout_ms, to get everything out (before a link is
 * dropped); an abort is also left the time to be read, for another connection that ends may
 * overtake it. */
void control_flush(struct mover *mover, int timeout_ms);
void control_close(struct control_connection *control);

/* ---- tunnel.c: the VMM's device stream ---- */

void tunnel_init(struct tunnel *tunnel);
/** tunnel_set() - give it one of its ends; takes @fd over. */
void tunnel_set(struct tunnel *tunnel, unsigned end, int fd);
/** tunnel_events() - what poll(2) should wait for on an end. */
short tunnel_events(const struct tunnel *tunnel, unsigned end);
/** tunnel_pump() - move what can be moved. The local VMM's end of the stream is told to the peer by
 * a message of its own, and the peer's is passed on only if it was told so and every byte is here.
 */
void tunnel_pump(struct mover *mover);
/** tunnel_expect() - the peer told that its stream ends after @bytes. */
void tunnel_expect(struct mover *mover, uint64_t bytes);
void tunnel_close(struct tunnel *tunnel);

/* ---- source ---- */

/** sweep_init() - once. */
int sweep_init(struct mover *mover);
/** sweep_set_pivot() - a fault was here: the sweep goes on from its chunk. */
void sweep_set_pivot(struct mover *mover, uint32_t region, uint64_t page);
void sweep_forget_sent(struct mover *mover); /**< everything counts as sent … */
int sweep_missing(struct mover *mover, uint32_t region, uint64_t first,
                  uint64_t pages); /**< … but this */
/** sweep_pass_finished() - have all bulk threads sent a pass's barrier? Until then nobody can know
 * what is missing, and nothing may be made missing: a round would send a page twice. */
bool sweep_pass_finished(struct mover *mover);
void sweep_next_pass(struct mover *mover); /**< let the bulk threads begin */
void sweep_frozen(struct mover *mover);    /**< the guest is paused: answer faults */
/** sweep_count_dirty() - after sweep_frozen(): of the copied pages, how many were written since.
 * Looks at all RAM. Main thread. */
uint64_t sweep_count_dirty(struct mover *mover);
bool sweep_wait_frozen(struct mover *mover); /**< false: the link ended first */
void sweep_release(struct mover *mover);     /**< RELEASE is out: sweep */
void sweep_round(struct mover *mover);       /**< begin a precopy round */
void sweep_cut_round(struct mover *mover);   /**< end it where it is */
/** sweep_round_landed() - the destination has all of it. */
void sweep_round_landed(struct mover *mover, uint32_t round);
void sweep_set_pace(struct mover *mover, uint64_t bits_s); /**< 0: no limit */
/** sweep_pace() - a bulk thread waits until it may send @bytes more. */
void sweep_pace(struct mover *mover, uint64_t bytes);
void *source_bulk_main(void *bulk_thread);
void *source_urgent_main(void *mover);

/* ---- destination ---- */

/** faults_start() - start the fault thread. */
int faults_start(struct mover *mover);
/** faults_attach() - give it the link's urgent connection; faults_detach() - take it back; when it
 *  returns the thread does not touch the descriptor any more. Main thread. */
void faults_attach(struct mover *mover, int urgent_fd);
void faults_detach(struct mover *mover);
void *destination_bulk_main(void *bulk_thread);
