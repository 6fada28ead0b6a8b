// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Any bytes in a slot, any limits: see `request_case`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    ring_fuzz::request_case::run(data);
});
