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

void forecast_update(struct forecast *forecast, uint32_t round, uint64_t left_bytes)
{
    if (round < forecast->round)
        *forecast = (struct forecast){.round = 0};
    if (round > forecast->round) {
        /* A round that came and went between two looks is not known: no comparison over it. */
        forecast->known = forecast->round && round == forecast->round + 1 && forecast->begun_bytes;
        if (forecast->known)
            forecast->again = (double)left_bytes / (double)forecast->begun_bytes;
        forecast->round = round;
        forecast->begun_bytes = left_bytes;
    } else if (left_bytes > forecast->begun_bytes) {
        forecast->begun_bytes = left_bytes;
    }
}

bool forecast_bytes(const struct forecast *forecast, uint64_t left_bytes, bool follows,
                    uint64_t *out)
{
    double more = 0;
    if (forecast->known && forecast->again < 0.95)
        more = (double)forecast->begun_bytes * forecast->again / (1 - forecast->again);
    else if (forecast->known && !follows)
        return false;
    else if (forecast->known)
        more = (double)forecast->begun_bytes * forecast->again;
    *out = left_bytes + (uint64_t)more;
    return true;
}

static bool in_rounds(const Memferry__Control__Session *session)
{
    return session->rounds && strcmp(session->state, "precopy") == 0;
}

/* "round 2, 120 MiB left  812 MiB/s  4,120 pages/s written  3.0 s to go" */
static void round_figures(const struct progress *progress,
                          const Memferry__Control__Session *session, const char *separator,
                          char *out, size_t out_bytes)
{
    char end[64] = "", rate[48] = "", written[64] = "";
    if (progress->sent.known)
        snprintf(rate, sizeof(rate), "%s%s/s", separator,
                 show_bytes((uint64_t)progress->sent.per_second).text);
    /* Zero pages and holes go faster than bytes do; a short round is not measured by itself. */
    double per_second =
        progress->round.known ? progress->round.per_second : progress->sent.per_second;
    uint64_t bytes = 0;
    bool follows = strcmp(session->mode, "precopy") != 0;
    if (!forecast_bytes(&progress->forecast, session->round_left_bytes, follows, &bytes))
        snprintf(end, sizeof(end), "%sno end in sight", separator);
    else if (per_second > 0 && (double)bytes / per_second < 86400)
        snprintf(end, sizeof(end), "%s%s to go", separator,
                 show_us((double)bytes / per_second * 1e6).text);
    /* The first round has nothing to compare with. */
    if (session->rounds > 1 || session->dirty_rate_pages_s)
        snprintf(written, sizeof(written), "%s%s pages/s written", separator,
                 show_count(session->dirty_rate_pages_s).text);
    snprintf(out, out_bytes, "round %u, %s left%s%s%s", session->rounds,
             show_bytes(session->round_left_bytes).text, rate, written, end);
}

/* "440 MiB of 1.0 GiB  812 MiB/s  1,234 faults  3.0 s left"; @brief: without "of 1.0 GiB". */
static void figures(const struct progress *progress, const Memferry__Control__Session *session,
                    const char *separator, bool brief, char *out, size_t out_bytes)
{
    if (in_rounds(session)) {
        round_figures(progress, session, separator, out, out_bytes);
        return;
    }
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
                        (int)(show_share(session) * 100), text);
    int room = columns - 1 - used - 4;
    return room > BAR_MOST_COLUMNS ? BAR_MOST_COLUMNS : room;
}

static void draw_bar(struct progress *progress, const Memferry__Control__Session *session)
{
    char text[256], line[512], bar[64] = "";
    int columns = terminal_columns();
    figures(progress, session, "  ", false, text, sizeof(text));
    int room = bar_room(session, text, columns);
    /* Where it is narrow the total gives way first, then the bar, then the end of the line. */
    if (room < BAR_LEAST_COLUMNS) {
        figures(progress, session, "  ", true, text, sizeof(text));
        room = bar_room(session, text, columns);
    }
    if (room >= BAR_LEAST_COLUMNS) {
        int full = (int)(show_share(session) * room);
        bar[0] = '[';
        for (int i = 0; i < room; i++)
            bar[i + 1] = i < full ? '=' : i == full ? '>' : ' ';
        memcpy(bar + room + 1, "]  ", 4);
    }
    snprintf(line, sizeof(line), "%s  %-10s  %s%3d %%  %s", session->name, session->state, bar,
             (int)(show_share(session) * 100), text);
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
    char text[256];
    figures(progress, session, ", ", false, text, sizeof(text));
    fprintf(stderr, "%s: %s: %s", session->name, session->state, show_state(session));
    if (session->ram_bytes && session->sent_bytes)
        fprintf(stderr, "; %d %%, %s", (int)(show_share(session) * 100), text);
    fputc('\n', stderr);
}

/* What must not scroll by unseen within a bar: a fallback, and a sentence that explains the state.
 */
static void tell_news(struct progress *progress, const Memferry__Control__Session *session)
{
    char reason[sizeof(progress->reason)];
    snprintf(reason, sizeof(reason), "%s", session->reason);
    bool new_reason = reason[0] && strcmp(progress->reason, reason) != 0;
    bool new_mode =
        progress->mode[0] && session->mode[0] && strcmp(progress->mode, session->mode) != 0;
    if (new_reason || new_mode)
        progress_clear(progress);
    if (new_mode)
        fprintf(stderr, "%s: the migration is %s now instead of %s\n", session->name, session->mode,
                progress->mode);
    if (new_reason)
        fprintf(stderr, "%s: %s: %s\n", session->name, session->state, session->reason);
    snprintf(progress->mode, sizeof(progress->mode), "%s", session->mode);
    memcpy(progress->reason, reason, sizeof(reason));
}

void progress_show(struct progress *progress, const Memferry__Control__Session *session)
{
    if (!progress->wanted)
        return;
    uint64_t now_ns = mf_now_ns();
    rate_update(&progress->sent, session->sent_bytes, now_ns);
    rate_update(&progress->confirmed, session->confirmed_bytes, now_ns);
    if (in_rounds(session)) {
        uint32_t round_before = progress->forecast.round;
        forecast_update(&progress->forecast, session->rounds, session->round_left_bytes);
        if (progress->forecast.round != round_before)
            progress->round = (struct rate){.at_ns = 0};
        rate_update(&progress->round, progress->forecast.begun_bytes - session->round_left_bytes,
                    now_ns);
    }
    bool changed = strcmp(progress->state, session->state) != 0;
    snprintf(progress->state, sizeof(progress->state), "%s", session->state);
    tell_news(progress, session);
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
