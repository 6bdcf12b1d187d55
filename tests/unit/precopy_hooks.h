/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Included before anything else where test_precopy_model compiles the mover's own files: at every
 * call that another thread, the guest or a crash could come between, the model gets a say.
 */
#pragma once

#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "lib/page_state.h"
#include "lib/zero.h"

void model_hook(void);
ssize_t model_pwrite(int fd, const void *from, size_t length_bytes, off_t offset_bytes);
ssize_t model_pread(int fd, void *to, size_t length_bytes, off_t offset_bytes);
off_t model_lseek(int fd, off_t offset_bytes, int whence);
int model_nanosleep(const struct timespec *time, struct timespec *left);
void *model_memcpy(void *to, const void *from, size_t length_bytes);

#define pwrite model_pwrite
#define lseek model_lseek
#define memcpy model_memcpy
#define nanosleep model_nanosleep
#define AFTER_HOOK(call)                                                                           \
    ({                                                                                             \
        model_hook();                                                                              \
        call;                                                                                      \
    })
#define pread model_pread
#define madvise(...) AFTER_HOOK(madvise(__VA_ARGS__))
#define fallocate(...) AFTER_HOOK(fallocate(__VA_ARGS__))
#define mf_is_zero(...) AFTER_HOOK(mf_is_zero(__VA_ARGS__))
#define mf_page_claim(...) AFTER_HOOK(mf_page_claim(__VA_ARGS__))
#define mf_page_confirm(...) AFTER_HOOK(mf_page_confirm(__VA_ARGS__))
#define mf_page_place(...) AFTER_HOOK(mf_page_place(__VA_ARGS__))
#define mf_page_unclaim(...) AFTER_HOOK(mf_page_unclaim(__VA_ARGS__))
#define mf_page_land_unconfirmed(...) AFTER_HOOK(mf_page_land_unconfirmed(__VA_ARGS__))
#define mf_page_mark_sent(...) AFTER_HOOK(mf_page_mark_sent(__VA_ARGS__))
#define mf_page_set_copied(...) AFTER_HOOK(mf_page_set_copied(__VA_ARGS__))
#define mf_page_mark(...) AFTER_HOOK(mf_page_mark(__VA_ARGS__))
#define mf_page_unmark(...) AFTER_HOOK(mf_page_unmark(__VA_ARGS__))
#define mf_page_run_of(...) AFTER_HOOK(mf_page_run_of(__VA_ARGS__))
#define mf_page_confirm_empty(...) AFTER_HOOK(mf_page_confirm_empty(__VA_ARGS__))
#define mf_page_discard_finish(...) AFTER_HOOK(mf_page_discard_finish(__VA_ARGS__))
