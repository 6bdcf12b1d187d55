/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/memferry/progress.h"

#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "daemon/memferry/show.h"
#include "daemon/memferry/units.h"
#include "lib/util.h"

#define NS_PER_SECOND 1000000000ull

/** Where there is no terminal: a line at most this often, unless the state changed. */
static const uint64_t line_interval_ns = 3 * NS_PER_SECOND;

void rate_update(struct rate *rate, uint64_t value, uint64_t now_ns)
{
    const double smoothing_seconds = 2;
    if (!rate->at_ns || value < rate->value) {
        *rate = (struct rate){.value = value, .at_ns = now_ns};
        return;
    }
    double seconds = (double)(now_ns - rate->at_ns) / (double)NS_PER_SECOND;
    if (seconds < 0.05)
        return;
    double now = (double)(value - rate->value) / seconds;
    double weight = seconds / (seconds + smoothing_seconds);
    rate->per_second = rate->known ? rate->per_second + weight * (now - rate->per_second) : now;
    rate->known = true;
    rate->value = value;
    rate->at_ns = now_ns;
}

void progress_open(struct progress *progress, bool wanted)
{
    *progress = (struct progress){.wanted = wanted, .terminal = isatty(STDERR_FILENO) == 1};
}

static double share(const Memferry__Control__Session *session)
{
    if (!session->ram_bytes)
        return 0;
    double done = (double)session->confirmed_bytes / (double)session->ram_bytes;
    return done > 1 ? 1 : done;
}

/* "440 MiB of 1.0 GiB  812 MiB/s  1,234 faults  3.0 s left"; @brief: without "of 1.0 GiB". */
static void figures(const struct progress *progress, const Memferry__Control__Session *session,
                    const char *separator, bool brief, char *out, size_t out_bytes)
{
    char left[48] = "", rate[48] = "", whole[48] = "";
    if (!brief)
        snprintf(whole, sizeof(whole), " of %s", show_bytes(session->ram_bytes).text);
    if (progress->sent.known)
        snprintf(rate, sizeof(rate), "%s%s/s", separator,
                 show_bytes((uint64_t)progress->sent.per_second).text);
    if (progress->confirmed.per_second > 0 && session->ram_bytes > session->confirmed_bytes) {
        double seconds = (double)(session->ram_bytes - session->confirmed_bytes) /
                         progress->confirmed.per_second;
        if (seconds < 86400)
            snprintf(left, sizeof(left), "%s%s left", separator, show_us(seconds * 1e6).text);
    }
    snprintf(out, out_bytes, "%s%s%s%s%s faults%s", show_bytes(session->confirmed_bytes).text,
             whole, rate, separator, show_count(session->faults ? session->faults->count : 0).text,
             left);
}

static int terminal_columns(void)
{
    struct winsize size;
    if (ioctl(STDERR_FILENO, TIOCGWINSZ, &size) < 0 || size.ws_col == 0)
        return 80;
    return size.ws_col;
}

#define BAR_LEAST_COLUMNS 6
#define BAR_MOST_COLUMNS 30

/* Columns that are left for the bar beside @text; µ has two bytes and one column, which is near
 * enough. */
static int bar_room(const Memferry__Control__Session *session, const char *text, int columns)
{
    int used = snprintf(NULL, 0, "%s  %-10s  %3d %%  %s", session->name, session->state,
                        (int)(share(session) * 100), text);
    int room = columns - 1 - used - 4;
    return room > BAR_MOST_COLUMNS ? BAR_MOST_COLUMNS : room;
}

static void draw_bar(struct progress *progress, const Memferry__Control__Session *session)
{
    char text[160], line[512], bar[64] = "";
    int columns = terminal_columns();
    figures(progress, session, "  ", false, text, sizeof(text));
    int room = bar_room(session, text, columns);
    /* Where it is narrow the total gives way first, then the bar, then the end of the line. */
    if (room < BAR_LEAST_COLUMNS) {
        figures(progress, session, "  ", true, text, sizeof(text));
        room = bar_room(session, text, columns);
    }
    if (room >= BAR_LEAST_COLUMNS) {
        int full = (int)(share(session) * room);
        bar[0] = '[';
        for (int i = 0; i < room; i++)
            bar[i + 1] = i < full ? '=' : i == full ? '>' : ' ';
        memcpy(bar + room + 1, "]  ", 4);
    }
    snprintf(line, sizeof(line), "%s  %-10s  %s%3d %%  %s", session->name, session->state, bar,
             (int)(share(session) * 100), text);
    size_t cut = columns > 1 ? (size_t)columns - 1 : 0;
    if (cut < strlen(line)) {
        while (cut && (line[cut] & 0xc0) == 0x80) /* not within a character of UTF-8 */
            cut--;
        line[cut] = '\0';
    }
    fprintf(stderr, "\r%s\033[K", line);
    fflush(stderr);
    progress->drawn = true;
}

static void print_line(struct progress *progress, const Memferry__Control__Session *session)
{
    char text[160];
    figures(progress, session, ", ", false, text, sizeof(text));
    fprintf(stderr, "%s: %s: %s", session->name, session->state, show_state(session));
    if (session->ram_bytes && session->sent_bytes)
        fprintf(stderr, "; %d %%, %s", (int)(share(session) * 100), text);
    fputc('\n', stderr);
}

void progress_show(struct progress *progress, const Memferry__Control__Session *session)
{
    if (!progress->wanted)
        return;
    uint64_t now_ns = mf_now_ns();
    rate_update(&progress->sent, session->sent_bytes, now_ns);
    rate_update(&progress->confirmed, session->confirmed_bytes, now_ns);
    bool changed = strcmp(progress->state, session->state) != 0;
    snprintf(progress->state, sizeof(progress->state), "%s", session->state);
    if (changed && session->reason[0]) {
        progress_clear(progress);
        fprintf(stderr, "%s: %s: %s\n", session->name, session->state, session->reason);
    }
    if (progress->terminal) {
        draw_bar(progress, session);
    } else if (changed || now_ns - progress->printed_ns >= line_interval_ns) {
        print_line(progress, session);
        progress->printed_ns = now_ns;
    }
}

void progress_clear(struct progress *progress)
{
    if (progress->drawn)
        fputs("\r\033[K", stderr);
    progress->drawn = false;
}
