/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Two state machines, source and destination, coupled as memferryd couples them (step.c,
 * connector.c, listener.c), explored exhaustively: from the start, every thing that can happen in
 * every situation. Links and movers are lost at any moment, with whatever was under way; VMMs fail,
 * targets exit, operators cancel.
 *
 * What must hold in every situation (safety) is asserted as it is found. Afterwards (liveness):
 * from every situation, if from then on nothing fails any more, the session can still end. What is
 * not modelled: time, and data; "all pages are here" is one event. Both ways to RELEASE are: mode
 * precopy confirms every page before it, the others none.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "lib/machine.h"

#define QUEUE 6u /**< more messages are never under way: asserted */

enum s_vmm {
    S_UNTOUCHED,
    S_COPYING, /**< not touched either: the mover copies in rounds */
    S_PREPARING,
    S_PAUSED,
    S_SENDING,
    S_COMPLETED,
    S_BROKEN,
    S_RETURNING,
    S_RETURNED,
    S_QUITTING,
    S_EXITED
};
enum d_vmm { D_IDLE, D_OPENING, D_LISTENING, D_LOADED, D_RESUMING, D_RUNNING, D_EXITED };

enum message {
    M_NONE,
    M_READY,
    M_CONFIRMED,
    M_LOADED,
    M_RELEASE,
    M_RUNNING,
    M_DRAINED,
    M_DRAINED_ACK,
    M_FAILED,
    M_CANCELLED,
    M_LINK_UP /**< the destination's answer to the hello, and Missing */
};

/* A situation. All bytes, so that it can be compared and hashed as memory. */
struct world {
    uint8_t s, d; /* enum mf_state */
    uint8_t s_vmm, d_vmm;
    uint8_t s_open, d_open; /* does the host believe in a link? */
    uint8_t broken;         /* what is under way may still arrive, nothing more is sent */
    uint8_t s_connecting;   /* an attempt to connect is under way */
    uint8_t abandoning;     /* source: a word by a connection of its own is under way */
    uint8_t confirmed;      /* destination: every page is here */
    uint8_t confirm_first;  /* source: mode precopy */
    uint8_t confirming;     /* source: the sweep may begin before RELEASE */
    uint8_t released;       /* source has sent RELEASE */
    uint8_t finish_later;   /* source: the VMM is to be kept or gone: VMM_GONE comes by itself */
    uint8_t to_d[QUEUE], to_s[QUEUE];
};

static bool ended(uint8_t state)
{
    return mf_state_ended((enum mf_state)state);
}

/* ---- the graph ---- */

struct node {
    struct world world;
    uint32_t first_edge, edges; /* of those that are no failures */
    uint32_t parent;
    const char *how;
    bool can_end;
};
#define NODES_MAX (1u << 22)
#define TABLE_SIZE (1u << 23)
#define EDGES_MAX (1u << 24)
static struct node *nodes;
static uint32_t node_count;
static uint32_t *table; /* node + 1 */
static uint32_t *edges;
static uint32_t edge_count;
static uint32_t here; /* the node that is being expanded */
static bool expanding;

static uint32_t hash(const struct world *w)
{
    const uint8_t *at = (const uint8_t *)w;
    uint64_t h = UINT64_C(0xcbf29ce484222325);
    for (size_t i = 0; i < sizeof(*w); i++)
        h = (h ^ at[i]) * UINT64_C(0x100000001b3);
    return (uint32_t)(h >> 32) ^ (uint32_t)h;
}

static void print_world(const char *how, const struct world *w)
{
    print_message("  %-34s source %s/%u vmm %u, destination %s/%u vmm %u, links %u%u%s%s%s%s\n",
                  how, mf_state_name((enum mf_state)w->s), w->s, w->s_vmm,
                  mf_state_name((enum mf_state)w->d), w->d, w->d_vmm, w->s_open, w->d_open,
                  w->broken ? " broken" : "", w->abandoning ? " abandoning" : "",
                  w->confirmed ? " confirmed" : "", w->released ? " released" : "");
}

static void print_path(uint32_t node)
{
    if (nodes[node].parent != node)
        print_path(nodes[node].parent);
    print_world(nodes[node].how, &nodes[node].world);
}

static void must(bool condition, const struct world *w, const char *what)
{
    if (condition)
        return;
    print_path(here);
    print_world("then", w);
    fail_msg("%s", what);
}

static uint32_t node_of(const struct world *w, const char *how)
{
    uint32_t at = hash(w) & (TABLE_SIZE - 1);
    while (table[at]) {
        if (memcmp(&nodes[table[at] - 1].world, w, sizeof(*w)) == 0)
            return table[at] - 1;
        at = (at + 1) & (TABLE_SIZE - 1);
    }
    assert_true(node_count < NODES_MAX);
    nodes[node_count] =
        (struct node){.world = *w, .parent = expanding ? here : node_count, .how = how};
    table[at] = node_count + 1;
    return node_count++;
}

/* ---- what must hold ---- */

/* "May run": while it is being returned or resumed it may already do so. */
static bool may_run_at_source(const struct world *w)
{
    return w->s_vmm == S_UNTOUCHED || w->s_vmm == S_COPYING || w->s_vmm == S_PREPARING ||
           w->s_vmm == S_RETURNING || w->s_vmm == S_RETURNED;
}

static void check(const struct world *w)
{
    bool runs_there = w->d_vmm == D_RESUMING || w->d_vmm == D_RUNNING;
    must(!(may_run_at_source(w) && runs_there), w, "the guest runs on both hosts");
    must(!(w->released && may_run_at_source(w)), w, "the source runs a guest that it has released");
    must(!runs_there || w->released, w, "the destination runs a guest that was not released");
    must(w->s_vmm != S_QUITTING || w->confirmed, w, "the source lets its VM go too early");
    must(w->s != MF_DONE || w->confirmed, w, "the source is done too early");
    must(w->d != MF_DONE || w->confirmed, w, "the destination is done too early");
    must(w->s != MF_S_DRAINED || w->d == MF_D_DRAINED || w->d == MF_DONE, w,
         "the source has drained before the destination knows");
    must(!w->released || w->s != MF_CANCELLED, w, "cancelled after RELEASE");
    must(!mf_state_released((enum mf_state)w->d) || w->released, w, "RELEASE out of nothing");
    must(!w->released || !w->confirm_first || w->confirmed, w,
         "mode precopy released a guest before everything was confirmed");
    if ((w->s == MF_FAILED || w->s == MF_CANCELLED) && !w->released)
        must(w->s_vmm == S_UNTOUCHED || w->s_vmm == S_COPYING || w->s_vmm == S_RETURNED ||
                 w->s_vmm == S_EXITED || w->s_vmm == S_BROKEN,
             w, "the session has ended and the guest is not back");
}

/* ---- what memferryd does ---- */

static void source_event(struct world *w, enum mf_event event);
static void destination_event(struct world *w, enum mf_event event);

static void put(struct world *w, uint8_t queue[QUEUE], enum message message)
{
    for (unsigned i = 0; i < QUEUE; i++)
        if (queue[i] == M_NONE) {
            queue[i] = (uint8_t)message;
            return;
        }
    must(false, w, "more messages under way than the model has room for");
}

static void drop_first(uint8_t queue[QUEUE])
{
    memmove(queue, queue + 1, QUEUE - 1);
    queue[QUEUE - 1] = M_NONE;
}

static void send_to_d(struct world *w, enum message message)
{
    if (w->s_open && !w->broken)
        put(w, w->to_d, message);
}

static void send_to_s(struct world *w, enum message message)
{
    if (w->d_open && !w->broken)
        put(w, w->to_s, message);
}

/* One side closes: the other may still read what was sent, then it sees the end. */
static void close_at_source(struct world *w)
{
    w->s_open = false;
    w->s_connecting = false;
    w->broken = w->d_open;
    memset(w->to_s, 0, QUEUE);
    if (!w->d_open)
        memset(w->to_d, 0, QUEUE);
}

static void close_at_destination(struct world *w)
{
    w->d_open = false;
    w->broken = w->s_open;
    memset(w->to_d, 0, QUEUE);
    if (!w->s_open)
        memset(w->to_s, 0, QUEUE);
}

/* The same as memferryd's tell_peer_abort: over the link, and before RELEASE in every case by a
 * connection of its own too, for nobody knows what becomes of a link. */
static void source_tells(struct world *w)
{
    bool cancelled = w->s == MF_CANCELLED || w->s == MF_S_CANCELLING;
    send_to_d(w, cancelled ? M_CANCELLED : M_FAILED);
    close_at_source(w);
    if (!w->released)
        w->abandoning = true;
}

static void source_does(struct world *w, enum mf_action action)
{
    switch (action) {
    case MF_ACT_START_ROUNDS:
        w->s_vmm = S_COPYING;
        break;
    case MF_ACT_START_VMM:
        w->s_vmm = S_PREPARING;
        break;
    case MF_ACT_CONFIRM:
        if (w->confirm_first)
            w->confirming = true;
        else
            source_event(w, MF_EV_PEER_CONFIRMED);
        break;
    case MF_ACT_FINISH_VMM:
        w->s_vmm = S_SENDING;
        break;
    case MF_ACT_RELEASE:
        w->released = true;
        send_to_d(w, M_RELEASE);
        break;
    case MF_ACT_RECONNECT:
        w->s_connecting = true;
        break;
    case MF_ACT_FINISH:
        must(w->d == MF_D_DRAINED || w->d == MF_DONE, w, "FINISH without the destination's word");
        send_to_d(w, M_DRAINED_ACK);
        w->s_connecting = false;
        if (w->s_vmm == S_EXITED)
            w->finish_later = true;
        else
            w->s_vmm = S_QUITTING;
        break;
    case MF_ACT_RETURN_GUEST:
        must(!w->released, w, "a released guest is returned");
        source_tells(w);
        w->s_vmm = S_RETURNING;
        break;
    case MF_ACT_VIOLATION:
        must(false, w, "the destination broke the protocol");
        break;
    case MF_ACT_END_TELL:
        source_tells(w);
        break;
    case MF_ACT_END:
        close_at_source(w);
        break;
    case MF_ACT_NONE:
    case MF_ACT_REFUSE:
        break;
    default:
        must(false, w, "an action that a source can't carry out");
    }
}

static void destination_does(struct world *w, enum mf_action action)
{
    switch (action) {
    case MF_ACT_START_VMM:
        w->d_vmm = D_OPENING;
        break;
    case MF_ACT_START_GUEST:
        w->d_vmm = D_RESUMING;
        break;
    case MF_ACT_SEND_READY:
        send_to_s(w, M_READY);
        break;
    case MF_ACT_SEND_CONFIRMED:
        send_to_s(w, M_CONFIRMED);
        break;
    case MF_ACT_SEND_LOADED:
        send_to_s(w, M_LOADED);
        break;
    case MF_ACT_SEND_RUNNING:
        send_to_s(w, M_RUNNING);
        break;
    case MF_ACT_SEND_DRAINED:
        send_to_s(w, M_DRAINED);
        break;
    case MF_ACT_VIOLATION:
        must(false, w, "the source broke the protocol");
        break;
    case MF_ACT_END_TELL:
        send_to_s(w, w->d == MF_CANCELLED ? M_CANCELLED : M_FAILED);
        close_at_destination(w);
        break;
    case MF_ACT_END:
        close_at_destination(w);
        break;
    case MF_ACT_FINISH_VMM:
    case MF_ACT_RELEASE:
    case MF_ACT_RECONNECT:
    case MF_ACT_FINISH:
    case MF_ACT_RETURN_GUEST:
        must(false, w, "an action that a destination can't carry out");
        break;
    default: /* nothing, or once more what is being done already */
        break;
    }
}

static void source_event(struct world *w, enum mf_event event)
{
    const struct mf_step step = mf_machine_step((enum mf_state)w->s, event);
    w->s = (uint8_t)step.next;
    source_does(w, step.action);
}

static void destination_event(struct world *w, enum mf_event event)
{
    const uint8_t was = w->d;
    const struct mf_step step = mf_machine_step((enum mf_state)w->d, event);
    w->d = (uint8_t)step.next;
    destination_does(w, step.action);
    /* The last page may have arrived before the guest was known to run. */
    if (w->d == step.next && w->d != was && w->confirmed &&
        (w->d == MF_D_POSTCOPY || w->d == MF_D_RECOVERING))
        destination_event(w, MF_EV_CONFIRMED_ALL);
}

static void source_loses_link(struct world *w)
{
    close_at_source(w);
    source_event(w, MF_EV_LINK_LOST);
}

static void destination_loses_link(struct world *w)
{
    close_at_destination(w);
    destination_event(w, MF_EV_LINK_LOST);
}

/* ---- what can happen ---- */

/* The source's connections arrive, the hellos pass. */
static void connect_both(struct world *w)
{
    w->s_connecting = false;
    if (w->d_open) /* the source noticed sooner */
        destination_loses_link(w);
    if (ended(w->d)) {
        source_event(w, w->d == MF_DONE ? MF_EV_PEER_DRAINED : MF_EV_PEER_FAILED);
        return;
    }
    w->s_open = w->d_open = true;
    w->broken = false;
    memset(w->to_d, 0, QUEUE);
    memset(w->to_s, 0, QUEUE);
    put(w, w->to_s, M_LINK_UP);
    destination_event(w, MF_EV_LINK_UP);
    if (w->released) /* the hello says so */
        destination_event(w, MF_EV_PEER_RELEASE);
}

static void deliver_to_s(struct world *w)
{
    static const enum mf_event events[] = {
        [M_READY] = MF_EV_PEER_READY,     [M_LOADED] = MF_EV_PEER_LOADED,
        [M_RUNNING] = MF_EV_PEER_RUNNING, [M_DRAINED] = MF_EV_PEER_DRAINED,
        [M_FAILED] = MF_EV_PEER_FAILED,   [M_CANCELLED] = MF_EV_PEER_CANCELLED,
        [M_LINK_UP] = MF_EV_LINK_UP,      [M_CONFIRMED] = MF_EV_PEER_CONFIRMED,
    };
    enum message message = (enum message)w->to_s[0];
    drop_first(w->to_s);
    source_event(w, events[message]);
}

static void deliver_to_d(struct world *w)
{
    static const enum mf_event events[] = {
        [M_RELEASE] = MF_EV_PEER_RELEASE,
        [M_DRAINED_ACK] = MF_EV_PEER_DRAINED_ACK,
        [M_FAILED] = MF_EV_PEER_FAILED,
        [M_CANCELLED] = MF_EV_PEER_CANCELLED,
    };
    enum message message = (enum message)w->to_d[0];
    drop_first(w->to_d);
    destination_event(w, events[message]);
}

static struct world now;
static uint32_t from_edges;

/* A successor: `body` changes `w`. Failures are explored, but nobody may have to wait for one. */
static void successor(const struct world *w, bool failure, const char *how)
{
    check(w);
    uint32_t node = node_of(w, how);
    if (!failure) {
        assert_true(edge_count < EDGES_MAX);
        edges[edge_count++] = node;
    }
}
#define MAY(condition, failure, how, body)                                                         \
    do {                                                                                           \
        if (condition) {                                                                           \
            struct world w = now;                                                                  \
            body;                                                                                  \
            successor(&w, failure, how);                                                           \
        }                                                                                          \
    } while (0)

static void source_vmm(void)
{
    const bool alive = !ended(now.s);
    MAY(alive && now.s == MF_S_PRECOPY && now.s_vmm == S_COPYING, false, "rounds copied",
        source_event(&w, MF_EV_COPIED));
    /* Mode precopy that does not converge and may become hybrid. */
    MAY(alive && now.s == MF_S_PRECOPY && now.s_vmm == S_COPYING && now.confirm_first, false,
        "precopy becomes hybrid", w.confirm_first = false;
        source_event(&w, MF_EV_COPIED));
    MAY(alive && now.s_vmm == S_PREPARING, false, "guest paused", w.s_vmm = S_PAUSED;
        source_event(&w, MF_EV_VMM_PAUSED));
    /* QEMU says so once the destination has loaded. */
    MAY(alive && now.s_vmm == S_SENDING && now.d_vmm >= D_LOADED, false, "device state sent",
        w.s_vmm = S_COMPLETED;
        source_event(&w, MF_EV_VMM_COMPLETED));
    MAY(alive && now.s_vmm == S_RETURNING, false, "guest returned", w.s_vmm = S_RETURNED;
        source_event(&w, MF_EV_VMM_RETURNED));
    MAY(alive && now.s_vmm == S_QUITTING, false, "VM ended", w.s_vmm = S_EXITED;
        source_event(&w, MF_EV_VMM_GONE));
    MAY(alive && now.finish_later, false, "VM was ended", w.finish_later = false;
        source_event(&w, MF_EV_VMM_GONE));
    MAY(alive && (now.s_vmm == S_COPYING || now.s_vmm == S_PREPARING || now.s_vmm == S_PAUSED ||
                  now.s_vmm == S_SENDING || now.s_vmm == S_RETURNING || now.s_vmm == S_QUITTING),
        true, "source's VM fails", w.s_vmm = S_BROKEN;
        source_event(&w, MF_EV_VMM_FAILED));
    /* The stream of a link that is gone breaks off. */
    MAY(alive && now.s_vmm == S_SENDING && !now.s_open, false, "source's stream breaks",
        w.s_vmm = S_BROKEN;
        source_event(&w, MF_EV_VMM_FAILED));
    MAY(alive && now.s_vmm != S_EXITED, true, "source's target exits", w.s_vmm = S_EXITED;
        source_event(&w, MF_EV_TARGET_EXITED));
}

static void destination_vmm(void)
{
    const bool alive = !ended(now.d);
    MAY(alive && now.d_vmm == D_OPENING, false, "VM listens", w.d_vmm = D_LISTENING;
        destination_event(&w, MF_EV_VMM_INCOMING));
    MAY(alive && now.d_vmm == D_LISTENING && now.s_vmm == S_SENDING, false, "device state loaded",
        w.d_vmm = D_LOADED;
        destination_event(&w, MF_EV_VMM_LOADED));
    MAY(alive && now.d_vmm == D_RESUMING, false, "guest runs", w.d_vmm = D_RUNNING;
        destination_event(&w, MF_EV_VMM_RUNNING));
    /* A VMM that does not answer may still have the guest, and be asked again. */
    MAY(alive && now.d_vmm >= D_OPENING && now.d_vmm < D_EXITED, true, "destination's VM fails",
        destination_event(&w, MF_EV_VMM_FAILED);
        if (ended(w.d)) w.d_vmm = D_EXITED);
    MAY(alive && now.d_vmm != D_EXITED, true, "destination's target exits", w.d_vmm = D_EXITED;
        destination_event(&w, MF_EV_TARGET_EXITED));
    /* Pages come once they may, and never without a link. */
    MAY(alive && !now.confirmed && now.d_open && !now.broken &&
            ((now.released && mf_state_released((enum mf_state)now.d)) ||
             (now.confirming && now.s_open)),
        false, "all pages confirmed", w.confirmed = true;
        destination_event(&w, MF_EV_CONFIRMED_ALL));
}

static void the_link(void)
{
    MAY(now.s_connecting, false, "connected", connect_both(&w));
    MAY(now.s_connecting, true, "cannot connect", source_loses_link(&w));
    /* A hello that is refused: too little memory, another version. */
    MAY(now.s_connecting && now.d == MF_D_WAITING && !now.d_open, true, "refused",
        w.s_connecting = false;
        source_event(&w, MF_EV_PEER_FAILED); destination_event(&w, MF_EV_LINK_LOST));
    MAY(now.s_open && now.to_s[0], false, "message to the source", deliver_to_s(&w));
    MAY(now.d_open && now.to_d[0], false, "message to the destination", deliver_to_d(&w));
    MAY(now.s_open && now.d_open && !now.broken, true, "the link breaks", w.broken = true);
    /* Once broken, any rest of what was sent is lost. */
    MAY(now.s_open && now.broken, false, "source sees the end", source_loses_link(&w));
    MAY(now.d_open && now.broken, false, "destination sees the end", destination_loses_link(&w));
    MAY(!ended(now.s), true, "source's mover dies", source_loses_link(&w));
    MAY(!ended(now.d), true, "destination's mover dies", destination_loses_link(&w));
    MAY(now.abandoning, false, "the source's word arrives", w.abandoning = false;
        if (!ended(w.d)) destination_event(&w, MF_EV_PEER_FAILED));
}

static void operators(void)
{
    MAY(!ended(now.s), true, "cancel at the source", source_event(&w, MF_EV_CANCEL));
    MAY(!ended(now.d), true, "cancel at the destination", destination_event(&w, MF_EV_CANCEL));
}

/* Over on both sides; or the destination waits for another attempt, which it may for ever. */
static bool is_over(const struct world *w)
{
    return ended(w->s) && (ended(w->d) || w->d == MF_D_WAITING);
}

static void explores_everything(void **state)
{
    (void)state;
    bool s_seen[MF_STATES] = {false}, d_seen[MF_STATES] = {false};
    struct world start = {.s = MF_S_CONNECTING, .d = MF_D_WAITING, .s_connecting = true};
    node_of(&start, "start");
    start.confirm_first = true;
    node_of(&start, "start in mode precopy");
    expanding = true;
    for (here = 0; here < node_count; here++) {
        now = nodes[here].world;
        from_edges = edge_count;
        s_seen[now.s] = d_seen[now.d] = true;
        source_vmm();
        destination_vmm();
        the_link();
        operators();
        nodes[here].first_edge = from_edges;
        nodes[here].edges = edge_count - from_edges;
    }
    print_message("%u situations, %u ways on without a failure\n", node_count, edge_count);
    for (unsigned s = 0; s < MF_STATES; s++) {
        assert_true(s > MF_S_CANCELLING || s_seen[s]);
        assert_true(s < MF_D_WAITING || d_seen[s]);
    }
    assert_true(s_seen[MF_DONE] && s_seen[MF_FAILED] && s_seen[MF_CANCELLED]);

    for (bool again = true; again;) {
        again = false;
        for (uint32_t n = node_count; n-- > 0;) {
            struct node *node = &nodes[n];
            bool can = node->can_end || is_over(&node->world);
            for (uint32_t e = 0; e < node->edges && !can; e++)
                can = nodes[edges[node->first_edge + e]].can_end;
            again |= can && !node->can_end;
            node->can_end = can;
        }
    }
    for (uint32_t n = 0; n < node_count; n++)
        if (!nodes[n].can_end) {
            print_path(n);
            fail_msg("from here it can't end, although nothing fails any more");
        }
}

static int make_room(void **state)
{
    (void)state;
    nodes = calloc(NODES_MAX, sizeof(*nodes));
    table = calloc(TABLE_SIZE, sizeof(*table));
    edges = calloc(EDGES_MAX, sizeof(*edges));
    return nodes && table && edges ? 0 : -1;
}

static int give_room_back(void **state)
{
    (void)state;
    free(nodes);
    free(table);
    free(edges);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(explores_everything)};
    return cmocka_run_group_tests(tests, make_room, give_room_back);
}
