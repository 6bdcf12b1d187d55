/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A page that fell back to an older generation is noticed because the generations are kept apart
 * from the pages; were that table to fall back too, its sum would no longer equal the count of
 * writes; and were that count to fall back as well, the host would see the heartbeats' counters run
 * backwards.
 */
#include "workload.h"

#include <stdbool.h>
#include <stddef.h>

#include "pattern.h"

#define REPORTS_MAX 20u

/* In a page's generation: it holds zeros, not the pattern. */
#define GENERATION_ZERO 0x80000000u

enum mode { MODE_IDLE, MODE_HOT, MODE_RANDOM, MODE_SEQUENTIAL, MODE_ZEROES };

static const char *const mode_names[] = {
    [MODE_IDLE] = "idle",     [MODE_HOT] = "hot",
    [MODE_RANDOM] = "random", [MODE_SEQUENTIAL] = "sequential",
    [MODE_ZEROES] = "zeroes",
};

struct workload {
    const struct guest_platform *platform;
    uint64_t *memory;
    uint32_t *generations;
    uint32_t pages;
    enum mode mode;
    uint32_t rate;      /* pages a second, 0: unlimited */
    uint32_t budget;    /* pages left to rewrite until the next beat */
    uint32_t credit;    /* thousandths of a page carried over to the next beat */
    uint32_t next_page; /* of MODE_SEQUENTIAL */
    uint32_t random;
    uint32_t beats, writes, checks, wrong;
    uint64_t next_beat;
    char line[96];
    uint32_t line_size;
};

struct text {
    char bytes[160];
    uint32_t size;
};

static void text_add(struct text *text, const char *string)
{
    while (*string && text->size < sizeof(text->bytes))
        text->bytes[text->size++] = *string++;
}

static void text_add_hex(struct text *text, uint64_t value)
{
    char digits[17] = {0};
    uint32_t at = 16;

    do {
        digits[--at] = "0123456789abcdef"[value & 15];
        value >>= 4;
    } while (value);
    text_add(text, digits + at);
}

static void text_add_decimal(struct text *text, uint32_t value)
{
    char digits[11] = {0};
    uint32_t at = 10;

    do {
        digits[--at] = (char)('0' + value % 10);
        value /= 10;
    } while (value);
    text_add(text, digits + at);
}

static void text_add_field(struct text *text, const char *name, uint32_t value)
{
    text_add(text, name);
    text_add_decimal(text, value);
}

static void say(const struct workload *w, struct text *text)
{
    text_add(text, "\n");
    w->platform->put(text->bytes, text->size);
}

static void say_word(const struct workload *w, const char *word)
{
    struct text text = {.size = 0};

    text_add(&text, word);
    say(w, &text);
}

static uint64_t *page_words(const struct workload *w, uint32_t page)
{
    return w->memory + (size_t)page * PATTERN_WORDS;
}

static void page_fill(const struct workload *w, uint32_t page)
{
    uint64_t *words = page_words(w, page);

    if (!(w->generations[page] & GENERATION_ZERO))
        pattern_fill(words, page, w->generations[page]);
    else if ((w->generations[page] & 3u) == 0 && w->platform->discard)
        w->platform->discard(words);
    else
        for (uint32_t i = 0; i < PATTERN_WORDS; i++)
            words[i] = 0;
}

/* Like pattern_check(), of a page that may be one of zeros. */
static int contents_check(const struct workload *w, uint32_t page, struct pattern_error *error)
{
    const volatile uint64_t *words = page_words(w, page);

    if (!(w->generations[page] & GENERATION_ZERO))
        return pattern_check(page_words(w, page), page, w->generations[page], error);
    for (uint32_t i = 0; i < PATTERN_WORDS; i++) {
        uint64_t found = words[i];

        if (found) {
            *error = (struct pattern_error){.word = i, .expected = 0, .found = found};
            return -1;
        }
    }
    return 0;
}

static void page_check(struct workload *w, uint32_t page)
{
    struct pattern_error error = {.word = 0};
    struct text text = {.size = 0};

    w->checks++;
    if (!contents_check(w, page, &error) || ++w->wrong > REPORTS_MAX)
        return;
    text_add_field(&text, "WRONG page=", page);
    text_add_field(&text, " word=", error.word);
    text_add_field(&text, " generation=", w->generations[page]);
    text_add(&text, " expected=");
    text_add_hex(&text, error.expected);
    text_add(&text, " found=");
    text_add_hex(&text, error.found);
    say(w, &text);
}

static uint32_t random_below(struct workload *w, uint32_t limit)
{
    w->random ^= w->random << 13;
    w->random ^= w->random >> 17;
    w->random ^= w->random << 5;
    return (uint32_t)((uint64_t)w->random * limit >> 32);
}

static void beat(struct workload *w)
{
    struct text text = {.size = 0};
    uint64_t interval = (uint64_t)w->platform->ticks_per_ms * (GUEST_BEAT_US / 1000u);
    uint64_t now = w->platform->ticks();

    if (now < w->next_beat)
        return;
    /* Beats that were missed are not made up for: the gap is what the host measures. */
    w->next_beat = now + interval;
    w->beats++;
    w->credit += w->rate * (GUEST_BEAT_US / 1000u);
    w->budget = w->credit / 1000u;
    w->credit %= 1000u;
    text_add(&text, "h ");
    text_add_hex(&text, w->beats);
    text_add(&text, " ");
    text_add_hex(&text, w->writes);
    text_add(&text, " ");
    text_add_hex(&text, w->checks);
    say(w, &text);
}

static void rewrite_one(struct workload *w)
{
    uint32_t page = 0;

    switch (w->mode) {
    case MODE_IDLE:
        return;
    case MODE_HOT:
        page = random_below(w, w->pages / 16u + 1u);
        break;
    case MODE_RANDOM:
    case MODE_ZEROES:
        page = random_below(w, w->pages);
        break;
    case MODE_SEQUENTIAL:
        page = w->next_page;
        w->next_page = page + 1 < w->pages ? page + 1 : 0;
        break;
    }
    page_check(w, page);
    w->generations[page]++;
    if (w->mode == MODE_ZEROES)
        w->generations[page] ^= GENERATION_ZERO;
    else
        w->generations[page] &= ~GENERATION_ZERO;
    page_fill(w, page);
    w->writes++;
}

static void work(struct workload *w)
{
    if (w->mode == MODE_IDLE || (w->rate && !w->budget)) {
        w->platform->idle(w->next_beat);
        return;
    }
    if (w->rate)
        w->budget--;
    rewrite_one(w);
    page_check(w, random_below(w, w->pages));
}

static void verify(struct workload *w)
{
    struct text text = {.size = 0};
    uint32_t wrong_before = w->wrong, sum = 0;

    for (uint32_t page = 0; page < w->pages; page++) {
        page_check(w, page);
        sum += w->generations[page] & ~GENERATION_ZERO;
        beat(w);
    }
    if (sum != w->writes) {
        w->wrong++;
        say_word(w, "WRONG the generations do not add up to the writes");
    }
    text_add_field(&text, "VERIFIED pages=", w->pages);
    text_add_field(&text, " wrong=", w->wrong - wrong_before);
    say(w, &text);
}

static const char *word_after(const char *text)
{
    while (*text && *text != ' ')
        text++;
    while (*text == ' ')
        text++;
    return text;
}

static bool word_is(const char *text, const char *word)
{
    while (*word && *text == *word) {
        text++;
        word++;
    }
    return !*word && (!*text || *text == ' ');
}

static uint32_t word_number(const char *text)
{
    uint32_t value = 0;

    while (*text >= '0' && *text <= '9')
        value = value * 10u + (uint32_t)(*text++ - '0');
    return value;
}

static bool set_mode(struct workload *w, const char *arguments)
{
    for (uint32_t i = 0; i < sizeof(mode_names) / sizeof(mode_names[0]); i++) {
        if (!word_is(arguments, mode_names[i]))
            continue;
        w->mode = (enum mode)i;
        w->rate = word_number(word_after(arguments));
        w->budget = w->credit = 0;
        return true;
    }
    return false;
}

static void start(struct workload *w, const char *arguments)
{
    struct text text = {.size = 0};

    w->pages = word_number(arguments) * (1024u * 1024u / GUEST_PAGE_BYTES);
    w->memory = w->platform->memory(w->pages);
    w->generations = w->platform->generations(w->pages);
    if (!w->pages || !w->memory || !w->generations || !set_mode(w, word_after(arguments))) {
        w->pages = 0;
        w->mode = MODE_IDLE;
        say_word(
            w, "ERROR start MIB idle|hot|random|sequential|zeroes RATE: bad argument or no memory");
        return;
    }
    for (uint32_t page = 0; page < w->pages; page++) {
        page_fill(w, page);
        beat(w);
    }
    text_add_field(&text, "FILLED pages=", w->pages);
    say(w, &text);
}

static void stats(const struct workload *w)
{
    struct text text = {.size = 0};

    text_add_field(&text, "STATS pages=", w->pages);
    text_add_field(&text, " beats=", w->beats);
    text_add_field(&text, " writes=", w->writes);
    text_add_field(&text, " checks=", w->checks);
    text_add_field(&text, " wrong=", w->wrong);
    say(w, &text);
}

static void obey(struct workload *w, const char *command)
{
    if (word_is(command, "start") && !w->pages) {
        start(w, word_after(command));
    } else if (word_is(command, "mode") && w->pages && set_mode(w, word_after(command))) {
        say_word(w, "MODE");
    } else if (word_is(command, "quiet")) {
        w->mode = MODE_IDLE;
        say_word(w, "QUIET");
    } else if (word_is(command, "verify")) {
        verify(w);
    } else if (word_is(command, "stats")) {
        stats(w);
    } else if (word_is(command, "poweroff")) {
        say_word(w, "BYE");
        w->platform->poweroff();
    } else {
        say_word(w, "ERROR unknown command");
    }
}

static void poll_commands(struct workload *w)
{
    int byte = 0;

    while ((byte = w->platform->get()) >= 0) {
        if (byte != '\n') {
            if (w->line_size + 1 < sizeof(w->line))
                w->line[w->line_size++] = (char)byte;
            continue;
        }
        w->line[w->line_size] = '\0';
        w->line_size = 0;
        obey(w, w->line);
    }
}

void workload_run(const struct guest_platform *platform)
{
    static struct workload w;
    uint32_t polled_at_beat = 0;

    w.platform = platform;
    w.random = 2463534242u;
    pattern_init();
    say_word(&w, "READY");
    for (;;) {
        beat(&w);
        if (w.beats != polled_at_beat) {
            polled_at_beat = w.beats;
            poll_commands(&w);
        }
        work(&w);
    }
}
