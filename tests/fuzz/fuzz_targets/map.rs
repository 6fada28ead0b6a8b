// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Arbitrary mappings of the process of a tap disk: see `map_case`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    ring_fuzz::map_case::run(data);
});
