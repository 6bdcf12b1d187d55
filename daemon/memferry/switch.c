/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/memferry/verbs.h"

#include <stdio.h>

#include "daemon/memferry/client.h"

int verb_switch(const struct cli_args *args)
{
    Memferry__Control__NameRequest name = MEMFERRY__CONTROL__NAME_REQUEST__INIT;
    name.name = (char *)args->name;
    Memferry__Control__Request request = MEMFERRY__CONTROL__REQUEST__INIT;
    request.verb_case = MEMFERRY__CONTROL__REQUEST__VERB_SWITCH_NOW;
    request.switch_now = &name;
    char success[160];
    /* It may have done so by itself a moment ago: that is no failure. */
    snprintf(success, sizeof(success), "%s: the guest changes hosts now, or has done so already.",
             args->name);
    return verb_simple(args, &request, CLIENT_PATIENCE_MS, success);
}
