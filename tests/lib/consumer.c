/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A program of somebody else's: it knows the installed header and what pkg-config says, no more. */
#include <memferry.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

static int want(void *arg, struct memferry_server *server, struct memferry_want *want)
{
    (void)server;
    want->pages = 1;
    memset(want->bytes, *(const int *)arg, want->page_bytes);
    return MEMFERRY_DATA;
}

int main(void)
{
    int value = 'm';
    struct memferry_server *server;
    const struct memferry_provider provider = {
        .struct_bytes = sizeof(provider), .arg = &value, .want = want};
    const struct memferry_region region = {
        .struct_bytes = sizeof(region), .memory = MEMFERRY_ANONYMOUS, .length_bytes = 65536};
    char *at = mmap(NULL, 65536, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    struct memferry_mapping mapping = {
        .struct_bytes = sizeof(mapping), .start_addr = (uintptr_t)at, .length_bytes = 65536};
    if (at == MAP_FAILED || memferry_server_new(NULL, &server) < 0 ||
        memferry_server_set_provider(server, &provider) < 0 || memferry_context_open(server) != 0 ||
        memferry_region_add(server, &region) != 0 || memferry_mapping_add(server, &mapping) < 0 ||
        memferry_server_start(server) < 0) {
        fprintf(stderr, "%s\n", memferry_why());
        return 1;
    }
    for (int i = 0; i < 65536; i++)
        if (at[i] != 'm')
            return 1;
    if (memferry_server_free(server, MEMFERRY_END_COMPLETE) < 0) {
        fprintf(stderr, "%s\n", memferry_why());
        return 1;
    }
    printf("%s\n", memferry_version());
    return 0;
}
