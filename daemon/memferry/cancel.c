/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/memferry/verbs.h"

#include <stdio.h>

int verb_cancel(const struct cli_args *args)
{
    Memferry__Control__NameRequest name = MEMFERRY__CONTROL__NAME_REQUEST__INIT;
    name.name = (char *)args->name;
    Memferry__Control__Request request = MEMFERRY__CONTROL__REQUEST__INIT;
    request.verb_case = MEMFERRY__CONTROL__REQUEST__VERB_CANCEL;
    request.cancel = &name;
    char success[160];
    snprintf(success, sizeof(success), "%s: the migration is cancelled.", args->name);
    return verb_simple(args, &request, -1, success);
}
