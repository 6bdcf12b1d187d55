/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The one logger: lines on stderr, each with an sd-daemon(3) priority prefix ("<6>…") when stderr
 * goes to the journal ($JOURNAL_STREAM) and with a plain word otherwise. Thread-safe: one write(2)
 * a line.
 */
#pragma once

enum mf_log_level {
    MF_LOG_ERR = 3,
    MF_LOG_WARNING = 4,
    MF_LOG_NOTICE = 5,
    MF_LOG_INFO = 6,
    MF_LOG_DEBUG = 7,
};

/** mf_log_setup() - name the program in lines and set the most talkative level that is printed. */
void mf_log_setup(const char *program, enum mf_log_level most);

/** mf_log() - print one line at @level; @fmt without a trailing newline. */
void mf_log(enum mf_log_level level, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
