/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Between memferryd and a memferry-mover: fixed-size messages over a SOCK_SEQPACKET socketpair,
 * each with at most one descriptor (SCM_RIGHTS). Both are of one build, so there is no version; but
 * the mover talks to the network, so memferryd checks every field that it uses.
 *
 * Order, memferryd → mover: SETUP, REGION…, CONTEXT… (each with its MAPS), MAPPING…, GO. The mover
 * then gives up every privilege and answers READY. For each link: LINK, its CONNECTIONs in any
 * order (and DEVICE on the first link), after which the hellos run. UNLINK or LINK_LOST end a link.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "lib/error.h"
#include "lib/machine.h"
#include "lib/target.h"
#include "proto/frame.h"

enum mf_ipc_type {
    /* memferryd → mover */
    MF_IPC_SETUP = 1, /**< with the session file */
    MF_IPC_REGION,    /**< with the RAM file; of private memory: struct mf_region_source, fd */
    MF_IPC_CONTEXT,   /**< with the userfaultfd; a source has one only if writes are tracked */
    MF_IPC_MAPS,      /**< with the open /proc/PID/maps of a context */
    MF_IPC_PAGEMAP,   /**< source, if writes are tracked: with /proc/PID/pagemap */
    MF_IPC_SMAPS,     /**< likewise, to a successor: with the open /proc/PID/smaps of the target */
    MF_IPC_LAYOUT,    /**< destination with private memory: with its layout file */
    MF_IPC_POPULATED, /**< source with private memory: with /proc/PID/pagemap */
    MF_IPC_MAPPING,   /**< of what the userfaultfd watches, and of private memory in any case */
    MF_IPC_GO, /**< all is handed over; at the destination, empty the RAM files unless restarted */
    MF_IPC_LINK,
    MF_IPC_CONNECTION, /**< with a connected socket, preamble done */
    MF_IPC_DEVICE,     /**< with our end of the VMM's device stream */
    MF_IPC_PROCEED,    /**< destination: the answer to PEER_HELLO; text is a refusal or empty */
    MF_IPC_ROUND,      /**< source: copy once more what was written since; ROUND_DONE follows */
    MF_IPC_CUT_ROUND,  /**< source: end the round where it is */
    MF_IPC_SETTINGS,   /**< source: the bandwidth limit */
    MF_IPC_FROZEN,     /**< source: the guest is paused; faults may be answered */
    MF_IPC_COUNT,      /**< source, after FROZEN: count what is dirty; COUNTED follows */
    MF_IPC_CONFIRM,    /**< source: sweep before RELEASE (mode precopy) */
    MF_IPC_SEND,       /**< send a phase change */
    MF_IPC_SEND_ABORT,
    MF_IPC_UNLINK,
    /* mover → memferryd */
    MF_IPC_COMPANION, /**< destination, before READY, by the process that shares its descriptors */
    MF_IPC_READY,
    MF_IPC_PEER_HELLO, /**< destination: regions agree; may it go on? */
    MF_IPC_LINK_UP,
    MF_IPC_LINK_LOST, /**< text says why */
    MF_IPC_PEER_PHASE,
    MF_IPC_PEER_DRAINED,  /**< source: with the destination's figures */
    MF_IPC_PEER_ABORT,    /**< text says why */
    MF_IPC_ROUND_DONE,    /**< source: the round has landed at the destination */
    MF_IPC_COUNTED,       /**< source: what is dirty now that nothing is written any more */
    MF_IPC_CONFIRMED_ALL, /**< destination */
    MF_IPC_TYPES
};

/** struct mf_ipc - one message. Unused fields are zero. */
struct mf_ipc {
    uint32_t type;
    uint32_t phase;       /**< Memferry__Peer__Phase of SEND and PEER_PHASE */
    uint32_t link_number; /**< SEND, and all of the mover's messages: which link; others are out of
                             date */
    union {
        struct {
            uint32_t role, region_count, context_count;
            uint8_t session_id[MF_SESSION_ID_BYTES];
            char name[64];
            int32_t pid;       /**< of the target */
            uint8_t restarted; /**< the session had a mover before: take its page states over */
            /** Destination: what the target does is such that MADV_DONTNEED too means that pages
             * are not wanted any more (QEMU punches them out of the file before). Else it means
             * that the mapping alone is emptied. */
            uint8_t dontneed_discards;
        } setup;
        struct {
            char name[64];
            uint64_t size_bytes;
            uint32_t page_bytes;
            uint32_t kind;
            uint64_t device, inode; /**< of its file, as /proc/PID/maps has them */
        } region;
        struct {
            uint32_t index; /**< MAPS; contexts are numbered in the order of their messages */
            uint8_t child;  /**< CONTEXT: of a process that the target has forked */
        } context;
        int32_t companion_pid; /**< COMPANION */
        struct mf_mapping mapping;
        struct {
            uint32_t link, streams;
            uint8_t released,
                guest_running; /**< 0 or 1; not bool, for the other side is less trusted */
        } link;
        struct {
            uint32_t kind, stream;
        } connection;
        struct {
            uint64_t allocated_bytes;
            uint8_t released,
                guest_running; /**< 0 or 1; not bool, for the other side is less trusted */
        } hello;
        struct {
            uint64_t count, p50_ns, p99_ns, p999_ns, max_ns, received_bytes;
        } drained;
        struct {
            uint64_t copied_pages, dirty_pages, duration_ns;
            uint32_t round;
        } round;
        uint64_t dirty_pages;      /**< COUNTED */
        uint64_t bandwidth_bits_s; /**< SETTINGS; 0: no limit */
        uint8_t cancelled;         /**< SEND_ABORT, PEER_ABORT */
        uint64_t blackout_us;      /**< SEND and PEER_PHASE of DRAINED_ACK */
    };
    char text[896]; /**< at least as long as an error's sentence */
};

/** mf_ipc_send() - one message with @fd (-1: none; the caller keeps it). Return: 0 or -errno. */
int mf_ipc_send(int sock, const struct mf_ipc *message, int fd);

/**
 * mf_ipc_receive() - one message; never more than one descriptor, surplus ones are closed.
 * @fd: receives the descriptor (O_CLOEXEC, owned by the caller) or -1.
 * Return: 1, 0 when the other side is gone, -EAGAIN, or -errno (-EPROTO: not a message of ours).
 */
int mf_ipc_receive(int sock, struct mf_ipc *message, int *fd);
