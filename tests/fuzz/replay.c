/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Runs a fuzzer's corpus through it once, without libFuzzer: any compiler, an ordinary test. Every
 * input is also cut short at every length up to a few hundred bytes, and has every bit of its first
 * bytes flipped: what the fuzzer found once stays found.
 *
 * usage: NAME DIRECTORY
 */
#include <dirent.h>
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "lib/util.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t length_bytes);

#define CUT_MAX_BYTES 512u
#define FLIP_MAX_BYTES 64u

/* An exact-size copy each time, so that a sanitizer sees a read past the end. */
static void run_copy(const uint8_t *data, size_t length_bytes)
{
    cleanup_free uint8_t *copy = malloc(length_bytes ? length_bytes : 1);
    if (!copy)
        abort();
    memcpy(copy, data, length_bytes);
    LLVMFuzzerTestOneInput(copy, length_bytes);
}

static void run_input(uint8_t *data, size_t length_bytes)
{
    for (size_t cut = 0; cut < length_bytes && cut < CUT_MAX_BYTES; cut++)
        run_copy(data, cut);
    for (size_t bit = 0; bit < 8 * length_bytes && bit < (size_t)8 * FLIP_MAX_BYTES; bit++) {
        uint8_t mask = (uint8_t)(1u << (bit % 8));
        data[bit / 8] ^= mask;
        run_copy(data, length_bytes);
        data[bit / 8] ^= mask;
    }
    run_copy(data, length_bytes);
}

static int run_file(const char *path)
{
    cleanup_fclose FILE *file = fopen(path, "re");
    struct stat st;
    if (!file || fstat(fileno(file), &st) < 0) {
        fprintf(stderr, "cannot read %s: %s\n", path, strerror(errno));
        return -1;
    }
    if (!S_ISREG(st.st_mode))
        return 0;
    size_t length_bytes = (size_t)st.st_size;
    cleanup_free uint8_t *data = malloc(length_bytes ? length_bytes : 1);
    if (!data || fread(data, 1, length_bytes, file) != length_bytes) {
        fprintf(stderr, "cannot read all of %s\n", path);
        return -1;
    }
    run_input(data, length_bytes);
    return 1;
}

int main(int argc, char **argv)
{
    if (argc != 2) {
        fprintf(stderr, "usage: %s DIRECTORY\n", argv[0]);
        return 2;
    }
    cleanup_closedir DIR *directory = opendir(argv[1]);
    if (!directory) {
        fprintf(stderr, "cannot open %s: %s\n", argv[1], strerror(errno));
        return 1;
    }
    int files = 0;
    for (const struct dirent *entry; (entry = readdir(directory));) {
        char path[4096];
        snprintf(path, sizeof(path), "%s/%s", argv[1], entry->d_name);
        int rc = run_file(path);
        if (rc < 0)
            return 1;
        files += rc;
    }
    printf("%d inputs\n", files);
    if (!files) {
        fprintf(stderr, "%s has no input\n", argv[1]);
        return 1;
    }
    return 0;
}
