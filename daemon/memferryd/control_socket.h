/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The file system's side of the control socket: one daemon a runtime directory, a socket that only
 * the daemon's user can connect to.
 */
#pragma once

#include "lib/error.h"

/**
 * control_lock_directory() - make the runtime directory if it is missing, and lock it.
 * @out: a descriptor, the caller's to close; the lock lasts as long as it is open.
 * Return: 0, -EADDRINUSE (another daemon holds it) or -errno.
 */
int control_lock_directory(const char *runtime_dir, int *out, struct mf_error *err);

/**
 * control_bind() - an AF_UNIX stream socket bound to @path (mode 0600), not yet listening; what lay
 * there is removed. Call it with the directory locked.
 * @path: shorter than sun_path.
 * @out:  non-blocking, the caller's to close.
 * Return: 0 or -errno.
 */
int control_bind(const char *path, int *out, struct mf_error *err);
