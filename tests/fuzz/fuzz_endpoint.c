/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* "HOST[:PORT]" as the command line and the configuration take it: printed and read again it is the
 * same. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "lib/endpoint.h"
#include "lib/util.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t length_bytes);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t length_bytes)
{
    cleanup_free char *text = malloc(length_bytes + 1);
    if (!text)
        return 0;
    memcpy(text, data, length_bytes);
    text[length_bytes] = '\0';
    struct mf_endpoint endpoint, again;
    struct mf_error err = {.text = ""};
    if (mf_endpoint_parse(text, &endpoint, &err) < 0) {
        if (!err.text[0])
            abort();
        return 0;
    }
    char printed[MF_HOST_MAX_BYTES + 16];
    mf_endpoint_print(endpoint.host, endpoint.port ? endpoint.port : 1, printed, sizeof(printed));
    if (mf_endpoint_parse(printed, &again, NULL) < 0 || strcmp(again.host, endpoint.host) != 0 ||
        again.port != (endpoint.port ? endpoint.port : 1))
        abort();
    return 0;
}
