// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Anything that the process of a tap disk may say of where the disk is: see `map_case`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    ring_fuzz::map_case::run(data);
});
