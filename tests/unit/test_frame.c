/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* lib/frame.c: preamble, answer and frame header; their bytes, their refusals, their limits. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <errno.h>
#include <string.h>

#include "proto/frame.h"

/* ---- preamble ---- */

static const struct mf_preamble good = {
    .version = MF_WIRE_VERSION,
    .oldest_version = MF_WIRE_OLDEST_VERSION,
    .session_id = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 255},
    .kind = MF_CONNECTION_BULK,
    .stream = 2,
    .streams = 4,
    .link = 0x01020304,
    .name = "vm1",
};

static void preamble_goes_round(void **state)
{
    (void)state;
    uint8_t bytes[MF_PREAMBLE_BYTES], again[MF_PREAMBLE_BYTES];
    struct mf_preamble out;
    const char *why = NULL;
    for (unsigned kind = MF_CONNECTION_CONTROL; kind <= MF_CONNECTION_ABANDON; kind++) {
        struct mf_preamble p = good;
        p.kind = (enum mf_connection_kind)kind;
        p.stream = kind == MF_CONNECTION_BULK ? 3 : 0;
        memset(p.name, 'n', sizeof(p.name) - 1); /* the longest */
        memset(bytes, 0xee, sizeof(bytes));
        mf_preamble_encode(&p, bytes);
        assert_int_equal(mf_preamble_decode(bytes, &out, &why), 0);
        assert_null(why);
        assert_int_equal(out.version, p.version);
        assert_int_equal(out.oldest_version, p.oldest_version);
        assert_memory_equal(out.session_id, p.session_id, sizeof(p.session_id));
        assert_int_equal(out.kind, kind);
        assert_int_equal(out.stream, p.stream);
        assert_int_equal(out.streams, p.streams);
        assert_int_equal(out.link, p.link);
        assert_string_equal(out.name, p.name);
        mf_preamble_encode(&out, again);
        assert_memory_equal(bytes, again, sizeof(bytes));
    }
}

/* The bytes themselves: a peer of another machine and another release reads them. */
static void preamble_has_its_bytes(void **state)
{
    (void)state;
    uint8_t bytes[MF_PREAMBLE_BYTES], expected[MF_PREAMBLE_BYTES] = {0};
    mf_preamble_encode(&good, bytes);
    memcpy(expected, "MEMFERRY", 8);
    expected[8] = MF_WIRE_VERSION;
    expected[12] = MF_WIRE_OLDEST_VERSION;
    memcpy(expected + 16, good.session_id, 16);
    expected[32] = 4;
    expected[34] = 2;
    expected[36] = 4;
    memcpy(expected + 40, "\x04\x03\x02\x01", 4);
    memcpy(expected + 64, "vm1", 3);
    assert_memory_equal(bytes, expected, sizeof(bytes));
}

/* A good preamble with one byte changed; a refusal has a sentence. */
static int with_byte(unsigned at, uint8_t value)
{
    uint8_t bytes[MF_PREAMBLE_BYTES];
    struct mf_preamble out;
    const char *why = NULL;
    mf_preamble_encode(&good, bytes);
    bytes[at] = value;
    int rc = mf_preamble_decode(bytes, &out, &why);
    assert_true(rc == 0 || (rc == -EPROTO && why && strlen(why) > 10));
    return rc;
}

static void preamble_refuses(void **state)
{
    (void)state;
    for (unsigned i = 0; i < 8; i++)
        assert_int_equal(with_byte(i, '?'), -EPROTO);              /* magic */
    assert_int_equal(with_byte(12, MF_WIRE_VERSION + 1), -EPROTO); /* oldest beyond version */
    assert_int_equal(with_byte(32, 0), -EPROTO);                   /* kinds there are not */
    assert_int_equal(with_byte(32, 6), -EPROTO);
    assert_int_equal(with_byte(33, 1), -EPROTO);
    assert_int_equal(with_byte(34, 4), -EPROTO); /* stream 4 of 4 */
    assert_int_equal(with_byte(35, 1), -EPROTO);
    assert_int_equal(with_byte(36, 2), -EPROTO); /* stream 2 of 2 */
    assert_int_equal(with_byte(36, 0), -EPROTO);
    assert_int_equal(with_byte(36, 3), 0);
    assert_int_equal(with_byte(32, MF_CONNECTION_CONTROL), -EPROTO); /* which has no stream 2 */
    assert_int_equal(with_byte(38, 1), -EPROTO);                     /* reserved */
    assert_int_equal(with_byte(39, 1), -EPROTO);
    for (unsigned i = 44; i < 64; i++)
        assert_int_equal(with_byte(i, 0x80), -EPROTO);
    assert_int_equal(with_byte(127, 'x'), -EPROTO); /* a name without an end */
    assert_int_equal(with_byte(126, 'x'), 0);

    uint8_t bytes[MF_PREAMBLE_BYTES];
    struct mf_preamble p = good, out;
    const char *why = NULL;
    p.link = 0;
    mf_preamble_encode(&p, bytes);
    assert_int_equal(mf_preamble_decode(bytes, &out, &why), -EPROTO);
}

static void preamble_of_another_version_is_not_parsed(void **state)
{
    (void)state;
    uint8_t bytes[MF_PREAMBLE_BYTES];
    struct mf_preamble out;
    const char *why = NULL;
    memset(bytes, 0xff, sizeof(bytes)); /* whatever a later version puts there */
    memcpy(bytes, "MEMFERRY", 8);
    memcpy(bytes + 8, "\x09\0\0\0\x05\0\0\0", 8);
    assert_int_equal(mf_preamble_decode(bytes, &out, &why), 0);
    assert_int_equal(out.version, 9);
    assert_int_equal(out.oldest_version, 5);
    assert_false(mf_versions_meet(out.version, out.oldest_version));
    assert_int_equal(out.name[0], 0);
    assert_int_equal(out.link, 0);
}

static void versions_meet_where_they_overlap(void **state)
{
    (void)state;
    assert_true(mf_versions_meet(MF_WIRE_VERSION, MF_WIRE_OLDEST_VERSION));
    assert_true(mf_versions_meet(MF_WIRE_VERSION, MF_WIRE_VERSION));
    assert_true(mf_versions_meet(UINT32_MAX, MF_WIRE_VERSION));
    assert_true(mf_versions_meet(MF_WIRE_OLDEST_VERSION, 0));
    assert_false(mf_versions_meet(MF_WIRE_OLDEST_VERSION - 1, 0));
    assert_false(mf_versions_meet(UINT32_MAX, MF_WIRE_VERSION + 1));
}

static void answer_goes_round_and_refuses(void **state)
{
    (void)state;
    uint8_t bytes[MF_PREAMBLE_REPLY_BYTES];
    struct mf_preamble_reply out;
    const char *why = NULL;
    /* Statuses of later versions too: whoever reads decides. */
    for (uint32_t status = 0; status < 10; status++) {
        const struct mf_preamble_reply in = {MF_WIRE_VERSION, MF_WIRE_OLDEST_VERSION, status};
        mf_preamble_reply_encode(&in, bytes);
        assert_int_equal(mf_preamble_reply_decode(bytes, &out, &why), 0);
        assert_memory_equal(&in, &out, sizeof(in));
    }
    for (unsigned i = 0; i < MF_PREAMBLE_REPLY_BYTES; i++) {
        uint8_t was = bytes[i];
        bytes[i] ^= 0x40;
        int rc = mf_preamble_reply_decode(bytes, &out, &why);
        /* magic; reserved. The version's low byte makes it 65: 1 to 65 still meets. */
        assert_int_equal(rc, i < 8 || i >= 20 ? -EPROTO : 0);
        bytes[i] = was;
    }
    /* Of a version that we don't speak only version and status are read. */
    memset(bytes, 0xff, sizeof(bytes));
    memcpy(bytes, "MFANSWER", 8);
    assert_int_equal(mf_preamble_reply_decode(bytes, &out, &why), 0);
    assert_int_equal(out.version, UINT32_MAX);
}

/* ---- frames ---- */

#define GIB (UINT64_C(1) << 30)

/* Region 0: 1 GiB of small pages; 1: huge pages of 2 MiB; 2: of 1 GiB; 3: one page; 4: as large as
 * can be. */
static const struct mf_frame_region regions[] = {
    {.pages = GIB / 4096, .page_bytes = 4096}, {.pages = 512, .page_bytes = 2u << 20},
    {.pages = 8, .page_bytes = 1u << 30},      {.pages = 1, .page_bytes = 4096},
    {.pages = UINT64_MAX, .page_bytes = 4096},
};
#define REGIONS (sizeof(regions) / sizeof(regions[0]))

static int check_way(const struct mf_frame *frame, bool to_destination)
{
    const char *why = NULL;
    int rc = mf_frame_check(frame, regions, REGIONS, to_destination, &why);
    assert_true(rc == 0 ? why == NULL : rc == -EPROTO && why && strlen(why) > 10);
    return rc;
}

static int check(const struct mf_frame *frame)
{
    return check_way(frame, frame->type != MF_FRAME_REQUEST);
}

static struct mf_frame frame(uint8_t type, uint16_t region, uint64_t first, uint64_t pages)
{
    return (struct mf_frame){
        .type = type,
        .region = region,
        .first_page = first,
        .pages = pages,
        .length_bytes = type == MF_FRAME_DATA ? pages * regions[region].page_bytes : 0,
    };
}

static void frame_goes_round(void **state)
{
    (void)state;
    const struct mf_frame in = {.type = 0xab,
                                .flags = 0xcd,
                                .region = 0x1234,
                                .first_page = UINT64_C(0x0102030405060708),
                                .pages = UINT64_C(0x1112131415161718),
                                .length_bytes = UINT64_C(0x2122232425262728)};
    struct mf_frame out;
    uint8_t bytes[MF_FRAME_HEADER_BYTES];
    const char *why = NULL;
    memset(bytes, 0xee, sizeof(bytes));
    mf_frame_encode(&in, bytes);
    assert_memory_equal(bytes,
                        "\xab\xcd\x34\x12\0\0\0\0"
                        "\x08\x07\x06\x05\x04\x03\x02\x01"
                        "\x18\x17\x16\x15\x14\x13\x12\x11"
                        "\x28\x27\x26\x25\x24\x23\x22\x21",
                        sizeof(bytes));
    assert_int_equal(mf_frame_decode(bytes, &out, &why), 0);
    assert_int_equal(out.type, in.type);
    assert_int_equal(out.flags, in.flags);
    assert_int_equal(out.region, in.region);
    assert_int_equal(out.first_page, in.first_page);
    assert_int_equal(out.pages, in.pages);
    assert_int_equal(out.length_bytes, in.length_bytes);
    for (unsigned i = 4; i < 8; i++) {
        bytes[i] = 1;
        assert_int_equal(mf_frame_decode(bytes, &out, &why), -EPROTO);
        assert_non_null(why);
        bytes[i] = 0;
    }
}

static void frame_takes_what_is_in_range(void **state)
{
    (void)state;
    const struct mf_frame good_frames[] = {
        frame(MF_FRAME_DATA, 0, 0, 1),
        frame(MF_FRAME_DATA, 0, 17, MF_FRAME_DATA_MAX_BYTES / 4096),
        frame(MF_FRAME_DATA, 0, GIB / 4096 - 1, 1),
        frame(MF_FRAME_DATA, 1, 511, 1),
        frame(MF_FRAME_DATA, 2, 7, 1),
        frame(MF_FRAME_DATA, 3, 0, 1),
        frame(MF_FRAME_DATA, 4, UINT64_MAX - 1, 1),
        frame(MF_FRAME_ZERO, 0, 0, GIB / 4096),
        frame(MF_FRAME_ZERO, 2, 1, 7),
        frame(MF_FRAME_ZERO, 4, 0, UINT64_MAX),
        frame(MF_FRAME_CURRENT, 0, 3, 4096),
        frame(MF_FRAME_CURRENT, 1, 511, 1),
        frame(MF_FRAME_CURRENT, 4, 1, UINT64_MAX - 1),
        frame(MF_FRAME_REQUEST, 3, 0, 1),
        frame(MF_FRAME_REQUEST, 1, 510, 2),
    };
    for (size_t i = 0; i < sizeof(good_frames) / sizeof(good_frames[0]); i++)
        assert_int_equal(check(&good_frames[i]), 0);
    struct mf_frame hole = frame(MF_FRAME_ZERO, 0, 5, 5);
    hole.flags = MF_FRAME_FLAG_HOLE;
    assert_int_equal(check(&hole), 0);
    const struct mf_frame barrier = {.type = MF_FRAME_BARRIER, .first_page = UINT64_MAX};
    assert_int_equal(check(&barrier), 0);
}

static void frame_refuses_other_types_and_ways(void **state)
{
    (void)state;
    for (unsigned type = 0; type < 256; type++) {
        struct mf_frame f = frame((uint8_t)type, 0, 0, type == MF_FRAME_BARRIER ? 0 : 1);
        const bool there = type == MF_FRAME_DATA || type == MF_FRAME_ZERO ||
                           type == MF_FRAME_BARRIER || type == MF_FRAME_CURRENT;
        assert_int_equal(check_way(&f, true), there ? 0 : -EPROTO);
        assert_int_equal(check_way(&f, false), type == MF_FRAME_REQUEST ? 0 : -EPROTO);
        for (unsigned flags = 1; flags < 256; flags++) {
            f.flags = (uint8_t)flags;
            /* What a precopy round brings lands unconfirmed: data, zeros, discards, which there are
             * nowhere else, and the barrier; never CURRENT. */
            bool round = type == MF_FRAME_DATA || type == MF_FRAME_ZERO ||
                         type == MF_FRAME_BARRIER || type == MF_FRAME_DISCARD;
            bool known =
                (round && flags == MF_FRAME_FLAG_ROUND) ||
                (type == MF_FRAME_ZERO && !(flags & ~(MF_FRAME_FLAG_HOLE | MF_FRAME_FLAG_ROUND)));
            assert_int_equal(check(&f), known ? 0 : -EPROTO);
        }
    }
}

static void frame_refuses_what_is_out_of_range(void **state)
{
    (void)state;
    static const uint8_t types[] = {MF_FRAME_DATA, MF_FRAME_ZERO, MF_FRAME_CURRENT,
                                    MF_FRAME_REQUEST};
    for (size_t t = 0; t < sizeof(types); t++) {
        /* Sums and products that wrap around would be in range again. */
        const struct {
            uint16_t region;
            uint64_t first, pages;
        } bad[] = {
            {REGIONS, 0, 1},
            {UINT16_MAX, 0, 1},
            {0, 0, 0},
            {0, GIB / 4096, 1},
            {0, GIB / 4096 - 1, 2},
            {0, UINT64_MAX, 1},
            {0, UINT64_MAX, 2},
            {0, 1, UINT64_MAX},
            {0, 2, UINT64_MAX - 1},
            {0, GIB / 4096 - 1, UINT64_C(1) << 52},
            {2, 8, 1},
            {2, 7, 2},
            {3, 1, 1},
            {3, 0, 2},
            {4, UINT64_MAX, 1},
            {4, UINT64_MAX - 1, 2},
        };
        for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
            struct mf_frame f = {.type = types[t],
                                 .region = bad[i].region,
                                 .first_page = bad[i].first,
                                 .pages = bad[i].pages};
            if (types[t] == MF_FRAME_DATA)
                f.length_bytes = bad[i].pages * 4096;
            assert_int_equal(check(&f), -EPROTO);
        }
    }
}

static void frame_length_is_what_the_pages_need(void **state)
{
    (void)state;
    struct mf_frame f = frame(MF_FRAME_DATA, 0, 0, 3);
    const uint64_t lengths[] = {0,
                                1,
                                4096,
                                3 * 4096 - 1,
                                3 * 4096 + 1,
                                4 * 4096,
                                UINT64_MAX,
                                3 * 4096 + (UINT64_C(1) << 32)};
    for (size_t i = 0; i < sizeof(lengths) / sizeof(lengths[0]); i++) {
        f.length_bytes = lengths[i];
        assert_int_equal(check(&f), -EPROTO);
    }
    /* More than a payload may have; of pages that are larger than that, one. */
    f = frame(MF_FRAME_DATA, 0, 0, MF_FRAME_DATA_MAX_BYTES / 4096 + 1);
    assert_int_equal(check(&f), -EPROTO);
    f = frame(MF_FRAME_DATA, 1, 0, 2);
    assert_int_equal(check(&f), -EPROTO);
    f = frame(MF_FRAME_DATA, 2, 0, 2);
    assert_int_equal(check(&f), -EPROTO);
    f = frame(MF_FRAME_DATA, 4, 0, UINT64_C(1) << 52); /* times 4096 is 0 */
    assert_int_equal(check(&f), -EPROTO);
    /* And none where there is none. */
    f = frame(MF_FRAME_ZERO, 0, 0, 1);
    f.length_bytes = 4096;
    assert_int_equal(check(&f), -EPROTO);
    f = frame(MF_FRAME_CURRENT, 0, 0, 1);
    f.length_bytes = 4096;
    assert_int_equal(check(&f), -EPROTO);
    f = frame(MF_FRAME_REQUEST, 0, 0, 1);
    f.length_bytes = 1;
    assert_int_equal(check(&f), -EPROTO);
    f = (struct mf_frame){.type = MF_FRAME_BARRIER, .region = 1};
    assert_int_equal(check(&f), -EPROTO);
    f = (struct mf_frame){.type = MF_FRAME_BARRIER, .pages = 1};
    assert_int_equal(check(&f), -EPROTO);
    f = (struct mf_frame){.type = MF_FRAME_BARRIER, .length_bytes = 1};
    assert_int_equal(check(&f), -EPROTO);
}

static void frame_without_regions(void **state)
{
    (void)state;
    const char *why = NULL;
    struct mf_frame f = frame(MF_FRAME_ZERO, 0, 0, 1);
    assert_int_equal(mf_frame_check(&f, NULL, 0, true, &why), -EPROTO);
    assert_non_null(why);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(preamble_goes_round),
        cmocka_unit_test(preamble_has_its_bytes),
        cmocka_unit_test(preamble_refuses),
        cmocka_unit_test(preamble_of_another_version_is_not_parsed),
        cmocka_unit_test(versions_meet_where_they_overlap),
        cmocka_unit_test(answer_goes_round_and_refuses),
        cmocka_unit_test(frame_goes_round),
        cmocka_unit_test(frame_takes_what_is_in_range),
        cmocka_unit_test(frame_refuses_other_types_and_ways),
        cmocka_unit_test(frame_refuses_what_is_out_of_range),
        cmocka_unit_test(frame_length_is_what_the_pages_need),
        cmocka_unit_test(frame_without_regions),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
