/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Work in threads: it comes back to the event loop, and on one process it is done in turn. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <event2/event.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdatomic.h>

#include "daemon/memferryd/work.h"

struct piece {
    struct work work;
    sem_t *waits_for;     /* NULL: nothing */
    struct piece *begets; /* started by done() */
    atomic_bool ran;
    pthread_t ran_in;
    unsigned turn; /* when done() was called; 0: not yet */
};

static struct event_base *base;
static unsigned turns;

static void run(struct work *work)
{
    struct piece *piece = (struct piece *)work;
    piece->ran = true;
    piece->ran_in = pthread_self();
    if (piece->waits_for)
        sem_wait(piece->waits_for);
}

static void done(struct work *work)
{
    struct piece *piece = (struct piece *)work;
    piece->turn = ++turns;
    if (piece->begets)
        assert_int_equal(work_start(base, &piece->begets->work, NULL), 0);
}

static struct piece piece_on(pid_t pid)
{
    return (struct piece){.work = {.pid = pid, .run = run, .done = done}};
}

static void start(struct piece *piece)
{
    assert_int_equal(work_start(base, &piece->work, NULL), 0);
    assert_int_equal(piece->turn, 0);
}

static int setup(void **state)
{
    (void)state;
    base = event_base_new();
    turns = 0;
    return base ? 0 : -1;
}

static int teardown(void **state)
{
    (void)state;
    event_base_free(base);
    return 0;
}

static void the_loop_goes_on_meanwhile(void **state)
{
    (void)state;
    sem_t gate;
    sem_init(&gate, 0, 0);
    struct piece first = piece_on(1), second = piece_on(1), other = piece_on(2);
    first.waits_for = &gate;
    start(&first);
    start(&second);
    start(&other);
    while (!other.turn)
        event_base_loop(base, EVLOOP_ONCE);
    assert_int_equal(first.turn, 0);
    assert_false(second.ran);
    assert_false(pthread_equal(other.ran_in, pthread_self()));
    sem_post(&gate);
    while (!second.turn)
        event_base_loop(base, EVLOOP_ONCE);
    assert_int_equal(first.turn, 2);
    assert_int_equal(second.turn, 3);
    sem_destroy(&gate);
}

static void what_follows_takes_its_turn(void **state)
{
    (void)state;
    struct piece first = piece_on(1), second = piece_on(1), third = piece_on(1);
    first.begets = &third;
    start(&first);
    start(&second);
    while (!third.turn)
        event_base_loop(base, EVLOOP_ONCE);
    assert_int_equal(second.turn, 2);
    assert_int_equal(third.turn, 3);
}

static void the_end_waits_for_all(void **state)
{
    (void)state;
    struct piece first = piece_on(1), second = piece_on(1), other = piece_on(2), last = piece_on(3);
    second.begets = &last;
    start(&first);
    start(&second);
    start(&other);
    works_finish();
    assert_true(first.turn && second.turn && other.turn && last.turn);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(the_loop_goes_on_meanwhile, setup, teardown),
        cmocka_unit_test_setup_teardown(what_follows_takes_its_turn, setup, teardown),
        cmocka_unit_test_setup_teardown(the_end_waits_for_all, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
