/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The userfaultfds of a target's children, which nobody holds but a mover and its companion
 * (daemon/mover/companion.h): taken out of the table of the one that is left when the other died.
 */
#pragma once

#include <stdint.h>
#include <sys/types.h>

#include "lib/error.h"

/** struct keeper - descriptors on their way from one mover to the next. Zeroed is empty. */
struct keeper {
    int *uffd; /**< owned */
    unsigned count, room;
};

/**
 * keeper_take() - add those of process @pid, which must not run meanwhile what would add more.
 * @except: the target's own userfaultfd, of which the table holds copies. What is in @keeper
 * already, and those of address spaces that are gone, are left out too.
 * Return: how many were added, or -errno with a sentence.
 */
int keeper_take(struct keeper *keeper, pid_t pid, int except, struct mf_error *err);

/** keeper_drop() - close them all: somebody else holds them, or they are not needed any more. */
void keeper_drop(struct keeper *keeper);
