/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * memferry-mover processes: started, handed their descriptors, listened to, reaped and replaced.
 *
 * A mover is in the way of nothing but its own session. It is started in the cgroup of its VM where
 * there is one, so that the pages it populates are charged there.
 */
#include "daemon/memferryd/session.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pwd.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "lib/log.h"
#include "lib/util.h"

#ifndef MF_LIBEXEC_DIR
#error "the build defines where memferry-mover is installed"
#endif

/* How long a process that has been forked may take to its first words. */
#define COMPANION_MS 500
/* While the guest runs at the source. Not far: a host that has too little time is one that VMs are
 * moved away from, and they must get away. */
#define NICE_BEHIND 5

struct mover_process {
    struct session *session; /**< NULL once the session does not want it any more */
    pid_t pid;
    int pidfd, sock;
    bool ready;
    struct event *exit_event, *sock_event;
    pid_t companion; /**< shares its descriptors; 0: none, or it has been reaped */
    int companion_pidfd;
    struct event *companion_event;
};

/* Beside memferryd in a build tree, in libexec when installed. */
static int find_program(const struct config *config, char *path, size_t size, struct mf_error *err)
{
    char self[400];
    const char *beside[] = {"memferry-mover", "../mover/memferry-mover"};
    if (config->mover_path[0]) {
        snprintf(path, size, "%s", config->mover_path);
        if (access(path, X_OK) == 0)
            return 0;
        return mf_fail(err, errno, "%s, which the configuration names as memferry-mover: %s", path,
                       strerror(errno));
    }
    ssize_t n = readlink("/proc/self/exe", self, sizeof(self) - 1);
    if (n > 0) {
        self[n] = '\0';
        char *slash = strrchr(self, '/');
        if (slash)
            *slash = '\0';
        for (unsigned i = 0; i < 2; i++) {
            snprintf(path, size, "%s/%s", self, beside[i]);
            if (access(path, X_OK) == 0)
                return 0;
        }
    }
    snprintf(path, size, "%s/memferry-mover", MF_LIBEXEC_DIR);
    if (access(path, X_OK) == 0)
        return 0;
    return mf_fail(err, ENOENT,
                   "memferry-mover is neither beside memferryd nor in %s; reinstall memferry",
                   MF_LIBEXEC_DIR);
}

static void find_user(const struct config *config, uid_t *uid, gid_t *gid)
{
    const char *names[] = {config->mover_user, "nobody"};
    *uid = *gid = 65534;
    for (unsigned i = 0; i < 2; i++) {
        const struct passwd *entry = getpwnam(names[i]);
        if (entry && entry->pw_uid != 0) {
            *uid = entry->pw_uid;
            *gid = entry->pw_gid;
            return;
        }
    }
}

/* Into the VM's cgroup (cgroup v2), if it is another than ours. Failing costs only the accounting.
 */
static void join_cgroup(const struct session *session, pid_t pid)
{
    char path[600], line[512], ours[512] = "";
    cleanup_fclose FILE *self = fopen("/proc/self/cgroup", "re");
    snprintf(path, sizeof(path), "/proc/%d/cgroup", (int)session->pid);
    cleanup_fclose FILE *theirs = fopen(path, "re");
    if (!self || !theirs)
        return;
    while (fgets(ours, sizeof(ours), self) && strncmp(ours, "0::", 3) != 0)
        ours[0] = '\0';
    while (fgets(line, sizeof(line), theirs)) {
        if (strncmp(line, "0::", 3) != 0 || strcmp(line, ours) == 0)
            continue;
        line[strcspn(line, "\n")] = '\0';
        snprintf(path, sizeof(path), "/sys/fs/cgroup%s/cgroup.procs", line + 3);
        cleanup_close int fd = open(path, O_WRONLY | O_CLOEXEC);
        char number[16];
        int length = snprintf(number, sizeof(number), "%d", (int)pid);
        if (fd < 0 || write(fd, number, (size_t)length) != length)
            mf_log(MF_LOG_WARNING,
                   "%s: memferry-mover stays in memferryd's cgroup, so the memory it populates is "
                   "charged there: %s: %s",
                   session->name, path, strerror(errno));
    }
}

static void free_process(struct mover_process *m)
{
    if (m->exit_event)
        event_free(m->exit_event);
    if (m->sock_event)
        event_free(m->sock_event);
    if (m->companion_event)
        event_free(m->companion_event);
    if (m->companion_pidfd >= 0)
        close(m->companion_pidfd);
    if (m->pidfd >= 0)
        close(m->pidfd);
    if (m->sock >= 0)
        close(m->sock);
    free(m);
}

/* What only @pid still holds of the target's children. */
static void keep_children(struct session *session, pid_t pid)
{
    struct mf_error err;
    if (!session || session->role != MF_DESTINATION || session_ended(session))
        return;
    int kept = keeper_take(&session->children, pid, session->uffd, &err);
    if (kept < 0)
        mf_log(MF_LOG_ERR, "%s: the memory of forked processes is lost: %s", session->name,
               err.text);
    else if (kept > 0)
        mf_log(MF_LOG_NOTICE, "%s: %d forked processes wait for the next memferry-mover",
               session->name, kept);
}

static void end_companion(struct mover_process *m)
{
    if (m->companion_event)
        event_free(m->companion_event);
    m->companion_event = NULL;
    if (!m->companion)
        return;
    kill(m->companion, SIGKILL);
    waitpid(m->companion, NULL, 0);
    m->companion = 0;
}

/* It is not needed for the mover to go on, but for what comes when that is killed too: so another
 * pair takes over. The mover is stopped first, or it might get another descriptor meanwhile. */
static void on_companion_exit(evutil_socket_t fd, short what, void *arg)
{
    struct mover_process *m = arg;
    siginfo_t info;
    (void)fd;
    (void)what;
    end_companion(m);
    if (!m->session || kill(m->pid, SIGSTOP) != 0)
        return;
    for (unsigned i = 0; i < 200; i++) {
        info.si_pid = 0;
        if (waitid(P_PID, (id_t)m->pid, &info, WSTOPPED | WEXITED | WNOHANG | WNOWAIT) != 0 ||
            info.si_pid != 0)
            break;
        usleep(1000);
    }
    mf_log(MF_LOG_WARNING, "%s: the companion of memferry-mover has ended; starting both again",
           m->session->name);
    keep_children(m->session, m->pid);
    kill(m->pid, SIGKILL);
}

static void take_companion(struct mover_process *m, pid_t pid)
{
    siginfo_t info;
    /* Said before it has read anything from the network; and it is a child of this process. */
    if (m->ready || m->companion || pid == m->pid || pid <= 0 ||
        waitid(P_PID, (id_t)pid, &info, WEXITED | WNOHANG | WNOWAIT) != 0)
        return;
    m->companion = pid;
    m->companion_pidfd = (int)syscall(SYS_pidfd_open, pid, 0);
    if (m->companion_pidfd >= 0 && m->session)
        m->companion_event = event_new(daemon_base(m->session->daemon), m->companion_pidfd, EV_READ,
                                       on_companion_exit, m);
    if (m->companion_event)
        event_add(m->companion_event, NULL);
}

/* A mover that ends as it starts may have made a companion that has not been heard of yet. It is a
 * child of ours, which nobody else would reap. Without one nobody has the other end of the socket
 * any more, and this is over at once. */
static void learn_companion(struct mover_process *m)
{
    struct pollfd next = {.fd = m->sock, .events = POLLIN};
    struct mf_ipc message;
    int fd = -1;
    while (m->sock >= 0 && !m->ready && !m->companion && poll(&next, 1, COMPANION_MS) > 0 &&
           mf_ipc_receive(m->sock, &message, &fd) > 0) {
        if (fd >= 0)
            close(fd);
        if (message.type == MF_IPC_COMPANION)
            take_companion(m, message.companion_pid);
    }
}

static void on_exit_event(evutil_socket_t fd, short what, void *arg)
{
    struct mover_process *m = arg;
    struct session *session = m->session;
    siginfo_t info = {0};
    char how[64];
    (void)fd;
    (void)what;
    if (waitid(P_PID, (id_t)m->pid, &info, WEXITED | WNOHANG) != 0 || info.si_pid == 0)
        return;
    if (info.si_code == CLD_EXITED)
        snprintf(how, sizeof(how), "exited with status %d", info.si_status);
    else
        snprintf(how, sizeof(how), "was killed by signal %d (%s)", info.si_status,
                 strsignal(info.si_status));
    learn_companion(m);
    if (m->companion)
        keep_children(session, m->companion);
    end_companion(m);
    /* What else lies in the socket is not needed: a dead mover's words. */
    free_process(m);
    if (session) {
        session->mover = NULL;
        session_on_mover_exit(session, how);
    }
}

static void on_message(evutil_socket_t fd, short what, void *arg)
{
    struct mover_process *m = arg;
    (void)what;
    for (unsigned i = 0; i < 32; i++) {
        struct mf_ipc message;
        int received_fd = -1;
        int r = mf_ipc_receive((int)fd, &message, &received_fd);
        if (received_fd >= 0)
            close(received_fd); /* a mover has none to give */
        if (r == -EAGAIN)
            return;
        if (r <= 0) {
            event_del(m->sock_event); /* its exit is seen by the pidfd */
            return;
        }
        struct session *session = m->session;
        if (message.type == MF_IPC_COMPANION) {
            take_companion(m, message.companion_pid);
        } else if (message.type == MF_IPC_READY) {
            m->ready = true;
            keeper_drop(&session->children); /* it holds them now, with its companion */
            session_on_mover_ready(session);
        } else {
            session_on_mover_message(session, &message);
        }
        if (session->mover != m)
            return; /* stopped by what it said; `m` may be gone */
    }
}

static pid_t spawn(const char *program, int child_sock, uid_t uid, gid_t gid, int log_level,
                   enum mf_role role)
{
    char arguments[4][16];
    snprintf(arguments[0], sizeof(arguments[0]), "%d", 3);
    snprintf(arguments[1], sizeof(arguments[1]), "%u", (unsigned)uid);
    snprintf(arguments[2], sizeof(arguments[2]), "%u", (unsigned)gid);
    snprintf(arguments[3], sizeof(arguments[3]), "%d", log_level);
    char *argv[] = {(char *)(uintptr_t) "memferry-mover",
                    arguments[0],
                    arguments[1],
                    arguments[2],
                    arguments[3],
                    (char *)(uintptr_t)(role == MF_SOURCE ? "source" : "destination"),
                    NULL};
    pid_t pid = fork();
    if (pid != 0)
        return pid;
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    /* Its descriptors: the standard ones and the socket as 3; all others are close-on-exec. */
    if (child_sock == 3 ? fcntl(3, F_SETFD, 0) != 0 : dup2(child_sock, 3) < 0)
        _exit(127);
    execv(program, argv);
    _exit(127);
}

/* At the source a page of private memory is what lies at its place, whatever is mapped there: the
 * whole range, also where nothing is, and also when the process is gone (which the mover must not
 * take for memory that holds nothing). */
static int private_ranges(const struct session *session, struct mf_mapping **all, int count,
                          struct mf_error *err)
{
    int kept = 0;
    struct mf_mapping *mappings =
        reallocarray(*all, (size_t)count + session->region_count, sizeof(*mappings));
    if (!mappings)
        return mf_fail(err, ENOMEM, "out of memory");
    *all = mappings;
    for (int i = 0; i < count; i++)
        if (session->region[mappings[i].region].kind != MF_MEMORY_PRIVATE)
            mappings[kept++] = mappings[i];
    for (unsigned i = 0; i < session->region_count; i++) {
        const struct mf_region_source *region = &session->region[i];
        if (region->kind != MF_MEMORY_PRIVATE)
            continue;
        mappings[kept++] = (struct mf_mapping){
            .start_addr = region->start_addr, .length_bytes = region->size_bytes, .region = i};
    }
    return kept;
}

/* It may look up what the target has moved; opening it takes privileges, reading does not. */
static int hand_over_maps(const struct session *session, int sock)
{
    char path[64];
    snprintf(path, sizeof(path), "/proc/%d/maps", (int)session->pid);
    cleanup_close int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return 0; /* it is going; a zombie has none */
    return mf_ipc_send(sock, &(struct mf_ipc){.type = MF_IPC_MAPS}, fd);
}

static int hand_over_layout(const struct session *session, int sock)
{
    char path[64];
    int r = mf_ipc_send(sock, &(struct mf_ipc){.type = MF_IPC_LAYOUT}, session->layout_fd);
    if (r < 0 || session->mover_restarts == 0 || session->target_exited)
        return r;
    snprintf(path, sizeof(path), "/proc/%d/smaps", (int)session->pid);
    cleanup_close int fd = open(path, O_RDONLY | O_CLOEXEC);
    return fd < 0 ? 0 : mf_ipc_send(sock, &(struct mf_ipc){.type = MF_IPC_SMAPS}, fd);
}

/* A mover takes so many. What it lacks of files it finds by looking, as it finds what has changed;
 * of private memory, which is told by nothing else, there are never more than the session began
 * with: so that comes first. */
static int hand_over_mappings(const struct session *session, int sock,
                              const struct mf_mapping *mappings, int count)
{
    unsigned sent = 0;
    int r = 0;
    for (unsigned files = 0; files < 2; files++)
        for (int i = 0; r == 0 && i < count && sent < MF_MAPPINGS_MAX; i++) {
            if ((session->region[mappings[i].region].kind != MF_MEMORY_PRIVATE) != files)
                continue;
            r = mf_ipc_send(sock, &(struct mf_ipc){.type = MF_IPC_MAPPING, .mapping = mappings[i]},
                            -1);
            sent++;
        }
    return r;
}

static int hand_over(struct session *session, int sock, struct mf_error *err)
{
    cleanup_free struct mf_mapping *mappings = NULL;
    int mapping_count = 0, r;
    if (session->uffd >= 0 && !session->target_exited) {
        /* As they are now: what a dead mover had read of changes went with it. */
        mapping_count = target_mappings(session, &mappings, err);
        if (mapping_count < 0 && session->role == MF_SOURCE)
            mapping_count = 0; /* the VM is going: everything counts as written */
        if (mapping_count < 0)
            return mapping_count;
    }
    const bool read_private = session->populated_fd >= 0;
    if (read_private) {
        mapping_count = private_ranges(session, &mappings, mapping_count, err);
        if (mapping_count < 0)
            return mapping_count;
    }
    struct mf_ipc setup = {.type = MF_IPC_SETUP,
                           .setup = {.role = session->role,
                                     .region_count = session->region_count,
                                     .context_count = session->uffd >= 0,
                                     .pid = session->pid,
                                     .dontneed_discards = session->dontneed_discards,
                                     .restarted = session->mover_restarts > 0}};
    memcpy(setup.setup.session_id, session->id, sizeof(session->id));
    memcpy(setup.setup.name, session->name, sizeof(session->name));
    r = mf_ipc_send(sock, &setup, session->file_fd);
    for (unsigned i = 0; r == 0 && i < session->region_count; i++) {
        const struct mf_region_source *from = &session->region[i];
        struct mf_ipc region = {.type = MF_IPC_REGION,
                                .region = {.size_bytes = from->size_bytes,
                                           .page_bytes = from->page_bytes,
                                           .kind = from->kind,
                                           .device = from->device,
                                           .inode = from->inode}};
        memcpy(region.region.name, from->name, sizeof(from->name));
        r = mf_ipc_send(sock, &region, from->fd);
    }
    if (r == 0 && session->uffd >= 0)
        r = mf_ipc_send(sock, &(struct mf_ipc){.type = MF_IPC_CONTEXT}, session->uffd);
    if (r == 0 && session->uffd >= 0 && !session->target_exited)
        r = hand_over_maps(session, sock);
    if (r == 0 && session->layout_fd >= 0)
        r = hand_over_layout(session, sock);
    for (unsigned i = 0; r == 0 && i < session->children.count; i++)
        r = mf_ipc_send(sock, &(struct mf_ipc){.type = MF_IPC_CONTEXT, .context = {.child = true}},
                        session->children.uffd[i]);
    if (r == 0 && session->pagemap_fd >= 0)
        r = mf_ipc_send(sock, &(struct mf_ipc){.type = MF_IPC_PAGEMAP}, session->pagemap_fd);
    if (r == 0 && read_private)
        r = mf_ipc_send(sock, &(struct mf_ipc){.type = MF_IPC_POPULATED}, session->populated_fd);
    if (r == 0)
        r = hand_over_mappings(session, sock, mappings, mapping_count);
    if (r == 0)
        r = mf_ipc_send(sock, &(struct mf_ipc){.type = MF_IPC_GO}, -1);
    if (r < 0)
        return mf_fail(err, -r, "memferry-mover of %s does not take its orders: %s", session->name,
                       strerror(-r));
    return 0;
}

int mover_start(struct session *session, struct mf_error *err)
{
    const struct config *config = daemon_config(session->daemon);
    char program[600];
    int pair[2];
    uid_t uid;
    gid_t gid;
    int r = find_program(config, program, sizeof(program), err);
    if (r < 0)
        return r;
    find_user(config, &uid, &gid);
    struct mover_process *m = calloc(1, sizeof(*m));
    if (!m)
        return mf_fail(err, ENOMEM, "out of memory");
    m->pidfd = m->sock = m->companion_pidfd = -1;
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) != 0) {
        r = mf_fail(err, errno, "cannot make a socket for memferry-mover: %s", strerror(errno));
        free_process(m);
        return r;
    }
    m->sock = pair[0];
    m->pid = spawn(program, pair[1], uid, gid, config->log_level, session->role);
    int spawn_errno = errno;
    close(pair[1]);
    if (m->pid < 0) {
        free_process(m);
        return mf_fail(err, spawn_errno, "cannot start memferry-mover: %s", strerror(spawn_errno));
    }
    session->mover_started_ns = mf_now_ns();
    m->session = session;
    m->pidfd = (int)syscall(SYS_pidfd_open, m->pid, 0);
    if (m->pidfd < 0)
        r = mf_fail(err, errno, "cannot watch memferry-mover: %s", strerror(errno));
    /* While it hands over, the socket blocks, for a while: a mover reads its orders before anything
     * else. */
    const struct timeval patience = {.tv_sec = 2};
    setsockopt(m->sock, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof(patience));
    if (r == 0)
        r = hand_over(session, m->sock, err);
    if (r == 0) {
        join_cgroup(session, m->pid);
        evutil_make_socket_nonblocking(m->sock);
        m->exit_event = event_new(daemon_base(session->daemon), m->pidfd, EV_READ | EV_PERSIST,
                                  on_exit_event, m);
        m->sock_event =
            event_new(daemon_base(session->daemon), m->sock, EV_READ | EV_PERSIST, on_message, m);
        if (!m->exit_event || !m->sock_event)
            r = mf_fail(err, ENOMEM, "out of memory");
    }
    if (r < 0) {
        kill(m->pid, SIGKILL);
        waitpid(m->pid, NULL, 0);
        learn_companion(m);
        end_companion(m);
        free_process(m);
        return r;
    }
    event_add(m->exit_event, NULL);
    event_add(m->sock_event, NULL);
    session->mover = m;
    target_mind_events(session, false);
    return 0;
}

void mover_order(struct session *session, const struct mf_ipc *message, int fd)
{
    if (!session->mover)
        return;
    int r = mf_ipc_send(session->mover->sock, message, fd);
    if (r == -EAGAIN) {
        /* It does not read: it is stuck. Its successor will. */
        mf_log(MF_LOG_WARNING, "%s: memferry-mover does not take its orders; killing it",
               session->name);
        kill(session->mover->pid, SIGKILL);
    }
    /* Other errors: it is dying, which its pidfd will tell. */
}

/* Those of its threads that are there by now. Threads that go first do so by real-time priority, to
 * which this means nothing, or where that is not to be had by a nice value below 0. */
static void set_nice(const struct session *session, int nice_value)
{
    char path[64];
    if (!session->mover)
        return;
    snprintf(path, sizeof(path), "/proc/%d/task", (int)session->mover->pid);
    cleanup_closedir DIR *tasks = opendir(path);
    struct dirent *task;
    while (tasks && (task = readdir(tasks))) {
        const id_t tid = (id_t)strtoul(task->d_name, NULL, 10); /* 0: "." and ".." */
        if (tid && getpriority(PRIO_PROCESS, tid) >= 0)
            setpriority(PRIO_PROCESS, tid, nice_value);
    }
}

void mover_step_behind(const struct session *session)
{
    set_nice(session, NICE_BEHIND);
}

void mover_step_beside(const struct session *session)
{
    set_nice(session, 0);
}

void mover_stop(struct session *session)
{
    struct mover_process *m = session->mover;
    if (!m)
        return;
    session->mover = NULL;
    m->session = NULL;
    event_free(m->sock_event);
    m->sock_event = NULL;
    /* Its order to leave. One that has just begun may still name its companion. */
    if (!m->ready && !m->companion) {
        shutdown(m->sock, SHUT_WR);
        return;
    }
    close(m->sock);
    m->sock = -1;
}

bool mover_is_ready(const struct session *session)
{
    return session->mover && session->mover->ready;
}
