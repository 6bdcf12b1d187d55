/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "lib/error.h"

#include <stdio.h>

int mf_fail(struct mf_error *err, int code, const char *fmt, ...)
{
    if (err) {
        va_list ap;
        va_start(ap, fmt);
        err->code = code;
        vsnprintf(err->text, sizeof(err->text), fmt, ap);
        va_end(ap);
    }
    return -code;
}
