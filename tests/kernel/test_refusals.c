/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What the lack of a feature leads to, on whatever kernel this runs: a refusal by its name, never a
 * surprise later on. */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/utsname.h>
#include <unistd.h>

#include "lib/pagemap.h"
#include "lib/uffd.h"
#include "lib/util.h"
#include "tests/kernel/area.h"
#include "tests/kernel/fact.h"

/** A bit that no kernel has yet. */
#define UNKNOWN_FEATURE ((uint64_t)1 << 62)

/** Why mf_uffd_api() asks what there is before it asks for it: a handshake can be tried once. */
static void an_unknown_feature_fails_the_handshake_for_good(void **state)
{
    (void)state;
    cleanup_close int uffd = mf_uffd_open();
    struct uffdio_api api = {.api = UFFD_API, .features = UNKNOWN_FEATURE};
    assert_int_equal(ioctl_errno(uffd, UFFDIO_API, &api), EINVAL);
    assert_int_equal(api.features, 0);
    api = (struct uffdio_api){.api = UFFD_API, .features = UFFD_FEATURE_MISSING_SHMEM};
    assert_int_equal(ioctl_errno(uffd, UFFDIO_API, &api), 0); /* it was not used up … */
    api = (struct uffdio_api){.api = UFFD_API, .features = UFFD_FEATURE_MISSING_SHMEM};
    assert_int_equal(ioctl_errno(uffd, UFFDIO_API, &api), EINVAL); /* … but it is now */
}

static void a_missing_feature_is_refused_by_its_name(void **state)
{
    (void)state;
    uint64_t have;
    struct mf_error err = {0};
    assert_int_equal(mf_uffd_features(&have, &err), 0);
    for (unsigned bit = 0; bit < 64; bit++) {
        uint64_t feature = (uint64_t)1 << bit;
        const char *since, *name = mf_uffd_feature_name(feature, &since);
        cleanup_close int uffd = mf_uffd_open();
        int rc = mf_uffd_api(uffd, feature, 0, NULL, &err);
        if (have & feature) {
            assert_int_equal(rc, 0);
            continue;
        }
        assert_int_equal(rc, -EOPNOTSUPP);
        assert_non_null(strstr(err.text, name));
        assert_non_null(strstr(err.text, since));
    }
}

/** What mf_uffd_feature_name() says of releases. A distribution may have carried more back. */
static void what_came_with_a_release_is_there(void **state)
{
    (void)state;
    uint64_t have;
    struct mf_error err = {0};
    struct utsname system;
    int major = 0, minor = 0;
    assert_int_equal(uname(&system), 0);
    assert_int_equal(sscanf(system.release, "%d.%d", &major, &minor), 2);
    assert_int_equal(mf_uffd_features(&have, &err), 0);
    for (unsigned bit = 0; bit < 64; bit++) {
        const char *since, *name = mf_uffd_feature_name((uint64_t)1 << bit, &since);
        int since_major, since_minor;
        if (sscanf(since, "%d.%d", &since_major, &since_minor) != 2)
            continue; /* nothing is known of it */
        bool due = major > since_major || (major == since_major && minor >= since_minor);
        if (due && !(have >> bit & 1))
            fail_msg("Linux %s has no %s, which came with %s", system.release, name, since);
    }
}

/** Both have come with one release (6.7); memferry relies on not having to tell them apart. */
static void tracking_and_listing_writes_come_together(void **state)
{
    (void)state;
    uint64_t have;
    uint8_t pages[2];
    struct area area;
    struct mf_error err = {0};
    assert_int_equal(mf_uffd_features(&have, &err), 0);
    bool tracks = have & UFFD_FEATURE_WP_ASYNC;
    area_make_with(&area, AREA_SHMEM, 2,
                   MF_UFFD_FEATURES | (tracks ? MF_UFFD_FEATURES_WP : (uint64_t)0));
    area.guest[0] = 'a';
    cleanup_close int pagemap_fd = mf_pagemap_open((int)getpid(), &err);
    assert_true(pagemap_fd >= 0);
    if (tracks)
        assert_int_equal(
            mf_uffd_register_wp(area.uffd, (uintptr_t)area.guest, area.length_bytes, &err), 0);
    assert_int_equal(mf_pagemap_scan(pagemap_fd, (uintptr_t)area.guest, area.length_bytes,
                                     area.page_bytes, pages),
                     tracks ? 0 : -ENOTTY);
    assert_int_equal(pages[0] & MF_PAGEMAP_WRITTEN, MF_PAGEMAP_WRITTEN); /* in any case */
    area_free(&area);
}

int main(int argc, char **argv)
{
    static const struct fact facts[] = {
        FACT(an_unknown_feature_fails_the_handshake_for_good),
        FACT(a_missing_feature_is_refused_by_its_name),
        FACT(what_came_with_a_release_is_there),
        FACT(tracking_and_listing_writes_come_together),
    };
    return facts_main(argc, argv, facts, sizeof(facts) / sizeof(facts[0]), MF_UFFD_FEATURES);
}
