/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The VMM adapter: what memferryd needs of a virtual machine monitor, behind one narrow table. Of
 * any other process too: what the table calls a VMM and its guest may be a program and its work.
 *
 * An adapter is a libevent citizen: every function returns at once, what comes of it is told by a
 * callback from the event loop. Callbacks never run inside the call that caused them. All functions
 * run on the event-loop thread. A callback may call any function of the table, vmm_close included.
 *
 * Order of use, source:      open → probed → move_on → start_outgoing → VMM_PAUSED →
 *                            finish_outgoing → VMM_COMPLETED → released → (RELEASE) → quit →
 *                            VMM_GONE → close.
 * Order of use, destination: open → probed → move_on → start_incoming → VMM_INCOMING →
 *                            VMM_LOADED → (RELEASE) → resume → VMM_RUNNING → close.
 * Before VMM_COMPLETED's RELEASE, return_guest undoes everything on the source → VMM_RETURNED.
 */
#pragma once

#include <event2/event.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "lib/error.h"
#include "lib/process.h"

enum vmm_role { VMM_SOURCE, VMM_DESTINATION };

/** What an adapter tells. `detail` of the callback is a sentence for VMM_FAILED, else NULL. */
enum vmm_event {
    VMM_STOPPED,   /**< the guest's vCPUs stopped for the switchover (blackout starts), source */
    VMM_PAUSED,    /**< the VMM waits in pre-switchover; guest RAM is frozen, source */
    VMM_COMPLETED, /**< the whole device state is out and the peer's VMM said it loaded it, source
                    */
    VMM_RETURNED,  /**< after return_guest: settings restored, guest as it was before, source */
    VMM_GONE,      /**< after quit: the VMM closed its socket (or was already gone), source */
    VMM_INCOMING,  /**< the VMM listens to the device stream handed over, destination */
    VMM_LOADED,    /**< the device state is loaded, the guest is paused, destination */
    VMM_RUNNING,   /**< after resume: the guest runs (or stays paused, see was_running), destination
                    */
    VMM_FAILED,    /**< something failed, `detail` says what; also when the socket closes unasked */
};

/** struct vmm_backend - one memory backend of the guest, as the VMM describes it. */
struct vmm_backend {
    char id[64];     /**< the VMM's own id, e.g. "ram0"; becomes the region's name */
    char path[4096]; /**< mem-path as the VMM has it: a file or a directory, in ITS mount namespace
                      */
    uint64_t size_bytes; /**< 0: private memory, as large as it is found to be */
    /** Where the adapter knows the file itself (@inode is not 0), which makes @path a word for
     * messages. */
    dev_t device;
    ino_t inode;
};

/** struct vmm_target - what an operator said about the VMM or process. Strings are borrowed; an
 * adapter copies what it keeps. */
struct vmm_target {
    const char *qmp_path; /**< a QEMU: its control socket; NULL: a process */
    pid_t pid;            /**< a process, and the commands that drive it: NULL or "" where none */
    const char *pause, *save, *load, *resume;
    unsigned timeout_s; /**< how long a command may take */
    const struct mf_choice *choices;
    unsigned choice_count;
    /** The layout is to be what `probed` finds until move_on, for memory will be watched by it: a
     * process may have to stand still for that moment. */
    bool stand_still;
};

/** struct vmm_info - what probing found. Owned by the adapter, valid until vmm_close. */
struct vmm_info {
    pid_t pid;        /**< QEMU: from SO_PEERCRED of the socket */
    char version[64]; /**< e.g. "QEMU 7.2.22" */
    /** Does MADV_DONTNEED mean that the VMM gives pages of guest memory back? QEMU punches them out
     * of the file, of which nothing tells, and then calls it. To other programs it means that the
     * mapping alone is emptied. */
    bool dontneed_discards;
    bool was_running; /**< source: the guest ran when probed. A paused guest arrives paused. */
    /** A drive whose reads go into guest memory past the processor (O_DIRECT), "" if there is none.
     * The kernel pins the pages when such a read begins and does not see the bytes arrive, so a
     * page that was write-protected in between would count as unwritten: writes can't be tracked.
     */
    char direct_io[192];
    /** Memory that is left to the VMM or program although an operator may have expected otherwise,
     * as a sentence with the reason; "" if there is none. */
    char set_aside[400];
    /** How long the device state may take to get from the source's VMM into the destination's; 0:
     * as long as memferryd's own limit for the switchover. */
    unsigned state_s;
    unsigned backend_count;
    struct vmm_backend *backends;
};

struct vmm; /* opaque, adapter's own */

/** struct vmm_callbacks - both are called from the event loop with @arg.
 * @probed: once, after open: @info if the VMM passed every preflight check, else NULL and @why says
 *          which check failed and the remedy. After a refusal only close may be called.
 * @event:  see enum vmm_event.
 */
struct vmm_callbacks {
    void (*probed)(void *arg, const struct vmm_info *info, const char *why);
    void (*event)(void *arg, enum vmm_event event, const char *detail);
    void *arg;
};

struct vmm_ops {
    const char *name; /**< "qemu", "process" */
    const char *noun; /**< what messages call the target: "VM", "process" */

    /** open() - find @target and probe it (nothing is changed in it).
     *  @vm_name: for messages. Return: 0 (probed will follow) or -errno with @err. */
    int (*open)(struct event_base *base, const char *vm_name, const struct vmm_target *target,
                enum vmm_role role, const struct vmm_callbacks *callbacks, struct vmm **out,
                struct mf_error *err);

    /** move_on() - after `probed`: the layout may change again. NULL: it always may. */
    void (*move_on)(struct vmm *vmm);

    /** start_outgoing() - configure and start the migration of device state into @device_fd (a
     *  connected AF_UNIX stream socket, duplicated to the VMM; the caller keeps its own and may
     * close it at once). Later VMM_STOPPED and VMM_PAUSED, or VMM_FAILED. */
    void (*start_outgoing)(struct vmm *vmm, int device_fd);

    /** finish_outgoing() - let the paused VMM send its device state. Later VMM_COMPLETED. */
    void (*finish_outgoing)(struct vmm *vmm);

    /** return_guest() - source, any time before RELEASE: cancel, restore what start_outgoing
     * changed, let the guest run again if it ran before. Later VMM_RETURNED (or VMM_FAILED if it
     * can't be). */
    void (*return_guest)(struct vmm *vmm);

    /** released() - source: RELEASE is about to be given; from here on the guest is never to run
     * here again, whatever becomes of memferryd. NULL: there is nothing to do. */
    void (*released)(struct vmm *vmm);

    /** quit() - source, after the session has drained: end the VMM. Later VMM_GONE. */
    void (*quit)(struct vmm *vmm);

    /** start_incoming() - load device state from @device_fd (same ownership). Later VMM_INCOMING,
     * then VMM_LOADED. */
    void (*start_incoming)(struct vmm *vmm, int device_fd);

    /** resume() - run the guest (@run) or leave it paused. Later VMM_RUNNING. */
    void (*resume)(struct vmm *vmm, bool run);

    /** close() - forget the VMM, at any moment; sends nothing; no callback follows. NULL is
     * allowed. */
    void (*close)(struct vmm *vmm);
};

/** The QEMU adapter (QMP). */
extern const struct vmm_ops vmm_qemu;
/** The adapter for any other process, driven by commands (process/). */
extern const struct vmm_ops vmm_process;
