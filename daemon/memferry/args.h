/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The command line of memferry, taken apart. Pure: nothing is printed, opened or connected to.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "lib/control_message.h"
#include "lib/endpoint.h"
#include "lib/error.h"
#include "lib/process.h"

/** What `memferry` leaves with: memferry(1) promises these. */
enum cli_exit {
    CLI_DONE = 0,
    CLI_FAILED = 1, /**< the guest is safe at the source, where there is one */
    CLI_USAGE = 2,
    CLI_UNREACHABLE = 3, /**< memferryd does not answer */
    CLI_RELEASED = 4,    /**< after RELEASE and not done: recovery is under way or needed */
};

enum cli_option {
    CLI_OPTION_QMP = 1 << 0,
    CLI_OPTION_TO = 1 << 1,
    CLI_OPTION_JSON = 1 << 2,
    CLI_OPTION_DETACH = 1 << 3,
    CLI_OPTION_KEEP_SOURCE = 1 << 4,
    CLI_OPTION_STREAMS = 1 << 5,
    CLI_OPTION_MODE = 1 << 6,
    CLI_OPTION_BANDWIDTH = 1 << 7,
    CLI_OPTION_MAX_ROUNDS = 1 << 8,
    CLI_OPTION_SWITCH_AFTER = 1 << 9,
    CLI_OPTION_MAX_BLACKOUT = 1 << 10,
    CLI_OPTION_FALLBACK = 1 << 11,
    CLI_OPTION_PID = 1 << 12,
    CLI_OPTION_PAUSE = 1 << 13,
    CLI_OPTION_SAVE = 1 << 14,
    CLI_OPTION_LOAD = 1 << 15,
    CLI_OPTION_RESUME = 1 << 16,
    CLI_OPTION_REGION = 1 << 17,
    CLI_OPTION_TIMEOUT = 1 << 18,
    /** What belongs to a process that is no VMM. */
    CLI_OPTIONS_COMMANDS = CLI_OPTION_PAUSE | CLI_OPTION_SAVE | CLI_OPTION_LOAD |
                           CLI_OPTION_RESUME | CLI_OPTION_TIMEOUT,
    CLI_OPTIONS_PROCESS = CLI_OPTION_PID | CLI_OPTIONS_COMMANDS | CLI_OPTION_REGION,
};

/** struct cli_process - a process that is no VMM, and what drives it. Strings point into argv. */
struct cli_process {
    uint32_t pid;                             /**< 0: none was given */
    const char *pause, *save, *load, *resume; /**< "": not given */
    uint32_t timeout_s;                       /**< 0: not given */
    struct mf_choice region[MF_CHOICES_MAX];
    unsigned region_count;
};

/** What follows the verb: a VM's name, or the id of a process. */
enum cli_name { CLI_NAME_NONE, CLI_NAME_OPTIONAL, CLI_NAME_REQUIRED, CLI_PID_REQUIRED };

/** struct cli_args - a command line that is right. Strings point into argv. */
struct cli_args {
    const char *runtime_dir;
    const struct cli_verb *verb; /**< NULL with --help or --version alone */
    const char *name;            /**< NULL where the verb's name was optional and left out */
    int pid;                     /**< with CLI_PID_REQUIRED */
    const char *qmp_path;        /**< as given: perhaps relative; NULL: none was */
    struct cli_process process;
    struct mf_endpoint to;
    unsigned streams;                /**< 0: not given */
    struct mf_control_rounds rounds; /**< that go together; the mode is the default if not given */
    uint64_t bandwidth_bits_s;       /**< 0: no limit */
    bool bandwidth_given;
    bool json, detach, keep_source;
    bool help, version;
};

/** struct cli_verb - a row of the table of verbs.
 * @summary:  a line for `memferry --help`.
 * @usage:    what follows "memferry VERB " in a synopsis.
 * @help:     the body of `memferry VERB --help`.
 * @settings: KEY=VALUE follows the name, at least one.
 * @allowed, @required: bits of enum cli_option.
 * @target: it works on a VM or process: exactly one of --qmp and --pid is needed.
 * @run:      does it; the return value is an enum cli_exit.
 */
struct cli_verb {
    const char *word, *summary, *usage, *help;
    enum cli_name name;
    bool settings, target;
    unsigned allowed, required;
    int (*run)(const struct cli_args *args);
};

/**
 * cli_parse() - check a command line as a whole.
 * @verbs: the table, ended by a row without a word.
 * @args:  filled as far as it was understood, on failure too: `verb`, `name` and `json` tell how to
 *         report the error. --json counts wherever it stands.
 * @err:   one sentence with a hint.
 * Return: 0 or -EINVAL.
 */
int cli_parse(int argc, char **argv, const struct cli_verb *verbs, struct cli_args *args,
              struct mf_error *err);

/**
 * cli_absolute() - a path as memferryd, which has another working directory, has to be given it.
 * @out: malloc'ed, the caller's.
 * Return: 0 or -errno.
 */
int cli_absolute(const char *path, char **out, struct mf_error *err);
