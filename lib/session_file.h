/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The session file: page states and figures of one session on one host, in shared memory.
 *
 * memferryd creates it, hands the descriptor to every mover of the session and reads the figures
 * from it; the mover writes. It outlives both. memferryd never follows an index found in it: what
 * it reads are counters for display.
 *
 * Layout: one struct mf_session_file, padded to MF_SESSION_FILE_HEADER_BYTES, then a byte a page of
 * each region in order, each region's bytes starting at a multiple of 4096.
 */
#pragma once

#include <stdatomic.h>
#include <stdint.h>

#include "lib/copies.h"
#include "lib/error.h"
#include "lib/histogram.h"
#include "lib/page_state.h"
#include "lib/target.h"

#define MF_SESSION_FILE_HEADER_BYTES 8192u

/** struct mf_figures - counters since the session began; all relaxed. */
struct mf_figures {
    _Atomic uint64_t wire_bytes; /**< page traffic sent (source) or received (destination) */
    _Atomic uint64_t data_pages, zero_pages, hole_pages;
    _Atomic uint64_t
        missing_pages; /**< destination: not resolvable yet; source: not sent on this link */
    _Atomic uint64_t dirty_pages; /**< source: copied before RELEASE and found written after it */
    _Atomic uint64_t round_pages; /**< source: copied in the present round */
    _Atomic uint64_t round_left_pages; /**< source: of the present round, not looked at yet */
    _Atomic uint64_t removes_unknown;  /**< REMOVE events of which nobody saw the call */
    _Atomic uint64_t faults_asked;     /**< REQUESTs sent (destination) or answered (source) */
    struct mf_histogram
        faults; /**< from reading the message to the return of the resolving ioctl */
};

struct mf_session_file {
    uint64_t magic;
    uint32_t version;
    uint32_t region_count;
    uint8_t session_id[16];
    struct {
        uint64_t pages;
        uint64_t offset_bytes;
    } region[MF_REGIONS_MAX];
    /** Source, after RELEASE: every page was looked at; what was written since it was copied is not
     * marked as a copy any more. */
    _Atomic uint32_t looked;
    struct mf_copies copies; /**< source */
    struct mf_figures figures;
};
_Static_assert(sizeof(struct mf_session_file) <= MF_SESSION_FILE_HEADER_BYTES,
               "the header has outgrown its room");

/** struct mf_session_view - a mapped session file. */
struct mf_session_view {
    struct mf_session_file *file;
    uint64_t mapped_bytes;
    struct mf_pages pages[MF_REGIONS_MAX];
};

/**
 * mf_session_file_create() - size and fill the header of the empty file @fd (memfd or tmpfs file).
 * Its size is sealed where it can be (MFD_ALLOW_SEALING), so that nobody who is given it can
 * shorten it.
 * @pages: of each region. Return: 0 or -errno.
 */
int mf_session_file_create(int fd, const uint64_t *pages, unsigned region_count,
                           struct mf_error *err);

/** mf_session_file_map() - map and check a file (every number: it may be left from a crash).
 *  Return: 0 or -errno. Unmap with mf_session_file_unmap. */
int mf_session_file_map(int fd, struct mf_session_view *out, struct mf_error *err);
void mf_session_file_unmap(struct mf_session_view *view);
