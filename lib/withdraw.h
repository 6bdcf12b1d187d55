/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Taking a userfaultfd out of the process that it was made in, so that nobody but its owner holds
 * it: the kernel then takes everything back when the owner goes, in whatever way.
 *
 * From userfaultfd(2) to close(2), a millisecond or two, the descriptor lies in the process's
 * table, and a fork by another of its threads copies the table. A child that executes something
 * closes the copy; one that does not would keep the userfaultfd alive after its owner, and the
 * process would wait for ever for somebody to read its next event. So whoever has a copy is made to
 * close it too.
 */
#pragma once

#include <sys/types.h>

#include "lib/error.h"

/**
 * mf_withdraw() - close descriptor @remote_fd in @pid and in every process that has inherited it.
 * @uffd: the caller's duplicate, after mf_uffd_api() and before anything is registered: so far a
 * copy does no harm, and nobody waits for an event. Takes a few milliseconds.
 * Return: 0 (also when the process is gone), or -errno with a sentence (-EBADF: it was closed
 * already, as by an exec; -EBUSY: a child can't be made to close its copy. Then @uffd must not be
 * used; it may be tried again with another).
 */
int mf_withdraw(pid_t pid, int uffd, int remote_fd, struct mf_error *err);
