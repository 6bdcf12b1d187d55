/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "tests/e2e/adapter_host.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "daemon/memferryd/qemu/qmp.h"
#include "lib/util.h"

#define COUNTER_ADDR 0x8000u
#define IMAGE_BYTES 65536u

struct event_base *base;
const char *qemu = "qemu-system-x86_64";
const char *accel = "tcg";
size_t ram_bytes = (size_t)64 << 20;
char dir[64];
struct host source, destination;
bool timed_out, verbose;

/* ---- results ---- */

const char *case_name;
int failures;

bool check(bool good, const char *fmt, ...)
{
    if (good)
        return true;
    va_list ap;
    va_start(ap, fmt);
    fprintf(stderr, "FAIL %s: ", case_name);
    vfprintf(stderr, fmt, ap);
    fputc('\n', stderr);
    va_end(ap);
    failures++;
    return false;
}

/* ---- the guest ---- */

uint32_t counter(const struct host *host)
{
    return *(volatile const uint32_t *)(host->ram + COUNTER_ADDR);
}

bool counts(const struct host *host)
{
    uint32_t before = counter(host);
    for (int i = 0; i < 500; i++) {
        if (counter(host) != before)
            return true;
        usleep(10000);
    }
    return false;
}

bool stands_still(const struct host *host)
{
    uint32_t before = counter(host);
    usleep(100000);
    return counter(host) == before;
}

static bool write_image(const char *path, const unsigned char image[IMAGE_BYTES])
{
    cleanup_close int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    return fd >= 0 && mf_write_all(fd, image, IMAGE_BYTES) == 0;
}

/* The guest is a firmware of its own (nested KVM does not run every BIOS), and has a disk, whose
 * lock both QEMUs want. It counts in RAM and scribbles on the screen, so that QEMU's own part
 * (video memory) is dirty all the time as well: xor ax,ax; mov ds,ax; mov ax,0xa000; mov es,ax; xor
 * di,di mov dx,0x3c4; mov ax,0x0f02; out dx,ax                 (VGA: write to all planes) again:
 * inc dword [0x8000]; inc word [es:di]; add di,2; and di,0xffe; jmp again and at the reset vector:
 * jmp 0xf000:0 */
bool write_images(const char *firmware_path, const char *disk_path)
{
    static const unsigned char code[] = {0x31, 0xc0, 0x8e, 0xd8, 0xb8, 0x00, 0xa0, 0x8e, 0xc0,
                                         0x31, 0xff, 0xba, 0xc4, 0x03, 0xb8, 0x02, 0x0f, 0xef,
                                         0x66, 0xff, 0x06, 0x00, 0x80, 0x26, 0xff, 0x05, 0x83,
                                         0xc7, 0x02, 0x81, 0xe7, 0xfe, 0x0f, 0xeb, 0xef};
    static const unsigned char reset[] = {0xea, 0x00, 0x00, 0x00, 0xf0};
    unsigned char image[IMAGE_BYTES] = {0};
    if (!write_image(disk_path, image))
        return false;
    memcpy(image, code, sizeof(code));
    memcpy(image + IMAGE_BYTES - 16, reset, sizeof(reset));
    return write_image(firmware_path, image);
}

/* ---- QEMU processes ---- */

bool host_start(struct host *host, const char *name, enum vmm_role role, enum memory memory,
                const char *const *more)
{
    *host = (struct host){.name = name, .role = role};
    snprintf(host->qmp, sizeof(host->qmp), "%s/%s.qmp", dir, name);
    snprintf(host->qmp2, sizeof(host->qmp2), "%s/%s.qmp2", dir, name);
    snprintf(host->ram_path, sizeof(host->ram_path), "%s/%s.ram", dir, name);

    cleanup_close int fd = open(host->ram_path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (!check(fd >= 0 && ftruncate(fd, (off_t)ram_bytes) == 0, "no RAM file: %s", strerror(errno)))
        return false;
    host->ram = mmap(NULL, ram_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (!check(host->ram != MAP_FAILED, "no mapping: %s", strerror(errno))) {
        host->ram = NULL;
        return false;
    }

    char object[256], size[32], monitor[160], monitor2[160], drive[160], bios[96];
    const char *machine =
        memory == ANONYMOUS || memory == TWO_NODES ? "pc" : "pc,memory-backend=ram0";
    if (memory == MEMFD)
        snprintf(object, sizeof(object), "memory-backend-memfd,id=ram0,share=on,size=%zu",
                 ram_bytes);
    else if (memory == TWO_NODES)
        snprintf(object, sizeof(object), "memory-backend-ram,id=spare,size=1M");
    else
        snprintf(object, sizeof(object),
                 "memory-backend-file,id=ram0,share=%s,mem-path=%s,size=%zu",
                 memory == FILE_PRIVATE ? "off" : "on", host->ram_path, ram_bytes);
    snprintf(size, sizeof(size), "%zuM", ram_bytes >> 20);
    snprintf(monitor, sizeof(monitor), "unix:%s,server=on,wait=off", host->qmp);
    snprintf(monitor2, sizeof(monitor2), "unix:%s,server=on,wait=off", host->qmp2);
    snprintf(drive, sizeof(drive), "file=%s/disk.img,format=raw,if=ide", dir);
    snprintf(bios, sizeof(bios), "%s/bios.img", dir);
    const char *argv[48] = {qemu,       "-nodefaults", "-display", "none",  "-vga", "std",
                            "-machine", machine,       "-accel",   accel,   "-m",   size,
                            "-drive",   drive,         "-qmp",     monitor, "-qmp", monitor2,
                            "-object",  object,        "-bios",    bios};
    size_t n = 22;
    if (role == VMM_DESTINATION) {
        argv[n++] = "-incoming";
        argv[n++] = "defer";
    }
    while (more && *more)
        argv[n++] = *more++;

    pid_t parent = getpid();
    host->pid = fork();
    if (host->pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (getppid() != parent)
            _exit(127);
        int null = verbose ? -1 : open("/dev/null", O_WRONLY | O_CLOEXEC);
        if (null >= 0)
            dup2(null, 2); /* QEMU has much to say when its peer goes away */
        execvp(qemu, (char *const *)argv);
        _exit(127);
    }
    if (!check(host->pid > 0, "fork: %s", strerror(errno)))
        return false;
    for (int i = 0; i < 1000; i++) {
        if (access(host->qmp2, F_OK) == 0)
            return true;
        if (waitpid(host->pid, NULL, WNOHANG) == host->pid) {
            host->pid = 0;
            break;
        }
        usleep(10000);
    }
    return check(false, "%s did not start", qemu);
}

void host_kill(struct host *host)
{
    if (host->pid > 0) {
        kill(host->pid, SIGKILL);
        waitpid(host->pid, NULL, 0);
    }
    host->pid = 0;
}

void host_stop(struct host *host)
{
    vmm_qemu.close(host->vmm);
    host->vmm = NULL;
    host_kill(host);
    if (host->ram)
        munmap(host->ram, ram_bytes);
    unlink(host->ram_path);
    unlink(host->qmp);
    unlink(host->qmp2);
    *host = (struct host){0};
}

/* What the source's RAM file holds, into the destination's; holes stay holes. */
bool copy_ram(void)
{
    cleanup_close int from = open(source.ram_path, O_RDONLY | O_CLOEXEC);
    cleanup_close int to = open(destination.ram_path, O_WRONLY | O_CLOEXEC);
    off_t size = (off_t)ram_bytes, hole;
    if (from < 0 || to < 0 || fallocate(to, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, size))
        return false;
    for (off_t data = 0; (data = lseek(from, data, SEEK_DATA)) >= 0; data = hole) {
        hole = lseek(from, data, SEEK_HOLE);
        if (hole < 0)
            return false;
        memcpy(destination.ram + data, source.ram + data, (size_t)(hole - data));
    }
    return errno == ENXIO; /* no more data */
}

/* ---- waiting in the event loop ---- */

static void on_probed(void *arg, const struct vmm_info *info, const char *why)
{
    struct host *host = arg;
    host->probed = true;
    host->info = info;
    if (why)
        snprintf(host->why, sizeof(host->why), "%s", why);
}

static void on_event(void *arg, enum vmm_event event, const char *detail)
{
    struct host *host = arg;
    host->at_ns[event] = mf_now_ns();
    if (event == VMM_FAILED)
        snprintf(host->why, sizeof(host->why), "%s", detail);
    if (event == VMM_PAUSED && host->finish_when_paused && copy_ram())
        vmm_qemu.finish_outgoing(host->vmm);
}

void on_case_timeout(evutil_socket_t fd, short what, void *arg)
{
    (void)fd;
    (void)what;
    (void)arg;
    timed_out = true;
}

/* Run the loop until @host told @event, or failed. Return: whether it told. */
bool wait_for(struct host *host, enum vmm_event event, const char *what)
{
    while (!host->at_ns[event] && !(event != VMM_FAILED && host->at_ns[VMM_FAILED]) && !timed_out)
        event_base_loop(base, EVLOOP_ONCE);
    return check(host->at_ns[event] != 0, "%s: %s did not come: %s", host->name, what,
                 timed_out ? "time limit" : host->why);
}

/* A moment of event loop, to see that nothing more comes. */
static void on_moment(evutil_socket_t fd, short what, void *arg)
{
    (void)fd;
    (void)what;
    *(bool *)arg = true;
}

void moment(long us)
{
    bool over = false;
    struct timeval tv = {.tv_usec = us};
    event_base_once(base, -1, EV_TIMEOUT, on_moment, &over, &tv);
    while (!over)
        event_base_loop(base, EVLOOP_ONCE);
}

bool attach(struct host *host)
{
    struct vmm_callbacks callbacks = {.probed = on_probed, .event = on_event, .arg = host};
    struct mf_error err = {0};
    const struct vmm_target target = {.qmp_path = host->qmp};
    int rc = vmm_qemu.open(base, host->name, &target, host->role, &callbacks, &host->vmm, &err);
    if (!check(rc == 0, "open: %s", err.text))
        return false;
    while (!host->probed && !timed_out)
        event_base_loop(base, EVLOOP_ONCE);
    return check(host->probed, "probing has no end");
}

bool attach_passing(struct host *host)
{
    if (!attach(host) || !check(host->info != NULL, "%s refused: %s", host->name, host->why))
        return false;
    return check(host->info->pid == host->pid, "pid %d instead of %d", (int)host->info->pid,
                 (int)host->pid) &&
           check(host->info->backend_count == 1 &&
                     strcmp(host->info->backends[0].id, "ram0") == 0 &&
                     strcmp(host->info->backends[0].path, host->ram_path) == 0 &&
                     host->info->backends[0].size_bytes == ram_bytes,
                 "%s: backends are wrong", host->name);
}

/* ---- the second monitor: what QEMU says of itself, and what an administrator does ---- */

struct question {
    const char *command;
    json_t *arguments;
    bool over;
    json_t *answer;
    struct qmp *qmp;
};

static void on_answer(void *arg, json_t *value, const char *error)
{
    struct question *question = arg;
    question->answer = value ? json_deep_copy(value) : json_string(error);
    question->over = true;
}

static void on_monitor_ready(void *arg)
{
    struct question *question = arg;
    qmp_send(question->qmp, question->command, question->arguments, -1, on_answer, question);
}

static void on_monitor_event(void *arg, const char *name, json_t *data)
{
    (void)arg;
    (void)name;
    (void)data;
}

static void on_monitor_down(void *arg, const char *why)
{
    struct question *question = arg;
    question->answer = json_string(why);
    question->over = true;
}

/* Ask @host's QEMU. Return: the value (an error is a JSON string), owned by the caller. */
json_t *ask(struct host *host, const char *command)
{
    struct question question = {.command = command};
    struct qmp_callbacks callbacks = {.ready = on_monitor_ready,
                                      .event = on_monitor_event,
                                      .down = on_monitor_down,
                                      .arg = &question};
    struct mf_error err = {0};
    if (qmp_open(base, host->name, host->qmp2, &callbacks, &question.qmp, &err)) {
        check(false, "%s", err.text);
        return NULL;
    }
    while (!question.over)
        event_base_loop(base, EVLOOP_ONCE);
    qmp_close(question.qmp);
    return question.answer;
}

void check_run_state(struct host *host, const char *expected)
{
    json_t *status = ask(host, "query-status");
    const char *state = json_string_value(json_object_get(status, "status"));
    check(state && strcmp(state, expected) == 0, "%s: run state '%s' instead of '%s'", host->name,
          state ? state : "?", expected);
    json_decref(status);
}
