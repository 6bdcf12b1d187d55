/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/memferry/verbs.h"

#include "daemon/memferry/client.h"
#include "daemon/memferry/show.h"

static int show_all_json(const Memferry__Control__Reply *reply)
{
    json_t *array = json_array();
    for (size_t i = 0; array && i < reply->n_sessions; i++) {
        if (json_array_append_new(array, show_json_session(reply->sessions[i])) < 0) {
            json_decref(array);
            array = NULL;
        }
    }
    return show_json(array ? json_pack("{s:o}", "sessions", array) : NULL);
}

static int show(const struct cli_args *args, const Memferry__Control__Reply *reply)
{
    if (!args->name) {
        if (args->json)
            return show_all_json(reply);
        show_table(reply->sessions, reply->n_sessions);
        return CLI_DONE;
    }
    if (reply->n_sessions != 1)
        return verb_fail(
            args, CLI_UNREACHABLE,
            "memferryd answered without a session; memferry and memferryd must be of the same "
            "version");
    if (args->json)
        return show_json(show_json_session(reply->sessions[0]));
    show_status(reply->sessions[0]);
    return CLI_DONE;
}

int verb_status(const struct cli_args *args)
{
    Memferry__Control__StatusRequest status = MEMFERRY__CONTROL__STATUS_REQUEST__INIT;
    if (args->name)
        status.name = (char *)args->name;
    Memferry__Control__Request request = MEMFERRY__CONTROL__REQUEST__INIT;
    request.verb_case = MEMFERRY__CONTROL__REQUEST__VERB_STATUS;
    request.status = &status;

    Memferry__Control__Reply *reply = NULL;
    struct mf_error err;
    if (client_ask(args->runtime_dir, &request, CLIENT_PATIENCE_MS, &reply, &err) < 0)
        return verb_fail(args, CLI_UNREACHABLE, err.text);
    int code =
        reply->error[0] ? verb_fail(args, verb_reply_code(reply), reply->error) : show(args, reply);
    memferry__control__reply__free_unpacked(reply, NULL);
    return code;
}
