/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "lib/error.h"

#include <stdbool.h>
#include <stdio.h>

int mf_fail(struct mf_error *err, int code, const char *fmt, ...)
{
    if (err) {
        va_list ap;
        va_start(ap, fmt);
        err->code = code;
        vsnprintf(err->text, sizeof(err->text), fmt, ap);
        va_end(ap);
        mf_clean_text(err->text);
    }
    return -code;
}

void mf_clean_text(char *text)
{
    for (unsigned char *at = (unsigned char *)text; *at; at++) {
        bool c1 = at[0] == 0xc2 && at[1] >= 0x80 && at[1] <= 0x9f;
        if (c1)
            *at++ = '?';
        if (c1 || *at < 0x20 || *at == 0x7f)
            *at = '?';
    }
}
