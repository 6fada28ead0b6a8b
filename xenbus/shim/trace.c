// SPDX-License-Identifier: GPL-2.0-only
/*
 * The trace points themselves.
 */
#define CREATE_TRACE_POINTS
#define CREATE_RUST_TRACE_POINTS
#include "trace.h"
