/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* memferryd: the control plane. Starts, serves until a signal, stops cleanly. See memferryd(8). */
#include "daemon/memferryd/session.h"

#include <errno.h>
#include <getopt.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <systemd/sd-daemon.h>
#include <unistd.h>

#include "daemon/memferryd/work.h"
#include "lib/log.h"
#include "lib/util.h"

#ifndef MF_CONFIG_FILE
#error "the build defines where the configuration file is"
#endif

#define OWN_NICE (-15)

struct daemon {
    struct event_base *base;
    struct evdns_base *dns;
    struct config config;
    struct control *control;
    struct listener *listener;
    struct session *sessions;
    struct event *stop_timer;
    bool stopping;
    unsigned stop_tries;
};

struct event_base *daemon_base(struct daemon *daemon)
{
    return daemon->base;
}
const struct config *daemon_config(struct daemon *daemon)
{
    return &daemon->config;
}
struct control *daemon_control(struct daemon *daemon)
{
    return daemon->control;
}
struct session **daemon_sessions(struct daemon *daemon)
{
    return &daemon->sessions;
}
struct evdns_base *daemon_dns(struct daemon *daemon)
{
    return daemon->dns;
}

static void usage(FILE *to)
{
    fprintf(to, "Usage: memferryd [--config FILE] [--runtime-dir DIR] [--listen ADDR:PORT]\n"
                "Live-migrates the memory of virtual machines; see memferryd(8).\n\n"
                "  --config FILE      read FILE instead of " MF_CONFIG_FILE " (if that is there)\n"
                "  --runtime-dir DIR  where the control socket is (default " MF_DEFAULT_RUNTIME_DIR
                ")\n"
                "  --listen ADDR:PORT where peers connect (default 127.0.0.1:7466)\n"
                "  --version          print the version\n"
                "  --help             print this\n");
}

/* Sessions after RELEASE must not be dropped: the guest's pages come through here. */
static void try_to_stop(evutil_socket_t fd, short what, void *arg)
{
    struct daemon *daemon = arg;
    (void)fd;
    (void)what;
    unsigned left = sessions_stop(daemon);
    /* A destination that waits for a word gets a few seconds of tries. */
    if (left == 0 && (connectors_abandoning() == 0 || ++daemon->stop_tries > 25)) {
        event_base_loopexit(daemon->base, NULL);
        return;
    }
    evtimer_add(daemon->stop_timer, &(struct timeval){.tv_usec = 200000});
}

static void on_signal(evutil_socket_t number, short what, void *arg)
{
    struct daemon *daemon = arg;
    (void)what;
    if (daemon->stopping)
        return;
    daemon->stopping = true;
    sd_notify(0, "STOPPING=1");
    mf_log(MF_LOG_INFO, "%s: stopping once no guest depends on this daemon any more",
           strsignal((int)number));
    listener_close(daemon->sessions ? NULL : daemon->listener);
    if (!daemon->sessions)
        daemon->listener = NULL;
    try_to_stop(-1, 0, daemon);
}

/* What libevent has to say, about name servers as a rule. */
static void on_libevent_log(int severity, const char *text)
{
    mf_log(severity == EVENT_LOG_ERR    ? MF_LOG_ERR
           : severity == EVENT_LOG_WARN ? MF_LOG_WARNING
                                        : MF_LOG_DEBUG,
           "libevent: %s", text);
}

static int read_arguments(struct config *config, int argc, char **argv)
{
    static const struct option options[] = {
        {"config", required_argument, NULL, 'c'}, {"runtime-dir", required_argument, NULL, 'r'},
        {"listen", required_argument, NULL, 'l'}, {"version", no_argument, NULL, 'V'},
        {"help", no_argument, NULL, 'h'},         {NULL, 0, NULL, 0}};
    struct mf_error err;
    int option;
    bool named = false;
    /* The file first, whatever the order: the command line overrides it. */
    for (int pass = 0; pass < 2; pass++) {
        optind = 1;
        while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
            switch (option) {
            case 'c':
                named = true;
                if (pass == 0 && config_load(config, optarg, &err) < 0) {
                    mf_log(MF_LOG_ERR, "%s", err.text);
                    return 2;
                }
                break;
            case 'r':
                if (pass == 1) {
                    if (strlen(optarg) >= sizeof(config->runtime_dir) || optarg[0] != '/') {
                        mf_log(MF_LOG_ERR,
                               "the runtime directory %s must be an absolute path of at most %zu "
                               "characters",
                               optarg, sizeof(config->runtime_dir) - 1);
                        return 2;
                    }
                    snprintf(config->runtime_dir, sizeof(config->runtime_dir), "%s", optarg);
                }
                break;
            case 'l':
                if (pass == 1 && config_listen(config, optarg, &err) < 0) {
                    mf_log(MF_LOG_ERR, "%s", err.text);
                    return 2;
                }
                break;
            case 'V':
                printf("memferryd " MF_VERSION "\n");
                exit(0);
            case 'h':
                usage(stdout);
                exit(0);
            default:
                usage(stderr);
                return 2;
            }
        }
        if (pass == 0 && !named && access(MF_CONFIG_FILE, F_OK) == 0 &&
            config_load(config, MF_CONFIG_FILE, &err) < 0) {
            mf_log(MF_LOG_ERR, "%s", err.text);
            return 2;
        }
        if (optind < argc) {
            mf_log(MF_LOG_ERR, "\"%s\" is not understood; memferryd takes only options",
                   argv[optind]);
            usage(stderr);
            return 2;
        }
    }
    return 0;
}

int main(int argc, char **argv)
{
    static struct daemon daemon;
    struct mf_error err;
    mf_log_setup("memferryd", MF_LOG_INFO);
    event_set_log_callback(on_libevent_log);
    config_defaults(&daemon.config);
    int r = read_arguments(&daemon.config, argc, argv);
    if (r != 0)
        return r;
    mf_log_setup("memferryd", (enum mf_log_level)daemon.config.log_level);
    signal(SIGPIPE, SIG_IGN);
    signal(SIGHUP,
           SIG_IGN); /* a closed terminal must not end what guests depend on; nothing is reloaded */
    /* It sleeps nearly always, and when it does not a guest may be standing still for it. Without
     * the permission it is as patient as everybody. */
    setpriority(PRIO_PROCESS, 0, OWN_NICE);
    /* A session takes some twenty descriptors. */
    struct rlimit files;
    if (getrlimit(RLIMIT_NOFILE, &files) == 0 && files.rlim_cur < files.rlim_max) {
        files.rlim_cur = files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files);
    }

    daemon.base = event_base_new();
    daemon.dns = daemon.base ? evdns_base_new(daemon.base, EVDNS_BASE_INITIALIZE_NAMESERVERS |
                                                               EVDNS_BASE_DISABLE_WHEN_INACTIVE)
                             : NULL;
    if (daemon.base &&
        !daemon.dns) /* no resolv.conf: names of /etc/hosts and addresses still work */
        daemon.dns = evdns_base_new(daemon.base, EVDNS_BASE_DISABLE_WHEN_INACTIVE);
    if (!daemon.base || !daemon.dns) {
        mf_log(MF_LOG_ERR, "cannot set up the event loop");
        return 1;
    }
    if (control_open(&daemon, &daemon.control, &err) < 0 ||
        listener_open(&daemon, &daemon.listener, &err) < 0) {
        mf_log(MF_LOG_ERR, "%s", err.text);
        if (daemon.control)
            control_close(daemon.control);
        return 1;
    }
    struct event *terminate = evsignal_new(daemon.base, SIGTERM, on_signal, &daemon);
    struct event *interrupt = evsignal_new(daemon.base, SIGINT, on_signal, &daemon);
    daemon.stop_timer = evtimer_new(daemon.base, try_to_stop, &daemon);
    if (!terminate || !interrupt || !daemon.stop_timer || event_add(terminate, NULL) != 0 ||
        event_add(interrupt, NULL) != 0) {
        mf_log(MF_LOG_ERR, "cannot set up signals");
        return 1;
    }
    sd_notify(0, "READY=1");
    mf_log(MF_LOG_INFO, "version " MF_VERSION " listens on %s port %u, control socket in %s",
           daemon.config.listen_address, daemon.config.listen_port, daemon.config.runtime_dir);
    event_base_dispatch(daemon.base);

    sessions_drop(&daemon);
    connectors_drop(&daemon);
    listener_close(daemon.listener);
    control_close(daemon.control);
    works_finish();
    lingers_drop();
    event_free(terminate);
    event_free(interrupt);
    event_free(daemon.stop_timer);
    evdns_base_free(daemon.dns, 0);
    event_base_free(daemon.base);
    mf_log(MF_LOG_INFO, "stopped");
    return 0;
}
