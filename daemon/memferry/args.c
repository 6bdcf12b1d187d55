/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "daemon/memferry/args.h"

#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "daemon/memferry/units.h"
#include "lib/util.h"

static const char default_runtime_dir[] = "/run/memferry";

/* ---- "did you mean" ---- */

#define WORD_MAX 24u

/* Levenshtein distance; words of this program are short. */
static unsigned distance(const char *a, const char *b)
{
    size_t a_length = strlen(a), b_length = strlen(b);
    if (a_length >= WORD_MAX || b_length >= WORD_MAX)
        return WORD_MAX;
    unsigned row[WORD_MAX + 1];
    for (unsigned i = 0; i <= b_length; i++)
        row[i] = i;
    for (size_t i = 1; i <= a_length; i++) {
        unsigned diagonal = row[0];
        row[0] = (unsigned)i;
        for (size_t j = 1; j <= b_length; j++) {
            unsigned best = diagonal + (a[i - 1] != b[j - 1]);
            diagonal = row[j];
            if (row[j] + 1 < best)
                best = row[j] + 1;
            if (row[j - 1] + 1 < best)
                best = row[j - 1] + 1;
            row[j] = best;
        }
    }
    return row[b_length];
}

static void consider(const char *word, const char *candidate, unsigned *best, const char **nearest)
{
    unsigned d = distance(word, candidate);
    if (d < *best) {
        *best = d;
        *nearest = candidate;
    }
}

/** Further away than this a word is something else, not a slip of the finger. */
#define SLIP_MAX 3u

/* ---- options ---- */

static int set_qmp(struct cli_args *args, const char *value, struct mf_error *err)
{
    if (!value[0])
        return mf_fail(err, EINVAL,
                       "--qmp is empty; it is the path of the VM's QMP socket, as in "
                       "'-qmp unix:PATH,server=on,wait=off' of QEMU");
    args->qmp_path = value;
    return 0;
}

static int set_pid(struct cli_args *args, const char *value, struct mf_error *err)
{
    uint64_t pid;
    if (mf_number_parse(value, 1, INT32_MAX, &pid) < 0)
        return mf_fail(err, EINVAL, "--pid '%.80s' is not the id of a process", value);
    if (pid == 1)
        return mf_fail(err, EINVAL, "--pid 1: the first process of a host can't be migrated");
    args->process.pid = (uint32_t)pid;
    return 0;
}

static int take_command(const char *option, const char *value, const char **out,
                        struct mf_error *err)
{
    if (!value[0])
        return mf_fail(err, EINVAL, "%s is empty; it is a command for 'sh -c'", option);
    if (strlen(value) >= MF_CONTROL_COMMAND_MAX_BYTES)
        return mf_fail(err, EINVAL, "%s is longer than %u characters; put it in a script", option,
                       MF_CONTROL_COMMAND_MAX_BYTES - 1);
    *out = value;
    return 0;
}

static int set_pause(struct cli_args *args, const char *value, struct mf_error *err)
{
    return take_command("--pause", value, &args->process.pause, err);
}

static int set_save(struct cli_args *args, const char *value, struct mf_error *err)
{
    return take_command("--save", value, &args->process.save, err);
}

static int set_load(struct cli_args *args, const char *value, struct mf_error *err)
{
    return take_command("--load", value, &args->process.load, err);
}

static int set_resume(struct cli_args *args, const char *value, struct mf_error *err)
{
    return take_command("--resume", value, &args->process.resume, err);
}

static int set_region(struct cli_args *args, const char *value, struct mf_error *err)
{
    struct cli_process *process = &args->process;
    struct mf_error why;
    if (process->region_count == MF_CHOICES_MAX)
        return mf_fail(err, EINVAL, "more than %d regions are too many", MF_CHOICES_MAX);
    struct mf_choice *choice = &process->region[process->region_count];
    if (mf_choice_parse(value, choice, &why) < 0)
        return mf_fail(err, EINVAL, "--region: %s", why.text);
    for (unsigned i = 0; i < process->region_count; i++)
        if (strcmp(process->region[i].name, choice->name) == 0)
            return mf_fail(err, EINVAL, "--region %s is given twice", choice->name);
    process->region_count++;
    return 0;
}

static int set_to(struct cli_args *args, const char *value, struct mf_error *err)
{
    struct mf_error why;
    if (mf_endpoint_parse(value, &args->to, &why) < 0)
        return mf_fail(err, EINVAL, "--to: %s", why.text);
    if (!args->to.host[0])
        return mf_fail(err, EINVAL,
                       "--to '%.80s' names no host; it is HOST or HOST:PORT of the memferryd that "
                       "shall have the VM",
                       value);
    return 0;
}

static int set_streams(struct cli_args *args, const char *value, struct mf_error *err)
{
    uint64_t streams;
    if (mf_number_parse(value, 1, MF_CONTROL_STREAMS_MAX, &streams) < 0)
        return mf_fail(err, EINVAL, "--streams '%.80s' is not a number from 1 to %u", value,
                       MF_CONTROL_STREAMS_MAX);
    args->streams = (unsigned)streams;
    return 0;
}

static int set_mode(struct cli_args *args, const char *value, struct mf_error *err)
{
    /* Empty is the default on the wire, and a slip here. */
    const char *mode = value[0] ? mf_control_mode(value) : NULL;
    if (!mode)
        return mf_fail(err, EINVAL, "--mode '%.80s' is none of hybrid, postcopy and precopy",
                       value);
    args->rounds.mode = mode;
    return 0;
}

/* @name: what the value is called at the place where it stands. */
static int take_bandwidth(struct cli_args *args, const char *name, const char *value,
                          struct mf_error *err)
{
    uint64_t bits_s = 0;
    int rc = rate_parse(value, &bits_s);
    if (rc == -EINVAL)
        return mf_fail(err, EINVAL,
                       "%s '%.80s' is not a rate; it is bits per second, with k, M, G or T behind "
                       "the number, as in 2.5G, or 'none'",
                       name, value);
    if (rc < 0 || bits_s > MF_CONTROL_BANDWIDTH_MAX_BITS_S)
        return mf_fail(err, EINVAL, "%s '%.80s' is more than 1000T, the most that can be asked for",
                       name, value);
    if (bits_s && bits_s < MF_CONTROL_BANDWIDTH_MIN_BITS_S)
        return mf_fail(err, EINVAL,
                       "%s '%.80s' is less than 64k bits per second, and nothing would ever get "
                       "through; was a suffix (k, M, G, T) forgotten? 'none' is no limit",
                       name, value);
    args->bandwidth_bits_s = bits_s;
    args->bandwidth_given = true;
    return 0;
}

static int set_bandwidth(struct cli_args *args, const char *value, struct mf_error *err)
{
    return take_bandwidth(args, "--bandwidth", value, err);
}

static int take_number(const char *name, const char *value, const char *unit, uint32_t most,
                       uint32_t *out, struct mf_error *err)
{
    uint64_t number;
    if (mf_number_parse(value, 1, most, &number) < 0)
        return mf_fail(err, EINVAL, "%s '%.80s' is not a number%s from 1 to %u", name, value, unit,
                       most);
    *out = (uint32_t)number;
    return 0;
}

static int set_max_rounds(struct cli_args *args, const char *value, struct mf_error *err)
{
    return take_number("--max-rounds", value, "", MF_CONTROL_ROUNDS_MAX, &args->rounds.max_rounds,
                       err);
}

static int set_switch_after(struct cli_args *args, const char *value, struct mf_error *err)
{
    return take_number("--switch-after", value, " of seconds", MF_CONTROL_SWITCH_AFTER_MAX_S,
                       &args->rounds.switch_after_s, err);
}

static int set_max_blackout(struct cli_args *args, const char *value, struct mf_error *err)
{
    return take_number("--max-blackout", value, " of milliseconds", MF_CONTROL_BLACKOUT_MAX_MS,
                       &args->rounds.max_blackout_ms, err);
}

static int set_timeout(struct cli_args *args, const char *value, struct mf_error *err)
{
    return take_number("--timeout", value, " of seconds", MF_CONTROL_TIMEOUT_MAX_S,
                       &args->process.timeout_s, err);
}

static int set_fallback(struct cli_args *args, const char *value, struct mf_error *err)
{
    (void)value;
    (void)err;
    args->rounds.fallback = true;
    return 0;
}

static int set_json(struct cli_args *args, const char *value, struct mf_error *err)
{
    (void)value;
    (void)err;
    args->json = true;
    return 0;
}

static int set_detach(struct cli_args *args, const char *value, struct mf_error *err)
{
    (void)value;
    (void)err;
    args->detach = true;
    return 0;
}

static int set_keep_source(struct cli_args *args, const char *value, struct mf_error *err)
{
    (void)value;
    (void)err;
    args->keep_source = true;
    return 0;
}

static int set_help(struct cli_args *args, const char *value, struct mf_error *err)
{
    (void)value;
    (void)err;
    args->help = true;
    return 0;
}

static int set_version(struct cli_args *args, const char *value, struct mf_error *err)
{
    (void)value;
    (void)err;
    args->version = true;
    return 0;
}

static int set_runtime_dir(struct cli_args *args, const char *value, struct mf_error *err)
{
    if (!value[0])
        return mf_fail(err, EINVAL, "--runtime-dir is empty; leave it out for %s",
                       default_runtime_dir);
    args->runtime_dir = value;
    return 0;
}

static const struct option {
    const char *word;
    unsigned bit;      /**< 0: every verb takes it, and so does memferry without one */
    const char *value; /**< what the value is called in messages; NULL: takes none */
    int (*set)(struct cli_args *args, const char *value, struct mf_error *err);
} options[] = {
    {"--qmp", CLI_OPTION_QMP, "PATH", set_qmp},
    {"--pid", CLI_OPTION_PID, "PID", set_pid},
    {"--pause", CLI_OPTION_PAUSE, "COMMAND", set_pause},
    {"--save", CLI_OPTION_SAVE, "COMMAND", set_save},
    {"--load", CLI_OPTION_LOAD, "COMMAND", set_load},
    {"--resume", CLI_OPTION_RESUME, "COMMAND", set_resume},
    {"--region", CLI_OPTION_REGION, "NAME=FILE", set_region},
    {"--timeout", CLI_OPTION_TIMEOUT, "SECONDS", set_timeout},
    {"--to", CLI_OPTION_TO, "HOST[:PORT]", set_to},
    {"--json", CLI_OPTION_JSON, NULL, set_json},
    {"--detach", CLI_OPTION_DETACH, NULL, set_detach},
    {"--keep-source", CLI_OPTION_KEEP_SOURCE, NULL, set_keep_source},
    {"--streams", CLI_OPTION_STREAMS, "N", set_streams},
    {"--mode", CLI_OPTION_MODE, "hybrid|postcopy|precopy", set_mode},
    {"--bandwidth", CLI_OPTION_BANDWIDTH, "RATE", set_bandwidth},
    {"--max-rounds", CLI_OPTION_MAX_ROUNDS, "N", set_max_rounds},
    {"--switch-after", CLI_OPTION_SWITCH_AFTER, "SECONDS", set_switch_after},
    {"--max-blackout", CLI_OPTION_MAX_BLACKOUT, "MS", set_max_blackout},
    {"--fallback", CLI_OPTION_FALLBACK, NULL, set_fallback},
    {"--runtime-dir", 0, "DIR", set_runtime_dir},
    {"--help", 0, NULL, set_help},
    {"-h", 0, NULL, set_help},
    {"--version", 0, NULL, set_version},
};
#define OPTION_COUNT (sizeof(options) / sizeof(options[0]))

static const char *verb_word(const struct cli_args *args)
{
    return args->verb ? args->verb->word : "";
}

static int fail_unknown_option(const struct cli_args *args, const char *word, struct mf_error *err)
{
    const char *nearest = NULL;
    unsigned best = SLIP_MAX + 1;
    for (size_t i = 0; i < OPTION_COUNT; i++) {
        if (!options[i].bit || (args->verb && (args->verb->allowed & options[i].bit)))
            consider(word, options[i].word, &best, &nearest);
    }
    return mf_fail(err, EINVAL,
                   "there is no option '%.60s'%s%s%s; 'memferry %s%s--help' lists them", word,
                   nearest ? "; did you mean '" : "", nearest ? nearest : "", nearest ? "'?" : "",
                   verb_word(args), args->verb ? " " : "");
}

/* Takes the option at argv[*at], and its value. */
static int take_option(char **argv, int *at, struct cli_args *args, unsigned *given,
                       struct mf_error *err)
{
    const char *text = argv[*at];
    const char *equals = strchr(text, '=');
    size_t word_bytes = equals ? (size_t)(equals - text) : strlen(text);
    const struct option *option = NULL;
    for (size_t i = 0; i < OPTION_COUNT && !option; i++) {
        if (strlen(options[i].word) == word_bytes && !strncmp(options[i].word, text, word_bytes))
            option = &options[i];
    }
    if (!option)
        return fail_unknown_option(args, text, err);
    if (option->bit && !args->verb)
        return mf_fail(err, EINVAL,
                       "%s stands before the verb; it belongs behind it: "
                       "memferry VERB [NAME] %s",
                       option->word, option->word);
    if (option->bit && !(args->verb->allowed & option->bit))
        return mf_fail(err, EINVAL,
                       "'memferry %s' takes no %s; 'memferry %s --help' lists its options",
                       args->verb->word, option->word, args->verb->word);
    if (*given & option->bit & ~(unsigned)CLI_OPTION_REGION)
        return mf_fail(err, EINVAL, "%s is given twice", option->word);
    *given |= option->bit;
    if (!option->value) {
        if (equals)
            return mf_fail(err, EINVAL, "%s takes no value", option->word);
        return option->set(args, NULL, err);
    }
    if (equals)
        return option->set(args, equals + 1, err);
    if (!argv[*at + 1])
        return mf_fail(err, EINVAL, "%s lacks its value: %s %s", option->word, option->word,
                       option->value);
    ++*at;
    return option->set(args, argv[*at], err);
}

/* ---- verbs and names ---- */

static int take_verb(const char *word, const struct cli_verb *verbs, struct cli_args *args,
                     struct mf_error *err)
{
    const char *nearest = NULL;
    unsigned best = SLIP_MAX + 1;
    for (const struct cli_verb *verb = verbs; verb->word; verb++) {
        if (strcmp(word, verb->word) == 0) {
            args->verb = verb;
            return 0;
        }
        consider(word, verb->word, &best, &nearest);
    }
    return mf_fail(err, EINVAL, "there is no verb '%.60s'%s%s%s; 'memferry --help' lists the verbs",
                   word, nearest ? "; did you mean '" : "", nearest ? nearest : "",
                   nearest ? "'?" : "");
}

static int take_pid(const char *text, struct cli_args *args, struct mf_error *err)
{
    uint64_t pid;
    if (args->pid)
        return mf_fail(err, EINVAL,
                       "'%.60s' is one too many; 'memferry %s' works on one process at a time",
                       text, args->verb->word);
    if (mf_number_parse(text, 1, INT_MAX, &pid) < 0)
        return mf_fail(err, EINVAL, "'%.60s' is not the id of a process", text);
    args->pid = (int)pid;
    return 0;
}

static int take_name(const char *name, struct cli_args *args, struct mf_error *err)
{
    if (args->verb->name == CLI_NAME_NONE)
        return mf_fail(err, EINVAL, "'memferry %s' takes no name, and '%.60s' is one too many",
                       args->verb->word, name);
    if (args->verb->name == CLI_PID_REQUIRED)
        return take_pid(name, args, err);
    if (args->name)
        return mf_fail(err, EINVAL,
                       "'%.60s' is one name too many; 'memferry %s' works on one VM at a time",
                       name, args->verb->word);
    if (!mf_name_valid(name))
        return mf_fail(
            err, EINVAL,
            "'%.80s' is not usable as a name; a name has 1 to %d letters, digits, '.', '_' "
            "and '-', and starts with neither '.' nor '-'",
            name, MF_NAME_MAX);
    args->name = name;
    return 0;
}

/* KEY=VALUE behind the name. */
static int take_setting(const char *text, struct cli_args *args, struct mf_error *err)
{
    static const char key[] = "bandwidth";
    const char *equals = strchr(text, '=');
    size_t key_bytes = equals ? (size_t)(equals - text) : strlen(text);
    if (key_bytes != strlen(key) || strncmp(text, key, key_bytes) != 0)
        return mf_fail(err, EINVAL,
                       "there is nothing called '%.*s' to set; what can be set is bandwidth=RATE",
                       (int)(key_bytes < 60 ? key_bytes : 60), text);
    if (!equals)
        return mf_fail(err, EINVAL, "bandwidth lacks its value: bandwidth=RATE");
    if (args->bandwidth_given)
        return mf_fail(err, EINVAL, "bandwidth is given twice");
    return take_bandwidth(args, key, equals + 1, err);
}

/* What is moved, and that what was said about it goes together. */
static int check_target(const struct cli_args *args, unsigned given, struct mf_error *err)
{
    const struct cli_verb *verb = args->verb;
    const unsigned option = verb->required & CLI_OPTION_TO ? CLI_OPTION_SAVE : CLI_OPTION_LOAD;
    if ((given & CLI_OPTION_QMP) && (given & CLI_OPTION_PID))
        return mf_fail(
            err, EINVAL,
            "--qmp and --pid do not go together: a QEMU is driven by its QMP socket, any "
            "other process by commands");
    if (!(given & (CLI_OPTION_QMP | CLI_OPTION_PID)) && (given & CLI_OPTIONS_PROCESS))
        return mf_fail(err, EINVAL,
                       "'memferry %s' needs --pid PID with these options: memferry %s %s",
                       verb->word, verb->word, verb->usage);
    if (!(given & (CLI_OPTION_QMP | CLI_OPTION_PID)))
        return mf_fail(err, EINVAL,
                       "'memferry %s' needs --qmp PATH (of a QEMU) or --pid PID (of any other "
                       "process): memferry %s %s",
                       verb->word, verb->word, verb->usage);
    for (size_t i = 0; (given & CLI_OPTION_QMP) && i < OPTION_COUNT; i++)
        if (given & options[i].bit & CLI_OPTIONS_PROCESS)
            return mf_fail(err, EINVAL,
                           "%s goes with --pid only: a QEMU is driven by its QMP socket",
                           options[i].word);
    if ((given & CLI_OPTION_PID) && !(given & option))
        return mf_fail(err, EINVAL,
                       "'memferry %s --pid' needs %s COMMAND, which %s the program's state%s; "
                       "'true' if all of it is in its shared memory",
                       verb->word, option == CLI_OPTION_SAVE ? "--save" : "--load",
                       option == CLI_OPTION_SAVE ? "writes" : "reads",
                       option == CLI_OPTION_SAVE ? " to its standard output"
                                                 : " from its standard input");
    return 0;
}

static int check_complete(struct cli_args *args, unsigned given, struct mf_error *err)
{
    const struct cli_verb *verb = args->verb;
    if (verb->name == CLI_NAME_REQUIRED && !args->name)
        return mf_fail(err, EINVAL, "'memferry %s' needs the name of a VM: memferry %s %s",
                       verb->word, verb->word, verb->usage);
    if (verb->name == CLI_PID_REQUIRED && !args->pid)
        return mf_fail(err, EINVAL, "'memferry %s' needs the id of a process: memferry %s %s",
                       verb->word, verb->word, verb->usage);
    for (size_t i = 0; i < OPTION_COUNT; i++) {
        if (verb->required & options[i].bit & ~given)
            return mf_fail(err, EINVAL, "'memferry %s' needs %s %s: memferry %s %s", verb->word,
                           options[i].word, options[i].value, verb->word, verb->usage);
    }
    if (!verb->target && (given & CLI_OPTION_REGION) && !(given & CLI_OPTION_PID))
        return mf_fail(err, EINVAL, "--region goes with --pid only");
    if ((given & CLI_OPTION_PID) && !(given & CLI_OPTION_MODE))
        args->rounds.mode = mf_control_mode("postcopy");
    int rc = verb->target ? check_target(args, given, err) : 0;
    if (rc < 0)
        return rc;
    if (verb->settings && !args->bandwidth_given)
        return mf_fail(err, EINVAL, "'memferry %s %s' lacks what to set: memferry %s %s",
                       verb->word, args->name, verb->word, verb->usage);
    return mf_control_rounds_check(&args->rounds, err);
}

int cli_parse(int argc, char **argv, const struct cli_verb *verbs, struct cli_args *args,
              struct mf_error *err)
{
    *args = (struct cli_args){.runtime_dir = default_runtime_dir,
                              .process = {.pause = "", .save = "", .load = "", .resume = ""},
                              .rounds.mode = mf_control_mode("")};
    unsigned given = 0;
    bool options_ended = false;
    for (int i = 1; i < argc; i++) {
        int rc;
        if (!options_ended && strcmp(argv[i], "--") == 0) {
            options_ended = true;
            continue;
        }
        if (!options_ended && argv[i][0] == '-' && argv[i][1])
            rc = take_option(argv, &i, args, &given, err);
        else if (!args->verb)
            rc = take_verb(argv[i], verbs, args, err);
        else if (args->verb->settings && args->name)
            rc = take_setting(argv[i], args, err);
        else
            rc = take_name(argv[i], args, err);
        if (rc < 0) {
            /* The error too is reported in the way that was asked for. */
            for (; i < argc && args->verb; i++)
                args->json |= strcmp(argv[i], "--json") == 0;
            args->json &= args->verb && (args->verb->allowed & CLI_OPTION_JSON);
            return rc;
        }
    }
    if (args->help || args->version)
        return 0;
    if (!args->verb)
        return mf_fail(err, EINVAL,
                       "say what to do: memferry VERB; 'memferry --help' lists the verbs");
    return check_complete(args, given, err);
}

int cli_absolute(const char *path, char **out, struct mf_error *err)
{
    if (path[0] == '/') {
        *out = strdup(path);
        return *out ? 0 : mf_fail(err, ENOMEM, "out of memory");
    }
    cleanup_free char *directory = getcwd(NULL, 0);
    if (!directory)
        return mf_fail(err, errno, "cannot make '%s' absolute: the current directory: %s", path,
                       strerror(errno));
    if (asprintf(out, "%s/%s", strcmp(directory, "/") == 0 ? "" : directory, path) < 0)
        return mf_fail(err, ENOMEM, "out of memory");
    return 0;
}
