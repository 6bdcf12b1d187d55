/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/memferry/verbs.h"

#include <stdio.h>

#include "daemon/memferry/client.h"
#include "daemon/memferry/units.h"

int verb_set(const struct cli_args *args)
{
    Memferry__Control__SetRequest set = MEMFERRY__CONTROL__SET_REQUEST__INIT;
    set.name = (char *)args->name;
    set.bandwidth_bits_s = args->bandwidth_bits_s;
    Memferry__Control__Request request = MEMFERRY__CONTROL__REQUEST__INIT;
    request.verb_case = MEMFERRY__CONTROL__REQUEST__VERB_SET;
    request.set = &set;
    char success[160];
    if (args->bandwidth_bits_s)
        snprintf(success, sizeof(success), "%s: memory is sent at %s at most.", args->name,
                 show_bits(args->bandwidth_bits_s).text);
    else
        snprintf(success, sizeof(success), "%s: memory is sent without a limit.", args->name);
    return verb_simple(args, &request, CLIENT_PATIENCE_MS, success);
}
