// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Arbitrary calls of the processes of a tap disk: see `tap_case`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    ring_fuzz::tap_case::run(data);
});
