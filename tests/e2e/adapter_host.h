/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * adapter_drive's two hosts: QEMU processes with a tiny guest, the adapter attached to each, and
 * waiting for what it tells. One thread, one event loop. What goes wrong is printed with the case's
 * name and counted in `failures`.
 */
#pragma once

#include <event2/event.h>
#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "daemon/memferryd/vmm.h"

/* One QEMU and what the adapter told about it. */
struct host {
    const char *name;
    enum vmm_role role;
    pid_t pid;
    char qmp[96], qmp2[96], ram_path[96]; /* qmp2: the test's own monitor */
    unsigned char *ram;                   /* the RAM file, mapped */
    struct vmm *vmm;
    const struct vmm_info *info;
    bool probed;
    char why[1024];                 /* refusal or failure */
    uint64_t at_ns[VMM_FAILED + 1]; /* when each event came, 0: not yet */
    bool finish_when_paused;        /* from within the callback */
};

/** The settings of a run, by the command line; `dir` is where all files of the run are. */
extern struct event_base *base;
extern const char *qemu, *accel;
extern size_t ram_bytes;
extern char dir[64];
extern bool verbose;

/** Both hosts, the present case's name, whether its time is up, how many checks failed in it. */
extern struct host source, destination;
extern const char *case_name;
extern bool timed_out;
extern int failures;

/** check() - count a failure and say @fmt unless @good. Return: @good. */
__attribute__((format(printf, 2, 3))) bool check(bool good, const char *fmt, ...);

/** What the guest does, read from the host's RAM file: its counter, whether that moves within 5 s,
 * whether it does not move for 0.1 s. */
uint32_t counter(const struct host *host);
bool counts(const struct host *host);
bool stands_still(const struct host *host);

/** write_images() - the guest's firmware and an empty disk. */
bool write_images(const char *firmware_path, const char *disk_path);

/** What a QEMU's RAM is made of. */
enum memory { TWO_NODES, FILE_SHARED, FILE_PRIVATE, ANONYMOUS, MEMFD };

/** host_start() - start a QEMU; @more: further arguments, NULL-terminated, may be NULL. */
bool host_start(struct host *host, const char *name, enum vmm_role role, enum memory memory,
                const char *const *more);
void host_kill(struct host *host);
/** host_stop() - adapter, process and files of @host go; it may be started again. */
void host_stop(struct host *host);

/** copy_ram() - what the source's RAM file holds, into the destination's; holes stay holes. */
bool copy_ram(void);

/** attach() - open the adapter on @host and run the loop until it has probed; attach_passing() -
 * and it found what host_start made. */
bool attach(struct host *host);
bool attach_passing(struct host *host);

/** wait_for() - run the loop until @host told @event, or failed. Return: whether it told. */
bool wait_for(struct host *host, enum vmm_event event, const char *what);
/** moment() - run the loop for @us. */
void moment(long us);
/** on_case_timeout() - the event callback that ends a case's time. */
void on_case_timeout(evutil_socket_t fd, short what, void *arg);

/** ask() - a command without arguments on the test's own monitor, as an administrator has it.
 * Return: the value (an error is a JSON string), owned by the caller. */
json_t *ask(struct host *host, const char *command);
void check_run_state(struct host *host, const char *expected);
