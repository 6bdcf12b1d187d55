/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What landing (lib/land.h) means to a session: its figures, the clocks of those who wait, what a
 * failure ends.
 */
#include "daemon/mover/destination/destination.h"

#include <errno.h>
#include <string.h>

#include "lib/util.h"

void account_served(struct mover *mover, uint32_t region, uint64_t page)
{
    uint64_t since_ns = fault_table_take(faults_table(mover), region, page);
    if (since_ns)
        mf_histogram_add(&mover->figures->faults, mf_now_ns() - since_ns);
}

void account_missing(struct mover *mover, uint64_t pages)
{
    if (pages == 0)
        return;
    if (atomic_fetch_sub(&mover->figures->missing_pages, pages) == pages) {
        atomic_store(&mover->confirmed_all, true);
        mover_wake(mover);
    }
}

int account_failed(struct mover *mover, int error)
{
    link_fail(
        mover,
        "the destination cannot write %s's memory: %s; free memory there, the session goes on "
        "by itself",
        mover->name,
        error == -EFAULT  ? "no huge page is free"
        : error == -EBUSY ? "a process that forks waits for a descriptor"
                          : strerror(-error));
    return error;
}

static void served(void *mover, uint32_t region, uint64_t page)
{
    account_served(mover, region, page);
}

static void landed(void *argument, enum mf_landed what, uint64_t pages)
{
    struct mover *mover = argument;
    struct mf_figures *figures = mover->figures;
    _Atomic uint64_t *const figure[] = {
        [MF_LANDED_DATA] = &figures->data_pages,
        [MF_LANDED_ROUND] = &figures->data_pages,
        [MF_LANDED_ZERO] = &figures->zero_pages,
        [MF_LANDED_HOLE] = &figures->hole_pages,
        [MF_LANDED_CURRENT] = NULL,
        [MF_LANDED_DISCARDED] = NULL,
    };
    if (figure[what])
        atomic_fetch_add_explicit(figure[what], pages, memory_order_relaxed);
    if (what != MF_LANDED_ROUND)
        account_missing(mover, pages);
}

static void broken(void *argument, uint32_t region, int error)
{
    struct mover *mover = argument;
    mover_fatal("cannot punch a discarded page out of %s: %s", mover->region[region].name,
                strerror(-error));
}

struct mf_lander account_lander(struct mover *mover, void (*on_event)(void *arg, uint32_t context),
                                void *arg)
{
    static const struct mf_lander_ops ops = {served, landed, broken};
    return (struct mf_lander){.resolver = {.region = mover->region,
                                           .layout = &mover->layout,
                                           .contexts = &mover->contexts,
                                           .on_event = on_event,
                                           .arg = arg},
                              .pages = mover->view.pages,
                              .ops = &ops,
                              .arg = mover};
}
