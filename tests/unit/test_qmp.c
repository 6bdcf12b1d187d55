/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The QMP parser, preflight's decisions and the migration settings, without a socket or a QEMU. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/memferryd/qemu/preflight.h"
#include "daemon/memferryd/qemu/qmp_parse.h"
#include "daemon/memferryd/qemu/settings.h"

/* ---- parser ---- */

struct seen {
    char text[1024]; /* one word a message */
    unsigned stop_after;
    unsigned count;
};

static bool note(void *arg, const struct qmp_message *message)
{
    struct seen *seen = arg;
    char word[160];
    switch (message->kind) {
    case QMP_GREETING:
        snprintf(word, sizeof(word), "greeting ");
        break;
    case QMP_RETURN:
        snprintf(word, sizeof(word), "return:%d ", message->has_id ? (int)message->id : -1);
        break;
    case QMP_ERROR:
        snprintf(word, sizeof(word), "error:%d:%s ", message->has_id ? (int)message->id : -1,
                 message->desc);
        break;
    case QMP_EVENT:
        snprintf(word, sizeof(word), "event:%s%s ", message->name, message->body ? "+" : "");
        break;
    }
    strncat(seen->text, word, sizeof(seen->text) - strlen(seen->text) - 1);
    return ++seen->count != seen->stop_after;
}

static const char session[] =
    "{\"QMP\": {\"version\": {\"qemu\": {\"micro\": 22, \"minor\": 2, \"major\": 7}, \"package\": "
    "\"\"}, \"capabilities\": [\"oob\"]}}\r\n"
    "{\"return\": {}, \"id\": 1}\r\n"
    "{\"timestamp\": {\"seconds\": 1, \"microseconds\": 2}, \"event\": \"STOP\"}\r\n"
    "{\"timestamp\": {\"seconds\": 1, \"microseconds\": 2}, \"event\": \"MIGRATION\", \"data\": "
    "{\"status\": \"active\"}}\r\n"
    "{\n    \"return\": [\n        {\"text\": \"braces } ] { [ and \\\" \\\\\"}\n    ],\n    "
    "\"id\": "
    "2\n}\r\n"
    "{\"id\": 3, \"error\": {\"class\": \"GenericError\", \"desc\": \"no\"}}\r\n"
    "{\"error\": {\"class\": \"GenericError\", \"desc\": \"what?\"}}\r\n";
static const char session_seen[] =
    "greeting return:1 event:STOP event:MIGRATION+ return:2 error:3:no error:-1:what? ";

static void parser_cuts_messages_anywhere(void **state)
{
    (void)state;
    for (size_t portion = 1; portion < sizeof(session); portion++) {
        struct qmp_parser parser = {0};
        struct seen seen = {0};
        for (size_t at = 0; at < sizeof(session) - 1; at += portion) {
            size_t left = sizeof(session) - 1 - at;
            assert_int_equal(qmp_parser_feed(&parser, session + at, left < portion ? left : portion,
                                             note, &seen, NULL),
                             0);
        }
        assert_string_equal(seen.text, session_seen);
        qmp_parser_clear(&parser);
    }
}

static void parser_stops_when_told(void **state)
{
    (void)state;
    struct qmp_parser parser = {0};
    struct seen seen = {.stop_after = 2};
    assert_int_equal(qmp_parser_feed(&parser, session, sizeof(session) - 1, note, &seen, NULL), 0);
    assert_string_equal(seen.text, "greeting return:1 ");
    qmp_parser_clear(&parser);
}

static void parser_refuses_what_is_not_qmp(void **state)
{
    (void)state;
    static const char *const garbage[] = {
        "SSH-2.0-OpenSSH_9.2\r\n",
        "[1, 2]\n",
        "\"text\"",
        "{}",
        "{\"hello\": 1}\n",
        "{]}",
        "{\"event\": 5}\n",
        "{\"return\" 5}\n",
        "{\"error\": \"text\"}\n",
        "{\"QMP\": 1}\n",
        "\x01\x02\x1b[31m",
        "{\"a\": 1, \"a\": 2}\n",
    };
    for (size_t i = 0; i < sizeof(garbage) / sizeof(garbage[0]); i++) {
        struct qmp_parser parser = {0};
        struct seen seen = {0};
        struct mf_error err = {0};
        assert_int_equal(
            qmp_parser_feed(&parser, garbage[i], strlen(garbage[i]), note, &seen, &err), -EPROTO);
        assert_non_null(strstr(err.text, "is it a QMP socket"));
        assert_null(strchr(err.text, '\x1b')); /* nothing for a terminal to obey */
        assert_int_equal(seen.count, 0);
        qmp_parser_clear(&parser);
    }
}

static void parser_bounds_a_message(void **state)
{
    (void)state;
    struct qmp_parser parser = {.max_bytes = 1000};
    struct seen seen = {0};
    struct mf_error err = {0};
    char filler[100];
    memset(filler, 'x', sizeof(filler));
    assert_int_equal(qmp_parser_feed(&parser, "{\"event\": \"", 11, note, &seen, &err), 0);
    int rc = 0;
    unsigned portions = 0;
    while (rc == 0 && portions < 100) {
        rc = qmp_parser_feed(&parser, filler, sizeof(filler), note, &seen, &err);
        portions++;
    }
    assert_int_equal(rc, -EMSGSIZE);
    assert_int_equal(portions, 10);
    assert_non_null(strstr(err.text, "1000 bytes"));
    qmp_parser_clear(&parser);

    /* many small ones may be longer together */
    for (int i = 0; i < 100; i++)
        assert_int_equal(
            qmp_parser_feed(&parser, "{\"event\": \"RESET\"}\n", 19, note, &seen, &err), 0);
    assert_int_equal(seen.count, 100);
    qmp_parser_clear(&parser);
}

/* ---- preflight ---- */

#define CAPABILITIES                                                                               \
    "[{'capability':'xbzrle','state':false},{'capability':'events','state':false},"                \
    "{'capability':'postcopy-ram','state':true},{'capability':'return-path','state':true},"        \
    "{'capability':'pause-before-switchover','state':false},"                                      \
    "{'capability':'dirty-bitmaps','state':true},"                                                 \
    "{'capability':'late-block-activate','state':false},"                                          \
    "{'capability':'x-ignore-shared','state':false}]"
#define FILE_RAM                                                                                   \
    "[{'id':'ram0','type':'memory-backend-file','share':true,'size':67108864,"                     \
    "'mem-path':'/dev/shm/vm1','container':''}]"

/* Replies of a QEMU that passes; a case replaces one of them. */
struct canned {
    const char *version, *status, *migration, *capabilities, *ram_backend, *backends, *devices,
        *network;
};
static const struct canned good_source = {
    .version = "{'qemu':{'major':7,'minor':2,'micro':22}}",
    .status = "{'status':'running','running':true}",
    .migration = "{}",
    .capabilities = CAPABILITIES,
    .ram_backend = "'/objects/ram0'",
    .backends = FILE_RAM,
    .devices = "[{'name':'net0','type':'virtio-net-pci'}]",
    .network =
        "'net0: index=0,type=nic,model=virtio-net-pci\\r\\n \\\\ n0: index=0,type=tap,vhost=on'",
};

/* JSON with ' for ", which reads better in C. */
static json_t *parse(const char *text)
{
    if (!text)
        return NULL;
    char *copy = strdup(text);
    for (char *c = copy; *c; c++)
        if (*c == '\'')
            *c = '"';
    json_error_t why;
    json_t *value = json_loads(copy, JSON_DECODE_ANY, &why);
    if (!value)
        fail_msg("test's own JSON: %s in %s", why.text, text);
    free(copy);
    return value;
}

static int judge(enum vmm_role role, const struct canned *canned, struct vmm_info *info,
                 struct mf_error *err)
{
    struct qemu_replies replies = {
        .version = parse(canned->version),
        .status = parse(canned->status),
        .migration = parse(canned->migration),
        .capabilities = parse(canned->capabilities),
        .ram_backend = parse(canned->ram_backend),
        .backends = parse(canned->backends),
        .devices = parse(canned->devices),
        .network = parse(canned->network),
    };
    *info = (struct vmm_info){0};
    *err = (struct mf_error){0};
    int rc = preflight_judge(role, "vm1", &replies, info, err);
    json_t *all[] = {replies.version,     replies.status,   replies.migration, replies.capabilities,
                     replies.ram_backend, replies.backends, replies.devices,   replies.network};
    for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++)
        json_decref(all[i]);
    return rc;
}

static void passes(enum vmm_role role, struct canned canned, struct vmm_info *info)
{
    struct mf_error err;
    if (judge(role, &canned, info, &err))
        fail_msg("refused: %s", err.text);
}

/* Refused by a sentence that names the VM and contains @part. */
static void refuses(enum vmm_role role, struct canned canned, const char *part)
{
    struct vmm_info info;
    struct mf_error err;
    assert_true(judge(role, &canned, &info, &err) < 0);
    free(info.backends);
    if (!strstr(err.text, part) || !strstr(err.text, "vm1"))
        fail_msg("expected '%s' in: %s", part, err.text);
}

#define WITH(...) ((struct canned){__VA_ARGS__})

static struct canned with(struct canned change)
{
    struct canned out = good_source;
    if (change.version)
        out.version = change.version;
    if (change.status)
        out.status = change.status;
    if (change.migration)
        out.migration = change.migration;
    if (change.capabilities)
        out.capabilities = change.capabilities;
    if (change.ram_backend)
        out.ram_backend = change.ram_backend;
    if (change.backends)
        out.backends = change.backends;
    if (change.devices)
        out.devices = change.devices;
    if (change.network)
        out.network = change.network;
    return out;
}

static void preflight_passes(void **state)
{
    (void)state;
    struct vmm_info info;
    passes(VMM_SOURCE, good_source, &info);
    assert_string_equal(info.version, "QEMU 7.2.22");
    assert_true(info.was_running);
    assert_int_equal(info.backend_count, 1);
    assert_string_equal(info.backends[0].id, "ram0");
    assert_string_equal(info.backends[0].path, "/dev/shm/vm1");
    assert_int_equal(info.backends[0].size_bytes, 67108864);
    free(info.backends);

    passes(VMM_SOURCE, with(WITH(.status = "{'status':'paused','running':false}")), &info);
    assert_false(info.was_running);
    free(info.backends);
    passes(VMM_SOURCE, with(WITH(.status = "{'status':'suspended','running':false}")), &info);
    assert_true(info.was_running);
    free(info.backends);
    /* what a cancelled migration leaves of a paused guest */
    passes(VMM_SOURCE,
           with(WITH(.status = "{'status':'postmigrate','running':false}",
                     .migration = "{'status':'cancelled'}")),
           &info);
    free(info.backends);
    passes(VMM_DESTINATION, with(WITH(.status = "{'status':'inmigrate','running':false}")), &info);
    free(info.backends);
}

static void preflight_takes_the_ram_that_is_used(void **state)
{
    (void)state;
    struct vmm_info info;
    /* two NUMA nodes in one container, a spare that is in none; sorted by name */
    passes(VMM_SOURCE,
           with(WITH(.ram_backend = "''",
                     .backends =
                         "[{'id':'ram1','type':'memory-backend-file','share':true,'size':4096,"
                         "'mem-path':'/dev/shm/b','container':'/machine/pc.ram[0]'},"
                         "{'id':'spare','type':'memory-backend-memfd','share':true,'size':4096,"
                         "'container':''},"
                         "{'id':'ram0','type':'memory-backend-file','share':true,'size':8192,"
                         "'mem-path':'/dev/shm/a','container':'/machine/pc.ram[0]'}]")),
           &info);
    assert_int_equal(info.backend_count, 2);
    assert_string_equal(info.backends[0].id, "ram0");
    assert_string_equal(info.backends[1].id, "ram1");
    free(info.backends);

    refuses(
        VMM_SOURCE,
        with(WITH(.backends = "[{'id':'ram0','type':'memory-backend-file','share':true,'size':8192,"
                              "'mem-path':'/dev/shm/a','container':''},"
                              "{'id':'dimm','type':'memory-backend-ram','share':false,'size':4096,"
                              "'container':'/machine/device-memory[0]'}]")),
        "DIMM's memdev=dimm");
    refuses(VMM_SOURCE, with(WITH(.backends = "[]")), "has no RAM that memferry can move");
    refuses(
        VMM_SOURCE,
        with(WITH(.ram_backend = "'/objects/pc.ram'",
                  .backends = "[{'id':'pc.ram','type':'memory-backend-ram','share':false,"
                              "'size':4096,'container':''}]")),
        "id=ram0,share=on,mem-path=/dev/shm/vm1-ram0,size=4096 and -machine …,memory-backend=ram0");
    refuses(VMM_SOURCE,
            with(WITH(.backends = "[{'id':'ram0','type':'memory-backend-file','share':false,"
                                  "'size':4096,'mem-path':'/dev/shm/a','container':''}]")),
            "without share=on");
    static const char memfd[] =
        "[{'id':'ram0','type':'memory-backend-memfd','share':true,'size':4096,"
        "'container':''}]";
    refuses(VMM_SOURCE, with(WITH(.backends = memfd)), "no file name");
    refuses(VMM_SOURCE,
            with(WITH(.version = "{'qemu':{'major':8,'minor':1,'micro':0}}", .backends = memfd)),
            "own migration would send");
    refuses(VMM_SOURCE,
            with(WITH(.backends = "[{'id':'ram0','type':'memory-backend-file','share':true,"
                                  "'container':''}]")),
            "unusable size");
}

static void preflight_refuses_wrong_qemus(void **state)
{
    (void)state;
    refuses(VMM_SOURCE, with(WITH(.version = "{'qemu':{'major':7,'minor':1,'micro':9}}")),
            "7.2 or newer");
    refuses(VMM_SOURCE, with(WITH(.version = "{'qemu':'nonsense'}")), "7.2 or newer");
    refuses(VMM_SOURCE,
            with(WITH(.capabilities = "[{'capability':'events','state':false},"
                                      "{'capability':'return-path','state':false}]")),
            "'x-ignore-shared'");
    refuses(VMM_SOURCE,
            with(WITH(.migration = "{'blocked-reasons':['disk d0 is not migratable']}")),
            "disk d0 is not migratable");
}

static void preflight_refuses_wrong_states(void **state)
{
    (void)state;
    refuses(VMM_SOURCE, with(WITH(.migration = "{'status':'active'}")), "'active'");
    refuses(VMM_SOURCE, with(WITH(.status = "{'status':'prelaunch'}")), "never started");
    refuses(VMM_SOURCE, with(WITH(.status = "{'status':'inmigrate'}")), "memferry receive");
    refuses(VMM_SOURCE, with(WITH(.status = "{'status':'a-new-one'}")), "'a-new-one'");
    refuses(VMM_SOURCE,
            with(WITH(.status = "{'status':'postmigrate'}", .migration = "{'status':'completed'}")),
            "runs nowhere else");
    refuses(VMM_DESTINATION, good_source, "-S -incoming defer");
    refuses(VMM_DESTINATION,
            with(WITH(.status = "{'status':'inmigrate'}", .migration = "{'status':'setup'}")),
            "-incoming defer");
}

static void preflight_refuses_devices(void **state)
{
    (void)state;
    static const char *const types[] = {"vfio-pci",          "vfio-user-pci",
                                        "vhost-user-fs-pci", "vhost-user-blk-pci",
                                        "ivshmem-doorbell",  "vhost-vdpa-device-pci"};
    for (size_t i = 0; i < sizeof(types) / sizeof(types[0]); i++) {
        char devices[160];
        snprintf(devices, sizeof(devices), "[{'name':'dev7','type':'%s'}]", types[i]);
        refuses(VMM_SOURCE, with(WITH(.devices = devices)), "dev7");
        refuses(VMM_DESTINATION, with(WITH(.devices = devices, .status = "{'status':'inmigrate'}")),
                "dev7");
    }
    refuses(VMM_SOURCE, with(WITH(.network = "'n0: index=0,type=vhost-user,fd=7'")),
            "vhost-user network");
    refuses(VMM_SOURCE, with(WITH(.network = "'n0: index=0,type=vhost-vdpa'")),
            "vhost-vdpa network");
}

/* ---- settings ---- */

static void settings_change_only_what_differs(void **state)
{
    (void)state;
    json_t *capabilities = parse(CAPABILITIES);
    struct qemu_change change = settings_capabilities(capabilities);
    json_t *apply = parse("{'capabilities':[{'capability':'events','state':true},"
                          "{'capability':'postcopy-ram','state':false},"
                          "{'capability':'pause-before-switchover','state':true},"
                          "{'capability':'late-block-activate','state':true},"
                          "{'capability':'x-ignore-shared','state':true}]}");
    json_t *undo = parse("{'capabilities':[{'capability':'events','state':false},"
                         "{'capability':'postcopy-ram','state':true},"
                         "{'capability':'pause-before-switchover','state':false},"
                         "{'capability':'late-block-activate','state':false},"
                         "{'capability':'x-ignore-shared','state':false}]}");
    assert_true(json_equal(change.apply, apply));
    assert_true(json_equal(change.undo, undo));
    settings_change_clear(&change);
    json_decref(apply);
    json_decref(undo);
    json_decref(capabilities);

    json_t *parameters = parse("{'downtime-limit':300,'max-bandwidth':134217728,'tls-creds':'',"
                               "'multifd-channels':2}");
    change = settings_parameters(parameters);
    undo = parse("{'downtime-limit':300,'max-bandwidth':134217728}");
    assert_true(json_equal(change.undo, undo));
    assert_int_equal(json_object_size(change.apply), 2);
    settings_change_clear(&change);
    json_decref(undo);
    json_decref(parameters);

    parameters = parse("{'tls-creds':'tls0','mode':'cpr-reboot'}");
    change = settings_parameters(parameters);
    assert_true(json_equal(change.undo, parameters));
    settings_change_clear(&change);
    json_decref(parameters);

    change = settings_parameters(NULL);
    assert_null(change.apply);
    assert_null(change.undo);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(parser_cuts_messages_anywhere),
        cmocka_unit_test(parser_stops_when_told),
        cmocka_unit_test(parser_refuses_what_is_not_qmp),
        cmocka_unit_test(parser_bounds_a_message),
        cmocka_unit_test(preflight_passes),
        cmocka_unit_test(preflight_takes_the_ram_that_is_used),
        cmocka_unit_test(preflight_refuses_wrong_qemus),
        cmocka_unit_test(preflight_refuses_wrong_states),
        cmocka_unit_test(preflight_refuses_devices),
        cmocka_unit_test(settings_change_only_what_differs),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
