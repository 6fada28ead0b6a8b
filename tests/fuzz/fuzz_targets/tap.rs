// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Anything that the processes of a tap disk may do and say: see `tap_case`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    ring_fuzz::tap_case::run(data);
});
