/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/memferry/verbs.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "daemon/memferry/show.h"
#include "lib/check.h"

#define ROWS_MAX 64u

static const char *word(enum mf_check_state state)
{
    switch (state) {
    case MF_CHECK_OK:
        return "ok";
    case MF_CHECK_MISSING:
        return "missing";
    case MF_CHECK_LIMITED:
        return "limited";
    }
    return "unknown";
}

static json_t *to_json(const struct mf_check *rows, size_t count, bool able)
{
    json_t *checks = json_object();
    for (size_t i = 0; i < count; i++) {
        json_t *row =
            json_pack("{s:s, s:o, s:o, s:o}", "state", word(rows[i].state), "title",
                      show_json_text(rows[i].title), "found", show_json_text(rows[i].found),
                      "remedy", show_json_text(rows[i].remedy));
        if (json_object_set_new(checks, rows[i].name, row) < 0) {
            json_decref(checks);
            return NULL;
        }
    }
    return json_pack("{s:b, s:o}", "able", able, "checks", checks);
}

static void print(const struct mf_check *rows, size_t count, bool able)
{
    int title = 0;
    unsigned missing = 0, limited = 0;
    for (size_t i = 0; i < count; i++) {
        int length = (int)strlen(rows[i].title);
        title = length > title ? length : title;
        missing += rows[i].state == MF_CHECK_MISSING;
        limited += rows[i].state == MF_CHECK_LIMITED;
    }
    for (size_t i = 0; i < count; i++) {
        printf("%-7s  %-*s  %s\n", word(rows[i].state), title, rows[i].title, rows[i].found);
        if (rows[i].remedy[0])
            printf("         -> %s\n", rows[i].remedy);
    }
    if (!able)
        printf("\nThis host is not able to run memferry: %u of %zu things are missing.\n", missing,
               count);
    else if (limited)
        printf("\nThis host is able to run memferry; %u things are limited, as said above.\n",
               limited);
    else
        puts("\nThis host is able to run memferry.");
    if (geteuid() != 0)
        puts("This was checked as an ordinary user; memferryd runs as root, so look again with "
             "sudo.");
}

int verb_check(const struct cli_args *args)
{
    static struct mf_check rows[ROWS_MAX];
    size_t count = mf_check_host(rows, ROWS_MAX);
    bool able = !mf_check_first_missing(rows, count);
    if (args->json) {
        int rc = show_json(to_json(rows, count, able));
        return rc ? rc : able ? CLI_DONE : CLI_FAILED;
    }
    print(rows, count, able);
    return able ? CLI_DONE : CLI_FAILED;
}
