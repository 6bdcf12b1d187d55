/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/memferry/monitor_output.h"

#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "daemon/memferry/units.h"
#include "lib/util.h"

#define RING_BYTES (size_t)(4 << 20)
#define CHUNK_BYTES (size_t)4096 /**< written at a time: how a slow reader is told from none */

/* ---- lines ---- */

/* The widths of the columns; a range takes two addresses of 12 digits as a rule. */
#define COLUMNS "%-15s  %7s  %7s  %-6s  %-25s  %9s  %s"

const char *monitor_header(void)
{
    static char line[MONITOR_LINE_BYTES];
    snprintf(line, sizeof(line), COLUMNS "\n", "TIME", "PID", "TID", "EVENT", "RANGE", "SIZE",
             "REASON");
    return line;
}

/** number() - "-" for what is not known or does not apply. */
static const char *number(pid_t value, char *out, size_t size)
{
    snprintf(out, size, value ? "%d" : "-", value);
    return out;
}

size_t monitor_line(const struct mf_change *change, char *out)
{
    char when[32], pid[16], tid[16], range[48] = "-", bytes[32] = "-", reason[64];
    time_t seconds = (time_t)(change->time_us / 1000000);
    struct tm local;
    localtime_r(&seconds, &local);
    size_t length = strftime(when, sizeof(when), "%H:%M:%S", &local);
    snprintf(when + length, sizeof(when) - length, ".%06u", (unsigned)(change->time_us % 1000000));
    if (change->end_addr) {
        snprintf(range, sizeof(range), "%" PRIx64 "-%" PRIx64, change->start_addr,
                 change->end_addr);
        snprintf(bytes, sizeof(bytes), "%s",
                 show_bytes(change->end_addr - change->start_addr).text);
    }
    snprintf(reason, sizeof(reason), "%s", mf_reason_name(change->reason));
    length = strlen(reason);
    if (change->kind == MF_CHANGE_REMAP)
        snprintf(reason + length, sizeof(reason) - length, " to %" PRIx64, change->to_addr);
    else if (change->kind == MF_CHANGE_FORK && change->child)
        snprintf(reason + length, sizeof(reason) - length, " of %d", change->child);
    int written =
        snprintf(out, MONITOR_LINE_BYTES, COLUMNS "\n", when, number(change->pid, pid, sizeof(pid)),
                 number(change->tid, tid, sizeof(tid)), mf_change_kind_name(change->kind), range,
                 bytes, reason);
    return (size_t)written;
}

size_t monitor_json(const struct mf_change *change, char *out)
{
    char child[32] = "";
    if (change->kind == MF_CHANGE_FORK)
        snprintf(child, sizeof(child), ", \"child\": %d", change->child);
    int written = snprintf(out, MONITOR_LINE_BYTES,
                           "{\"time_us\": %" PRIu64
                           ", \"pid\": %d, \"tid\": %d, \"event\": \"%s\", \"start\": %" PRIu64
                           ", \"end\": %" PRIu64 ", \"to\": %" PRIu64 ", \"reason\": \"%s\"%s}\n",
                           change->time_us, change->pid, change->tid,
                           mf_change_kind_name(change->kind), change->start_addr, change->end_addr,
                           change->to_addr, mf_reason_name(change->reason), child);
    return (size_t)written;
}

/* ---- the thread that writes them ---- */

static void *writer(void *arg)
{
    struct monitor_output *output = arg;
    pthread_mutex_lock(&output->lock);
    for (;;) {
        while (output->used == 0 && !output->closing)
            pthread_cond_wait(&output->filled, &output->lock);
        if (output->used == 0 || output->failed)
            break;
        size_t tail = (output->head + RING_BYTES - output->used) % RING_BYTES;
        size_t length_bytes = RING_BYTES - tail < output->used ? RING_BYTES - tail : output->used;
        length_bytes = length_bytes < CHUNK_BYTES ? length_bytes : CHUNK_BYTES;
        pthread_mutex_unlock(&output->lock);
        /* Nobody touches what is in the ring but us. */
        int rc = mf_write_all(STDOUT_FILENO, output->ring + tail, length_bytes);
        pthread_mutex_lock(&output->lock);
        output->used -= length_bytes;
        output->failed |= rc < 0;
        pthread_cond_signal(&output->drained);
    }
    output->ended = true;
    pthread_cond_signal(&output->drained);
    pthread_mutex_unlock(&output->lock);
    return NULL;
}

/** await_writer() - until it has got on. Whoever asks us to end is not kept waiting by a reader
 * that takes nothing. Called with the lock held. */
static void await_writer(struct monitor_output *output)
{
    struct pollfd asked = {.fd = output->signal_fd, .events = POLLIN};
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec++;
    if (pthread_cond_clockwait(&output->drained, &output->lock, CLOCK_MONOTONIC, &until) ==
        ETIMEDOUT)
        output->failed |= poll(&asked, 1, 0) > 0;
}

int monitor_output_start(struct monitor_output *output, int signal_fd)
{
    *output = (struct monitor_output){.lock = PTHREAD_MUTEX_INITIALIZER,
                                      .filled = PTHREAD_COND_INITIALIZER,
                                      .drained = PTHREAD_COND_INITIALIZER,
                                      .ring = malloc(RING_BYTES),
                                      .signal_fd = signal_fd};
    if (!output->ring)
        return -ENOMEM;
    int code = pthread_create(&output->thread, NULL, writer, output);
    if (code)
        free(output->ring);
    return -code;
}

void monitor_output_add(struct monitor_output *output, const char *line, size_t length_bytes)
{
    pthread_mutex_lock(&output->lock);
    while (RING_BYTES - output->used < length_bytes && !output->failed)
        await_writer(output);
    for (size_t done = 0; done < length_bytes && !output->failed;) {
        size_t part = RING_BYTES - output->head;
        part = part < length_bytes - done ? part : length_bytes - done;
        memcpy(output->ring + output->head, line + done, part);
        output->head = (output->head + part) % RING_BYTES;
        output->used += part;
        done += part;
    }
    pthread_cond_signal(&output->filled);
    pthread_mutex_unlock(&output->lock);
}

bool monitor_output_failed(struct monitor_output *output)
{
    struct pollfd reader = {.fd = STDOUT_FILENO};
    bool gone = poll(&reader, 1, 0) > 0 && (reader.revents & (POLLERR | POLLHUP));
    pthread_mutex_lock(&output->lock);
    output->failed |= gone;
    bool failed = output->failed;
    pthread_mutex_unlock(&output->lock);
    return failed;
}

bool monitor_output_finish(struct monitor_output *output)
{
    pthread_mutex_lock(&output->lock);
    output->closing = true;
    pthread_cond_signal(&output->filled);
    while (!output->ended && !output->failed)
        await_writer(output);
    bool stuck = !output->ended;
    pthread_mutex_unlock(&output->lock);
    if (stuck) /* in write(2) */
        pthread_cancel(output->thread);
    pthread_join(output->thread, NULL);
    free(output->ring);
    return !output->failed;
}
