/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/memferry/verbs.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "daemon/memferry/client.h"
#include "daemon/memferry/show.h"

#define PROCESS_HELP                                                                               \
    "  --pid PID         a process that is no QEMU; all memory that it maps shared and\n"          \
    "                    writable from tmpfs, memfd or hugetlbfs is migrated, and these\n"         \
    "                    commands for 'sh -c' do the rest (see memferry(1)):\n"                    \
    "  --pause COMMAND   source: have the program stand still (default: SIGSTOP)\n"                \
    "  --save COMMAND    source: write its state to the standard output\n"                         \
    "  --load COMMAND    destination: read its state from the standard input\n"                    \
    "  --resume COMMAND  let it go on, on the host where it belongs (default: SIGCONT)\n"          \
    "  --region NAME=FILE\n"                                                                       \
    "                    migrate only this memory, under this name; may be repeated.\n"            \
    "                    FILE: a path, memfd:NAME, or an address in it (0x...);\n"                 \
    "                    of private memory anon:NAME or anon:START-END\n"                          \
    "  --timeout SECONDS how long a command may take (default: 60)\n"                              \
    "With --pid the default --mode is postcopy.\n"

const struct cli_verb cli_verbs[] = {
    {
        .word = "receive",
        .summary = "arm a VM that waits here for its memory (on the destination)",
        .usage = "NAME --qmp PATH | --pid PID --load COMMAND [OPTION...]",
        .help = "Arms a QEMU that was started with '-S -incoming defer', so that\n"
                "'memferry migrate NAME' on another host can move a guest into it; or any\n"
                "other process, which maps the same shared memory and waits.\n"
                "Returns once it is armed.\n"
                "\n"
                "  --qmp PATH  its QMP socket: '-qmp unix:PATH,server=on,wait=off' of QEMU\n"
                "\n" PROCESS_HELP,
        .name = CLI_NAME_REQUIRED,
        .allowed = CLI_OPTION_QMP | CLI_OPTIONS_PROCESS,
        .target = true,
        .run = verb_receive,
    },
    {
        .word = "migrate",
        .summary = "move a running VM to another host (on the source)",
        .usage = "NAME --qmp PATH | --pid PID --save COMMAND --to HOST[:PORT] [OPTION...]",
        .help = "Moves the guest of a running QEMU, or the work of any other process, to the\n"
                "one that 'memferry receive NAME' has armed on HOST, shows how far it is, and ends "
                "once all memory is there.\n"
                "Ctrl-C cancels as long as the guest can go on here; afterwards it leaves\n"
                "the migration running by itself.\n"
                "\n"
                "  --qmp PATH        the QMP socket of the QEMU here\n"
                "  --to HOST[:PORT]  where memferryd listens on the other host; an IPv6\n"
                "                    address stands in brackets: [2001:db8::1]:7466.\n"
                "                    The port is 7466 unless it is given\n"
                "  --mode MODE       when memory is sent:\n"
                "                    hybrid (default): once while the guest runs here, and\n"
                "                    again as long as that pays; then the guest changes\n"
                "                    hosts in a moment, and what it wrote meanwhile follows\n"
                "                    postcopy: all of it follows the guest\n"
                "                    precopy: all of it before the guest changes hosts\n"
                "  --bandwidth RATE  send at most RATE bits per second, as in 500M or 2.5G\n"
                "                    (k, M, G, T); what a waiting guest asks for is not\n"
                "                    held back (default: none, no limit)\n"
                "  --max-rounds N    send memory at most N times before the guest changes\n"
                "                    hosts (default: 8 with hybrid, no limit with precopy)\n"
                "  --switch-after SECONDS\n"
                "                    have the guest change hosts after this time at the\n"
                "                    latest (default: never by time)\n"
                "  --max-blackout MS with precopy: how long the guest may stand still, in\n"
                "                    milliseconds (default: 300)\n"
                "  --fallback        with precopy: if the guest writes faster than can be\n"
                "                    sent, become hybrid (default: say so and go on)\n"
                "  --json            no progress; one JSON object on stdout at the end,\n"
                "                    on failure too\n"
                "  --detach          return as soon as the migration has started\n"
                "  --keep-source     leave the QEMU here paused at the end, instead of\n"
                "                    having it quit\n"
                "  --streams N       connections for the memory, 1 to 16 (default:\n"
                "                    memferryd's setting)\n"
                "\n" PROCESS_HELP,
        .name = CLI_NAME_REQUIRED,
        .allowed = CLI_OPTION_QMP | CLI_OPTIONS_PROCESS | CLI_OPTION_TO | CLI_OPTION_JSON |
                   CLI_OPTION_DETACH | CLI_OPTION_KEEP_SOURCE | CLI_OPTION_STREAMS |
                   CLI_OPTION_MODE | CLI_OPTION_BANDWIDTH | CLI_OPTION_MAX_ROUNDS |
                   CLI_OPTION_SWITCH_AFTER | CLI_OPTION_MAX_BLACKOUT | CLI_OPTION_FALLBACK,
        .required = CLI_OPTION_TO,
        .target = true,
        .run = verb_migrate,
    },
    {
        .word = "status",
        .summary = "show the sessions of this host, or one of them",
        .usage = "[NAME] [--json]",
        .help = "Shows every session as a table, or everything about one. A session that\n"
                "has ended stays until 'memferry forget NAME'.\n"
                "\n"
                "  --json  one JSON object: the session's, or {\"sessions\": [...]}\n",
        .name = CLI_NAME_OPTIONAL,
        .allowed = CLI_OPTION_JSON,
        .run = verb_status,
    },
    {
        .word = "set",
        .summary = "change the bandwidth of a migration while it runs (on the source)",
        .usage = "NAME bandwidth=RATE",
        .help = "Changes what a running migration may use, at once.\n"
                "\n"
                "  bandwidth=RATE  at most RATE bits per second, as in 500M or 2.5G (k, M, G,\n"
                "                  T); 'none' lifts the limit\n",
        .name = CLI_NAME_REQUIRED,
        .settings = true,
        .run = verb_set,
    },
    {
        .word = "switch",
        .summary = "have the guest change hosts now (on the source)",
        .usage = "NAME",
        .help = "Sends no further memory ahead: the guest changes hosts now, and what it has\n"
                "not got there yet follows. A migration that waits for its memory to be sent\n"
                "as a whole (--mode precopy) need not come to that by itself. Does nothing\n"
                "once the guest has changed hosts.\n",
        .name = CLI_NAME_REQUIRED,
        .run = verb_switch,
    },
    {
        .word = "cancel",
        .summary = "give a migration up; the guest goes on at the source",
        .usage = "NAME",
        .help = "Gives a migration up, on either host, or disarms a VM that waits. Refused\n"
                "once the guest has changed hosts: it lives there by then, and its memory\n"
                "has to follow.\n",
        .name = CLI_NAME_REQUIRED,
        .run = verb_cancel,
    },
    {
        .word = "check",
        .summary = "is this host able? what is missing, and how to get it",
        .usage = "[--pid PID [--region NAME=FILE]...] [--json]",
        .help = "Looks at the kernel's features one by one, the permissions and the memory\n"
                "of this host. Works without memferryd; run it as root, as memferryd runs.\n"
                "Exits with 0 if this host is able, with 1 if something is missing.\n"
                "With --pid, looks instead at what of a process's memory would be migrated,\n"
                "and what is left to its own commands; exits with 1 if it can't be migrated.\n"
                "\n"
                "  --pid PID           the process\n"
                "  --region NAME=FILE  as for 'memferry migrate'\n"
                "  --json              one JSON object\n",
        .name = CLI_NAME_NONE,
        .allowed = CLI_OPTION_JSON | CLI_OPTION_PID | CLI_OPTION_REGION,
        .run = verb_check,
    },
    {
        .word = "monitor",
        .summary = "watch how a process changes its memory layout",
        .usage = "PID [--json]",
        .help = "Attaches to any process and prints a line for each change of its memory\n"
                "layout: what was unmapped, moved or discarded, by which thread and call;\n"
                "forks, whose children are followed; exec and exit. The process waits for\n"
                "no page. Ends with the process, or with Ctrl-C and then without a trace.\n"
                "Works without memferryd, on Linux 6.7 or newer, as root.\n"
                "\n"
                "  --json  a JSON object a line\n",
        .name = CLI_PID_REQUIRED,
        .allowed = CLI_OPTION_JSON,
        .run = verb_monitor,
    },
    {
        .word = "forget",
        .summary = "drop a session that has ended",
        .usage = "NAME",
        .help = "Drops a session that has ended from 'memferry status'. A new session may\n"
                "take the name of one that has ended without this.\n",
        .name = CLI_NAME_REQUIRED,
        .run = verb_forget,
    },
    {.word = NULL},
};

int verb_complain(int code, const char *sentence)
{
    fprintf(stderr, "memferry: %s\n", sentence);
    return code;
}

int verb_fail(const struct cli_args *args, int code, const char *sentence)
{
    /* monitor's objects are changes; what goes wrong is none. */
    if (args->json && args->verb->run == verb_monitor)
        return verb_complain(code, sentence);
    if (args->json && args->verb->run == verb_migrate)
        show_json(show_json_failure(args->name, "source", "failed", sentence));
    else if (args->json && args->name)
        show_json(show_json_failure(args->name, NULL, NULL, sentence));
    else if (args->json && args->verb->run == verb_status)
        show_json(json_pack("{s:[], s:o}", "sessions", "reason", show_json_text(sentence)));
    else if (args->json && args->process.pid)
        show_json(json_pack("{s:i, s:n, s:o}", "pid", (int)args->process.pid, "able", "reason",
                            show_json_text(sentence)));
    else if (args->json)
        show_json(
            json_pack("{s:n, s:{}, s:o}", "able", "checks", "reason", show_json_text(sentence)));
    return verb_complain(code, sentence);
}

int verb_target(const struct cli_args *args, struct verb_target *out, char **owned,
                struct mf_error *err)
{
    const struct cli_process *process = &args->process;
    static char none[] = "";
    out->process_p = NULL;
    out->qmp_path = none;
    if (args->qmp_path) {
        int rc = cli_absolute(args->qmp_path, owned, err);
        out->qmp_path = *owned;
        return rc;
    }
    memferry__control__process__init(&out->process);
    out->process.pid = process->pid;
    out->process.pause = (char *)(uintptr_t)process->pause;
    out->process.save = (char *)(uintptr_t)process->save;
    out->process.load = (char *)(uintptr_t)process->load;
    out->process.resume = (char *)(uintptr_t)process->resume;
    out->process.timeout_s = process->timeout_s;
    for (unsigned i = 0; i < process->region_count; i++) {
        memferry__control__region_choice__init(&out->region[i]);
        out->region[i].name = (char *)(uintptr_t)process->region[i].name;
        out->region[i].what = (char *)(uintptr_t)process->region[i].what;
        out->region_p[i] = &out->region[i];
    }
    out->process.regions = out->region_p;
    out->process.n_regions = process->region_count;
    out->process_p = &out->process;
    return 0;
}

int verb_reply_code(const Memferry__Control__Reply *reply)
{
    if (reply->exit_code > CLI_RELEASED)
        return CLI_FAILED;
    return reply->error[0] && !reply->exit_code ? CLI_FAILED : (int)reply->exit_code;
}

int verb_simple(const struct cli_args *args, const Memferry__Control__Request *request,
                int timeout_ms, const char *success)
{
    Memferry__Control__Reply *reply = NULL;
    struct mf_error err;
    if (client_ask(args->runtime_dir, request, timeout_ms, &reply, &err) < 0)
        return verb_complain(CLI_UNREACHABLE, err.text);
    int code = verb_reply_code(reply);
    if (reply->error[0])
        verb_complain(code, reply->error);
    else if (reply->message[0] || success)
        puts(reply->message[0] ? reply->message : success);
    memferry__control__reply__free_unpacked(reply, NULL);
    return code;
}
