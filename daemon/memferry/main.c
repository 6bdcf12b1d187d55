/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * memferry, the command line: memferry(1).
 */
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "daemon/memferry/args.h"
#include "daemon/memferry/verbs.h"

static void print_help(void)
{
    puts("memferry - move running virtual machines between hosts, from outside\n"
         "\n"
         "usage: memferry [--runtime-dir DIR] VERB [NAME] [OPTION...]\n");
    for (const struct cli_verb *verb = cli_verbs; verb->word; verb++)
        printf("  %-8s  %s\n", verb->word, verb->summary);
    puts("\n"
         "  --runtime-dir DIR  where memferryd has its control socket (default: /run/memferry)\n"
         "  --help             this, or with a verb what that takes\n"
         "  --version          the version\n"
         "\n"
         "Exit codes: 0 done; 1 failed, the guest is safe at the source; 2 wrong usage;\n"
         "3 memferryd can't be reached; 4 the guest has changed hosts, its memory has not all "
         "arrived.\n"
         "More in memferry(1) and memferryd(8).");
}

static void print_verb_help(const struct cli_verb *verb)
{
    bool alone = verb->run == verb_check || verb->run == verb_monitor; /* they need no memferryd */
    printf("usage: memferry %s%s%s%s\n\n%s", alone ? "" : "[--runtime-dir DIR] ", verb->word,
           verb->usage[0] ? " " : "", verb->usage, verb->help);
}

static int run(int argc, char **argv)
{
    struct cli_args args;
    struct mf_error err;
    if (cli_parse(argc, argv, cli_verbs, &args, &err) < 0)
        return verb_fail(&args, CLI_USAGE, err.text);
    if (args.help && args.verb)
        print_verb_help(args.verb);
    else if (args.help)
        print_help();
    else if (args.version)
        puts("memferry " MF_VERSION);
    else
        return args.verb->run(&args);
    return CLI_DONE;
}

/** keep_places() - a standard stream that is closed must not become a socket that is written to by
 * mistake: what stands in its place can't be written to. */
static void keep_places(void)
{
    int fd;
    do
        fd = open("/dev/null", O_RDONLY);
    while (fd >= 0 && fd <= STDERR_FILENO);
    if (fd >= 0)
        close(fd);
}

int main(int argc, char **argv)
{
    keep_places();
    signal(SIGPIPE, SIG_IGN);
    int code = run(argc, argv);
    if (fflush(stdout) != 0 || ferror(stdout)) {
        verb_complain(0, "cannot write to the standard output");
        return code ? code : CLI_FAILED;
    }
    return code;
}
