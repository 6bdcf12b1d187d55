/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "lib/log.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static struct {
    const char *program;
    enum mf_log_level most;
    int journal;
} logger = {"memferry", MF_LOG_INFO, -1};

void mf_log_setup(const char *program, enum mf_log_level most)
{
    logger.program = program;
    logger.most = most;
    /* systemd sets it when stderr is a stream to the journal (sd-daemon(3)). */
    logger.journal = getenv("JOURNAL_STREAM") != NULL;
}

static const char *word(enum mf_log_level level)
{
    switch (level) {
    case MF_LOG_ERR:
        return "error: ";
    case MF_LOG_WARNING:
        return "warning: ";
    case MF_LOG_DEBUG:
        return "debug: ";
    case MF_LOG_NOTICE:
    case MF_LOG_INFO:
        break;
    }
    return "";
}

void mf_log(enum mf_log_level level, const char *fmt, ...)
{
    if (level > logger.most)
        return;
    char line[1200];
    int at = logger.journal == 1
                 ? snprintf(line, sizeof(line), "<%d>", (int)level)
                 : snprintf(line, sizeof(line), "%s: %s", logger.program, word(level));
    va_list ap;
    va_start(ap, fmt);
    int more = vsnprintf(line + at, sizeof(line) - (size_t)at - 1, fmt, ap);
    va_end(ap);
    size_t length = (size_t)at + (size_t)(more > 0 ? more : 0);
    if (length > sizeof(line) - 2)
        length = sizeof(line) - 2;
    line[length++] = '\n';
    /* A log line that can't be written has nobody left to tell. */
    ssize_t ignored = write(STDERR_FILENO, line, length);
    (void)ignored;
}
