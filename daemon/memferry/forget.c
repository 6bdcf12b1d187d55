/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/memferry/verbs.h"

#include "daemon/memferry/client.h"

int verb_forget(const struct cli_args *args)
{
    Memferry__Control__NameRequest name = MEMFERRY__CONTROL__NAME_REQUEST__INIT;
    name.name = (char *)args->name;
    Memferry__Control__Request request = MEMFERRY__CONTROL__REQUEST__INIT;
    request.verb_case = MEMFERRY__CONTROL__REQUEST__VERB_FORGET;
    request.forget = &name;
    return verb_simple(args, &request, CLIENT_PATIENCE_MS, NULL);
}
