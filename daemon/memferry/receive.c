/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/memferry/verbs.h"

#include <stdio.h>

#include "lib/util.h"

int verb_receive(const struct cli_args *args)
{
    cleanup_free char *qmp_path = NULL;
    struct verb_target target;
    struct mf_error err;
    if (verb_target(args, &target, &qmp_path, &err) < 0)
        return verb_complain(CLI_FAILED, err.text);

    Memferry__Control__ReceiveRequest receive = MEMFERRY__CONTROL__RECEIVE_REQUEST__INIT;
    receive.name = (char *)args->name;
    receive.qmp_path = target.qmp_path;
    receive.process = target.process_p;
    Memferry__Control__Request request = MEMFERRY__CONTROL__REQUEST__INIT;
    request.verb_case = MEMFERRY__CONTROL__REQUEST__VERB_RECEIVE;
    request.receive = &receive;
    char success[256];
    snprintf(success, sizeof(success),
             "%s is armed. Now, on the host where it runs: memferry migrate %s %s --to THIS-HOST",
             args->name, args->name, target.process_p ? "--pid PID --save COMMAND" : "--qmp PATH");
    /* Arming is as fast as the VMM answers; Ctrl-C ends the wait, not the arming. */
    return verb_simple(args, &request, -1, success);
}
