/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * An io_uring of one thread, able to do what the page traffic needs and nothing else: its
 * operations are restricted (io_uring_register_restrictions(3)), because a system-call filter does
 * not see them.
 */
#pragma once

#include <liburing.h>
#include <sys/socket.h>

/** ring_open() - in the thread that will use it. Return: 0 or -errno. */
int ring_open(struct io_uring *ring, unsigned entries);
void ring_close(struct io_uring *ring);

/** ring_send_all() - send every byte of @msg (its iovecs are consumed). Blocks.
 *  Return: 0 or -errno (-EPIPE, -ECONNRESET: the peer is gone). */
int ring_send_all(struct io_uring *ring, int fd, struct msghdr *msg);

/** ring_recv() - receive at least one byte. Blocks. Return: bytes, 0 at end of file, or -errno. */
ssize_t ring_recv(struct io_uring *ring, int fd, void *at, size_t room_bytes);
