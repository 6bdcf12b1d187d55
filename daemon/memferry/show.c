/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/memferry/show.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/memferry/units.h"
#include "lib/util.h"

typedef Memferry__Control__Session Session;

/* ---- for programs ---- */

json_t *show_json_text(const char *text)
{
    json_t *string = json_string(text);
    if (string)
        return string;
    cleanup_free char *copy = strdup(text);
    for (char *at = copy; at && *at; at++) {
        if (*at & 0x80)
            *at = '?';
    }
    return copy ? json_string(copy) : NULL;
}

static json_t *unsigned_json(uint64_t value)
{
    /* JSON integers of jansson are signed; nothing here counts to 2^63. */
    return json_integer(value > INT64_MAX ? INT64_MAX : (json_int_t)value);
}

static json_t *text_or_null(const char *text)
{
    return text ? show_json_text(text) : json_null();
}

static json_t *session_json(const Session *s, const char *role, const char *state)
{
    static const Memferry__Control__Faults none = MEMFERRY__CONTROL__FAULTS__INIT;
    const Memferry__Control__Faults *faults = s->faults ? s->faults : &none;
    return json_pack(
        "{s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:{s:o, s:f, s:f, s:f, s:f}, "
        "s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o}",
        "name", show_json_text(s->name), "id", show_json_text(s->id), "role", text_or_null(role),
        "state", text_or_null(state), "reason", show_json_text(s->reason), "ram_bytes",
        unsigned_json(s->ram_bytes), "blackout_us", unsigned_json(s->blackout_us), "total_us",
        unsigned_json(s->total_us), "sent_bytes", unsigned_json(s->sent_bytes), "data_pages",
        unsigned_json(s->data_pages), "zero_pages", unsigned_json(s->zero_pages), "hole_pages",
        unsigned_json(s->hole_pages), "faults", "count", unsigned_json(faults->count), "p50_us",
        faults->p50_us, "p99_us", faults->p99_us, "p999_us", faults->p999_us, "max_us",
        faults->max_us, "mover_restarts", unsigned_json(s->mover_restarts), "mode",
        show_json_text(s->mode), "rounds", unsigned_json(s->rounds), "precopy_bytes",
        unsigned_json(s->precopy_bytes), "postcopy_bytes", unsigned_json(s->postcopy_bytes),
        "dirty_pages_at_switch", unsigned_json(s->dirty_pages_at_switch), "dirty_rate_pages_s",
        unsigned_json(s->dirty_rate_pages_s), "unconfirmed_at_release",
        unsigned_json(s->unconfirmed_at_release), "adapter", show_json_text(s->adapter), "pid",
        unsigned_json(s->pid));
}

json_t *show_json_session(const Session *session)
{
    return session_json(session, session->role, session->state);
}

json_t *show_json_failure(const char *name, const char *role, const char *state, const char *reason)
{
    /* protobuf-c's strings are not const; nothing is written to them. */
    Session none = MEMFERRY__CONTROL__SESSION__INIT;
    none.name = (char *)(name ? name : "");
    none.reason = (char *)reason;
    return session_json(&none, role, state);
}

int show_json(json_t *object)
{
    /* Twelve digits are more than was measured, and keep 0.1 from becoming 0.10000000000000001. */
    cleanup_free char *text =
        object ? json_dumps(object, JSON_INDENT(2) | JSON_REAL_PRECISION(12)) : NULL;
    json_decref(object);
    if (!text) {
        fputs("memferry: out of memory to print JSON\n", stderr);
        return 1;
    }
    puts(text);
    return 0;
}

/* ---- for people ---- */

static const struct {
    const char *state, *source, *destination;
} state_words[] = {
    {"waiting", "waiting", "armed: waits for 'memferry migrate' on the source"},
    {"connecting", "reaching the other host", "the source is connecting"},
    {"precopy", "the guest runs here while its memory is sent",
     "the guest runs at the source while its memory arrives"},
    {"switchover", "the guest is paused and changes hosts",
     "the guest is paused and changes hosts"},
    {"postcopy", "the guest runs on the other host, its memory follows",
     "the guest runs here, its memory follows"},
    {"drained", "all memory has arrived, closing up", "all memory has arrived, closing up"},
    {"done", "the guest runs on the other host", "the guest runs here"},
    {"recovering",
     "a connection or process was lost after the guest had changed hosts; the session "
     "is being resumed",
     "a connection or process was lost after the guest had changed hosts; the session is being "
     "resumed"},
    {"failed", "it did not come about", "it did not come about"},
    {"cancelled", "cancelled by command", "cancelled by command"},
};

static bool is_source(const Session *session)
{
    return strcmp(session->role, "source") == 0;
}

const char *show_state(const Session *session)
{
    if (strcmp(session->state, "failed") == 0 && session->released)
        return is_source(session) ? "after the guest had left for the other host"
                                  : "after the guest had come to this host";
    for (size_t i = 0; i < sizeof(state_words) / sizeof(state_words[0]); i++) {
        if (strcmp(session->state, state_words[i].state) == 0)
            return is_source(session) ? state_words[i].source : state_words[i].destination;
    }
    return session->state;
}

double show_share(const Session *session)
{
    uint64_t held_bytes = session->confirmed_bytes;
    if (!session->ram_bytes)
        return 0;
    if (session->rounds && strcmp(session->state, "precopy") == 0)
        held_bytes = session->ram_bytes > session->round_left_bytes
                         ? session->ram_bytes - session->round_left_bytes
                         : 0;
    double share = (double)held_bytes / (double)session->ram_bytes;
    return share > 1 ? 1 : share;
}

static unsigned percent(const Session *session)
{
    return (unsigned)(show_share(session) * 100);
}

/* What happened before and after RELEASE, where memory was sent ahead. */
static void print_rounds(const Session *s)
{
    if (!s->rounds)
        return;
    printf("  %u %s sent %s while the guest ran here", s->rounds,
           s->rounds == 1 ? "round" : "rounds", show_bytes(s->precopy_bytes).text);
    if (strcmp(s->mode, "precopy") == 0 && !s->unconfirmed_at_release)
        puts("; all of its memory was there before it changed hosts.");
    else
        printf(", %s followed it: it had written %s pages again.\n",
               show_bytes(s->postcopy_bytes).text, show_count(s->dirty_pages_at_switch).text);
}

static void print_faults(const char *indent, const Memferry__Control__Faults *faults)
{
    if (!faults || !faults->count)
        return;
    printf(
        "%s%s page faults had to wait for their memory: half of them up to %s, 99 %% up to %s, the "
        "longest %s.\n",
        indent, show_count(faults->count).text, show_us(faults->p50_us).text,
        show_us(faults->p99_us).text, show_us(faults->max_us).text);
}

void show_status(const Session *s)
{
    printf("%s: %s (%s)\n", s->name, s->state, show_state(s));
    if (s->reason[0])
        printf("  reason          %s\n", s->reason);
    printf("  role            %s\n", s->role);
    if (s->peer[0])
        printf("  other side      %s\n", s->peer);
    if (s->id[0])
        printf("  session         %s\n", s->id);
    if (s->pid)
        printf("  %s         %u\n", strcmp(s->adapter, "process") == 0 ? "process" : "VM     ",
               s->pid);
    if (s->mode[0])
        printf("  mode            %s\n", s->mode);
    if (s->ram_bytes)
        printf("  memory          %s, %u %% held by the destination\n",
               show_bytes(s->ram_bytes).text, percent(s));
    if (s->rounds) {
        printf("  rounds          %u", s->rounds);
        if (strcmp(s->state, "precopy") == 0)
            printf(", %s left of this one", show_bytes(s->round_left_bytes).text);
        printf("; the guest writes %s pages a second\n", show_count(s->dirty_rate_pages_s).text);
    }
    if (s->released && s->rounds)
        printf("  at RELEASE      %s pages not confirmed, %s of them written again\n",
               show_count(s->unconfirmed_at_release).text,
               show_count(s->dirty_pages_at_switch).text);
    if (s->bandwidth_bits_s)
        printf("  limit           %s\n", show_bits(s->bandwidth_bits_s).text);
    if (s->blackout_us)
        printf("  blackout        %s (how long the guest stood still)\n",
               show_us((double)s->blackout_us).text);
    if (s->total_us)
        printf("  time            %s\n", show_us((double)s->total_us).text);
    if (s->sent_bytes)
        printf("  %s        %s", is_source(s) ? "sent    " : "received",
               show_bytes(s->sent_bytes).text);
    if (s->sent_bytes && s->rounds)
        printf(": %s before the guest changed hosts, %s after", show_bytes(s->precopy_bytes).text,
               show_bytes(s->postcopy_bytes).text);
    if (s->sent_bytes)
        putchar('\n');
    if (s->data_pages || s->zero_pages || s->hole_pages)
        printf("  pages           %s with data, %s zero, %s never used\n",
               show_count(s->data_pages).text, show_count(s->zero_pages).text,
               show_count(s->hole_pages).text);
    /* The source counts while pages move and is told the latencies at the end. */
    if (s->faults && s->faults->count && s->faults->max_us <= 0)
        printf("  faults          %s so far\n", show_count(s->faults->count).text);
    else if (s->faults && s->faults->count)
        printf("  faults          %s: median %s, 99 %% %s, 99.9 %% %s, longest %s\n",
               show_count(s->faults->count).text, show_us(s->faults->p50_us).text,
               show_us(s->faults->p99_us).text, show_us(s->faults->p999_us).text,
               show_us(s->faults->max_us).text);
    if (s->mover_restarts)
        printf("  mover restarts  %u\n", s->mover_restarts);
}

static int width(int least, const char *text)
{
    int length = (int)strlen(text);
    return length > least ? length : least;
}

void show_table(Memferry__Control__Session *const *sessions, size_t count)
{
    if (!count) {
        puts("No sessions on this host. 'memferry receive' and 'memferry migrate' make them.");
        return;
    }
    int name = 4, peer = 10;
    for (size_t i = 0; i < count; i++) {
        name = width(name, sessions[i]->name);
        peer = width(peer, sessions[i]->peer);
    }
    printf("%-*s  %-11s  %-10s  %9s  %5s  %10s  %10s  %-*s  %s\n", name, "NAME", "ROLE", "STATE",
           "MEMORY", "HELD", "BLACKOUT", "TIME", peer, "OTHER SIDE", "REASON");
    for (size_t i = 0; i < count; i++) {
        const Session *s = sessions[i];
        char held[8] = "-";
        if (s->ram_bytes)
            snprintf(held, sizeof(held), "%u %%", percent(s));
        struct text blackout = show_us((double)s->blackout_us);
        printf("%-*s  %-11s  %-10s  %9s  %5s  %*s  %10s  %-*s  %s\n", name, s->name, s->role,
               s->state, s->ram_bytes ? show_bytes(s->ram_bytes).text : "-", held,
               /* printf pads by bytes, and µ takes two of them. */
               strstr(blackout.text, "µ") ? 11 : 10, s->blackout_us ? blackout.text : "-",
               s->total_us ? show_us((double)s->total_us).text : "-", peer,
               s->peer[0] ? s->peer : "-", s->reason[0] ? s->reason : "-");
    }
}

void show_summary(const Session *s, bool keep_source)
{
    printf("Done: %s runs on %s, with all of its memory.\n", s->name,
           s->peer[0] ? s->peer : "the other host");
    printf("  It stood still for %s; the migration took %s.\n",
           show_us((double)s->blackout_us).text, show_us((double)s->total_us).text);
    printf("  %s of RAM moved by sending %s: %s pages had data, %s were zero, %s had never been "
           "used.\n",
           show_bytes(s->ram_bytes).text, show_bytes(s->sent_bytes).text,
           show_count(s->data_pages).text, show_count(s->zero_pages).text,
           show_count(s->hole_pages).text);
    print_rounds(s);
    print_faults("  ", s->faults);
    if (s->mover_restarts)
        printf("  memferry-mover was replaced %u times on the way; nothing was lost.\n",
               s->mover_restarts);
    const bool process = strcmp(s->adapter, "process") == 0;
    if (process)
        puts(keep_source
                 ? "  The process here is left stopped, as asked for; never let it run again "
                   "beside the other."
                 : "  The process here was ended.");
    else
        puts(keep_source ? "  The VM here is left paused, as asked for; never let it run again "
                           "beside the other."
                         : "  The VM here was told to quit.");
}
