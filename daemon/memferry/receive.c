/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/memferry/verbs.h"

#include <stdio.h>

#include "lib/util.h"

int verb_receive(const struct cli_args *args)
{
    cleanup_free char *qmp_path = NULL;
    struct mf_error err;
    if (cli_absolute(args->qmp_path, &qmp_path, &err) < 0)
        return verb_complain(CLI_FAILED, err.text);

    Memferry__Control__ReceiveRequest receive = MEMFERRY__CONTROL__RECEIVE_REQUEST__INIT;
    receive.name = (char *)args->name;
    receive.qmp_path = qmp_path;
    Memferry__Control__Request request = MEMFERRY__CONTROL__REQUEST__INIT;
    request.verb_case = MEMFERRY__CONTROL__REQUEST__VERB_RECEIVE;
    request.receive = &receive;
    char success[256];
    snprintf(success, sizeof(success),
             "%s is armed. Now, on the host where it runs: memferry migrate %s --qmp PATH --to "
             "THIS-HOST",
             args->name, args->name);
    /* Arming is as fast as the VMM answers; Ctrl-C ends the wait, not the arming. */
    return verb_simple(args, &request, -1, success);
}
