/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The configuration file: one section, [memferryd], and a table of its keys. A file is taken as a
 * whole or not at all, and whatever is not understood is an error: a setting that is silently
 * ignored is one that its author believes in.
 */
#include "daemon/memferryd/daemon.h"

#include <errno.h>
#include <ini.h>
#include <pwd.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>
#include <sys/stat.h>

#include "lib/control_message.h"
#include "lib/endpoint.h"
#include "lib/log.h"
#include "lib/util.h"

_Static_assert(MF_MAX_STREAMS == MF_CONTROL_STREAMS_MAX, "one limit for the command line and here");

/* Until the peers authenticate each other nobody but this host may connect by default. */
static const char default_listen_address[] = "127.0.0.1";
static const char default_mover_user[] = "memferry";

/* One for every few cores: more than the host has to spare only takes time from the guests' faults.
 */
static unsigned default_streams(void)
{
    long cpus = sysconf(_SC_NPROCESSORS_ONLN);
    unsigned streams = cpus > 0 ? (unsigned)cpus / MF_CPUS_PER_STREAM : 1;
    if (streams > MF_MOST_DEFAULT_STREAMS)
        return MF_MOST_DEFAULT_STREAMS;
    return streams ? streams : 1;
}

void config_defaults(struct config *config)
{
    memset(config, 0, sizeof(*config)); /* also what lies between the members: it gets compared */
    snprintf(config->runtime_dir, sizeof(config->runtime_dir), "%s", MF_DEFAULT_RUNTIME_DIR);
    config->listen_port = MF_DEFAULT_PORT;
    config->streams = default_streams();
    snprintf(config->congestion, sizeof(config->congestion), "%s", MF_CONGESTION_AUTO);
    config->log_level = MF_LOG_INFO;
    memcpy(config->listen_address, default_listen_address, sizeof(default_listen_address));
    /* Run from a build tree, where sysusers.d was not applied. */
    snprintf(config->mover_user, sizeof(config->mover_user), "%s",
             getpwnam(default_mover_user) ? default_mover_user : "nobody");
}

int config_listen(struct config *config, const char *text, struct mf_error *err)
{
    struct mf_endpoint endpoint;
    struct mf_error why;
    if (mf_endpoint_parse(text, &endpoint, &why) < 0)
        return mf_fail(err, EINVAL, "cannot listen: %s", why.text);
    /* A name could resolve to an address that nobody meant to open. */
    const char *host = endpoint.host;
    if (host[0] && !strchr(host, ':') && !mf_ipv4_valid(host))
        return mf_fail(err, EINVAL,
                       "cannot listen on '%s': it is not a numeric address; write it as in "
                       "192.0.2.1:7466, [2001:db8::1]:7466 or :7466",
                       host);
    if (!host[0] && !endpoint.port)
        return mf_fail(err, EINVAL,
                       "cannot listen on an empty address; write it as in 192.0.2.1:7466, "
                       "[2001:db8::1]:7466 or :7466");
    if (host[0])
        snprintf(config->listen_address, sizeof(config->listen_address), "%s", host);
    if (endpoint.port)
        config->listen_port = endpoint.port;
    return 0;
}

/* ---- the keys; each setter says in one clause what would have been right ---- */

static int copy_absolute(char *out, size_t out_bytes, const char *value, struct mf_error *err)
{
    if (value[0] != '/')
        return mf_fail(err, EINVAL, "the path must be absolute");
    if (strlen(value) >= out_bytes)
        return mf_fail(err, EINVAL, "the path is longer than %zu bytes", out_bytes - 1);
    snprintf(out, out_bytes, "%s", value);
    return 0;
}

static int set_runtime_dir(struct config *config, const char *value, struct mf_error *err)
{
    return copy_absolute(config->runtime_dir, sizeof(config->runtime_dir), value, err);
}

static int set_mover_path(struct config *config, const char *value, struct mf_error *err)
{
    return copy_absolute(config->mover_path, sizeof(config->mover_path), value, err);
}

static int set_streams(struct config *config, const char *value, struct mf_error *err)
{
    uint64_t streams;
    if (mf_number_parse(value, 1, MF_MAX_STREAMS, &streams) < 0)
        return mf_fail(err, EINVAL, "the number of streams is 1 to %u", MF_MAX_STREAMS);
    config->streams = (unsigned)streams;
    return 0;
}

static int set_mover_user(struct config *config, const char *value, struct mf_error *err)
{
    const struct passwd *user = strlen(value) < sizeof(config->mover_user) ? getpwnam(value) : NULL;
    if (!user)
        return mf_fail(err, EINVAL, "there is no such user on this host");
    if (user->pw_uid == 0)
        return mf_fail(err, EINVAL, "memferry-mover talks to the network and must not run as root");
    snprintf(config->mover_user, sizeof(config->mover_user), "%s", value);
    return 0;
}

static int set_congestion(struct config *config, const char *value, struct mf_error *err)
{
    int r = mf_congestion_check(value, err);
    if (r == 0)
        snprintf(config->congestion, sizeof(config->congestion), "%s", value);
    return r;
}

static int set_log_level(struct config *config, const char *value, struct mf_error *err)
{
    static const struct {
        const char *word;
        enum mf_log_level level;
    } levels[] = {{"error", MF_LOG_ERR},
                  {"warning", MF_LOG_WARNING},
                  {"notice", MF_LOG_NOTICE},
                  {"info", MF_LOG_INFO},
                  {"debug", MF_LOG_DEBUG}};
    for (size_t i = 0; i < sizeof(levels) / sizeof(levels[0]); i++) {
        if (strcmp(value, levels[i].word) == 0) {
            config->log_level = (int)levels[i].level;
            return 0;
        }
    }
    return mf_fail(err, EINVAL, "it is one of error, warning, notice, info and debug");
}

static const struct key {
    const char *name;
    int (*set)(struct config *config, const char *value, struct mf_error *err);
} keys[] = {
    {"runtime-dir", set_runtime_dir},
    {"listen", config_listen},
    {"streams", set_streams},
    {"mover-user", set_mover_user},
    {"mover-path", set_mover_path},
    {"log-level", set_log_level},
    {"congestion-control", set_congestion},
};
#define KEY_COUNT (sizeof(keys) / sizeof(keys[0]))

/* ---- reading ---- */

/** struct reading - a file being read. inih as packaged does not tell its handler the line, so the
 * reader counts. @line is that of the line read last, which is what the handler is called for.
 */
struct reading {
    const char *path;
    FILE *file;
    unsigned line;
    struct config config;
    unsigned seen_line[KEY_COUNT]; /**< 0: not yet */
    unsigned failed_line;          /**< 0: nothing was complained about */
    struct mf_error error;         /**< the first complaint */
};

__attribute__((format(printf, 3, 4))) static int fail_at(struct reading *reading, int code,
                                                         const char *fmt, ...)
{
    if (reading->failed_line)
        return -code;
    char text[600];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    reading->failed_line = reading->line;
    return mf_fail(&reading->error, code, "%s:%u: %s", reading->path, reading->line, text);
}

/* An ini_reader: fgets(3) with a count and a complaint where inih would cut a long line in two. */
static char *read_line(char *text, int text_bytes, void *stream)
{
    struct reading *reading = stream;
    if (reading->failed_line || !fgets(text, text_bytes, reading->file))
        return NULL;
    reading->line++;
    if (!strchr(text, '\n') && strlen(text) + 1 >= (size_t)text_bytes) {
        fail_at(reading, EINVAL, "the line is longer than %d characters", text_bytes - 2);
        return NULL;
    }
    return text;
}

/* An ini_handler: 1 all well, 0 an error. */
static int handle(void *user, const char *section, const char *name, const char *value)
{
    struct reading *reading = user;
    if (strcmp(section, "memferryd") != 0) {
        fail_at(reading, EINVAL, "'%.60s' stands %s; the settings stand under [memferryd]", name,
                section[0] ? "in another section" : "before any section");
        return 0;
    }
    for (size_t i = 0; i < KEY_COUNT; i++) {
        if (strcmp(name, keys[i].name) != 0)
            continue;
        if (reading->seen_line[i]) {
            fail_at(reading, EINVAL, "'%s' is set a second time (first in line %u)", name,
                    reading->seen_line[i]);
            return 0;
        }
        reading->seen_line[i] = reading->line;
        struct mf_error why;
        if (keys[i].set(&reading->config, value, &why) < 0) {
            fail_at(reading, EINVAL, "%s = '%.100s': %s", name, value, why.text);
            return 0;
        }
        return 1;
    }
    fail_at(reading, EINVAL, "there is no setting '%.60s'; memferryd(8) lists them", name);
    return 0;
}

int config_load(struct config *config, const char *path, struct mf_error *err)
{
    cleanup_fclose FILE *file = fopen(path, "re");
    struct stat st;
    if (!file || fstat(fileno(file), &st) < 0)
        return mf_fail(err, errno, "cannot read the configuration file %s: %s", path,
                       strerror(errno));
    if (S_ISDIR(st.st_mode))
        return mf_fail(err, EISDIR, "cannot read the configuration file %s: it is a directory",
                       path);

    struct reading reading = {.path = path, .file = file, .config = *config};
    int bad_line = ini_parse_stream(read_line, &reading, handle, &reading);
    if (ferror(file))
        return mf_fail(err, EIO, "cannot read the configuration file %s after line %u", path,
                       reading.line);
    /* inih goes on after a line that it does not understand; what its handler then complains about
     * may only follow from that. */
    if (bad_line > 0 && (!reading.failed_line || (unsigned)bad_line < reading.failed_line))
        return mf_fail(err, EINVAL, "%s:%d: this is neither a [section] nor a 'key = value'", path,
                       bad_line);
    if (reading.failed_line)
        return mf_fail(err, reading.error.code, "%s", reading.error.text);
    if (bad_line < 0)
        return mf_fail(err, ENOMEM, "out of memory reading the configuration file %s", path);
    *config = reading.config;
    return 0;
}
