// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Any traffic of a frontend and a backend on one ring: see `ring_case`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    ring_fuzz::ring_case::run(data);
});
